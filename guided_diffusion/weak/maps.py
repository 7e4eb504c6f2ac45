"""Maps that show where an image's class lies, and the masks cut from them.

The class-derivative map is Hu et al. (2023), *Conditional Diffusion Models for Weakly Supervised
Medical Image Segmentation*; its rivals are the difference from a healthy reconstruction (Wolleb et
al., 2022, *Diffusion Models for Medical Anomaly Detection*) and Grad-CAM (Selvaraju et al., 2017).
All maps of the diffusion take denoisers and levels, as every sampler does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor
from torch.nn import functional

from guided_diffusion.gaussian_diffusion import Denoiser
from guided_diffusion.networks.classifier import EncoderUNetModel
from guided_diffusion.networks.resnet import ResNet50
from guided_diffusion.sampling import ddim
from guided_diffusion.schedule import NoiseLevel
from guided_diffusion.scoring.components import clean

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]
BINS = 256
"""Of the histogram in which Otsu's threshold is found."""


def noisy(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """Noise images [B, C, H, W] to a level."""
    return level.alpha * x0 + level.sigma * eps


def class_difference(
    lesion: Denoiser, other: Denoiser, x: Tensor, levels: Sequence[NoiseLevel], *, tau: float = 0.0
) -> Tensor:
    """Walk two branches down from one noisy image and add up how they part.

    Hu et al. (2023), algorithm 1: a finite difference along the class embedding, which the second
    branch mixes of ``tau`` parts lesion and ``1 - tau`` parts normal.

    Args:
        lesion: denoiser of the lesion's class.
        other: denoiser of the mixed class; for CG-CDM both are guided.
        x: the noisy images [B, C, H, W] at the first level.
        levels: from Q downwards, one step between neighbours.
        tau: what the difference is divided by is ``1 - tau``.

    Returns:
        Sum over the steps of (x - x') / (1 - tau), [B, C, H, W].
    """
    total, x_other = torch.zeros_like(x), x
    for step in pairwise(levels):
        x, x_other = ddim(lesion, x, step), ddim(other, x_other, step)
        total += x - x_other
    return total / (1 - tau)


def one_branch_difference(
    normal: Denoiser, x0: Tensor, eps: Tensor, levels: Sequence[NoiseLevel]
) -> Tensor:
    """How far the class "normal" pulls an image off its own noisy version, [B, C, H, W].

    The published code's other variant: a single branch, compared with the image itself under the
    same noise at the last level.
    """
    reached = ddim(normal, noisy(x0, eps, levels[0]), levels)
    return noisy(x0, eps, levels[-1]) - reached


def counterfactual_difference(
    normal: Denoiser, x0: Tensor, eps: Tensor, levels: Sequence[NoiseLevel]
) -> Tensor:
    """The image minus its healthy reconstruction, [B, C, H, W]; the last level is the clean one."""
    return x0 - ddim(normal, noisy(x0, eps, levels[0]), levels)


def encoded_difference(
    lesion: Denoiser, normal: Denoiser, x0: Tensor, levels: Sequence[NoiseLevel]
) -> Tensor:
    """The image minus its healthy version from its own noise, [B, C, H, W].

    Wolleb et al. (2022), algorithm 1: DDIM carries the image up to a level, here as the class that
    it has, and down again as normal. No noise is drawn, so that all that is not of the class stays.

    Args:
        lesion: denoiser of the lesion's class.
        normal: denoiser of the normal class, which may be guided.
        x0: images [B, C, H, W], taken to be at the last level.
        levels: downwards; the last one is not the clean one.
    """
    return x0 - ddim(normal, ddim(lesion, x0, levels[::-1]), levels)


def grad_cam(
    net: EncoderUNetModel | ResNet50,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    *,
    shrink: int = 8,
    absolute: bool = False,
) -> Tensor:
    """Where a classifier looks for a class: Selvaraju et al. (2017), eq. 1 and 2.

    Group normalisation lets a lesion lower the maps everywhere else, and the gradient's mean over
    all places then has the sign of those: the lesion is where the sum is most negative.

    Args:
        net: its :meth:`features` and :meth:`head` are called.
        x: images [B, C, H, W] at times ``t`` [B].
        y: class labels int64 [B].
        shrink: the deepest map is read that is at most so many times smaller than the image.
        absolute: take the weighted sum's absolute value instead of its positive part.

    Returns:
        [B, 1, H, W], 0 or more, enlarged bilinearly.
    """
    with torch.enable_grad():
        maps = net.features(x.detach().requires_grad_(), t)
        logits = net.head(maps).gather(1, y[:, None])
        read = next(h for h in reversed(maps) if shrink * h.shape[-1] >= x.shape[-1])
        (gradient,) = torch.autograd.grad(logits.sum(), read)
    weight = gradient.mean(dim=(2, 3), keepdim=True)
    cam = (weight * read.detach()).sum(dim=1, keepdim=True)
    cam = cam.abs() if absolute else cam.relu()
    return functional.interpolate(cam, x.shape[-2:], mode="bilinear", align_corners=False)


def heat_of(difference: Tensor, *, kind: str = "signed", smooth: float = 0.0) -> Map:
    """Bring a difference [C, H, W] to a map [H, W] in [0, 1] of its own range.

    Args:
        difference: its channels are summed.
        kind: "signed"; "positive", where what is darker than without a lesion becomes 0; or
            "absolute", where that counts like what is brighter, in every channel.
        smooth: standard deviation of a Gaussian filter, in pixels.
    """
    summed = (difference.abs() if kind == "absolute" else difference).sum(dim=0).double().numpy()
    if smooth:
        summed = ndimage.gaussian_filter(summed, smooth)
    if kind == "positive":
        summed = np.maximum(summed, 0)
    spread = np.ptp(summed)
    scaled = (summed - summed.min()) / spread if spread > 0 else np.zeros_like(summed)
    return np.asarray(scaled, dtype=np.float32)


def mask_of(
    heat: Map, *, cut_at: float = 0.0, cuts: int = 1, largest: int = 0, fill_holes: bool = False
) -> Mask:
    """Cut a map [H, W] by Otsu's threshold (1979) or a given one: what lies above, bool [H, W].

    A constant map gives an empty mask. Values that differ by rounding alone are not cut again.

    Args:
        heat: one image's, in [0, 1].
        cut_at: the threshold; 0 for Otsu's.
        cuts: how often Otsu's is taken; a further one is that of the values above the one before.
        largest: keep only the largest component, 4- or 8-connected; 0 for all.
        fill_holes: fill what the mask encloses.
    """
    mask = np.full(heat.shape, np.ptp(heat) > 0)
    if cut_at:
        mask &= heat > cut_at
    for _ in range(0 if cut_at else cuts):
        if mask.any() and np.ptp(heat[mask]) > BINS * np.spacing(heat[mask].max()):
            mask = np.asarray(heat > threshold_otsu(heat[mask], nbins=BINS))
    return clean(mask, largest=largest, fill_holes=fill_holes)
