"""MedSegDiff-V2: a condition U-Net joined with the diffusion U-Net in space and in its spectrum.

Wu et al. (2024), ``--version 2``. A condition U-Net reads the image. Its last feature map, relaxed
by a Gaussian, tells the diffusion U-Net where to look (uncertain spatial attention); its deepest
meets the diffusion U-Net's deepest in a stack of SS-Former blocks (``ss_former``); its own mask is
trained by an anchor loss (``losses.coarse_dice_ce``). The paper has no public code. What it leaves
open, and what is chosen here:

* the condition U-Net has the levels and widths of the diffusion U-Net, so that the two deepest
  embeddings have one shape; two convolutions a level with group normalisation, no attention;
* the diffusion loss reaches the condition U-Net through both joints: the two are one model;
* the diffusion U-Net is shown the noisy mask alone; f_d^0 is what its first convolution gives;
* the learnable Gaussian has one width per channel, 1 pixel at the start, reaches 3 pixels, and
  repeats the border;
* of a product of two spectra the sine takes the real part, with the second one conjugated: a sine
  of complex numbers grows exponentially. It is divided by the root of the channels;
* F^-1(M) is the operator on maps whose spectrum is M, divided by the root of the frequencies;
* one head; queries, keys and values are normalised by groups before their projections, which have
  no bias;
* the MLP refines the sum of what was attended and what was asked about: c0 in the first attention
  of a block, e in the second; it has one hidden layer of twice the width;
* each attention has a band-pass filter of its own. Its coordinates are the frequency down, across,
  and its distance from the mean; two convolutions of 32 channels and a sigmoid make of them the
  pass of each; an element of M passes by the product of its two frequencies;
* w starts at 1, the filters nearly open, and the result of the last block is added to the deepest
  embedding through a convolution that starts at 0: a new network begins without it;
* t = 0 mod alpha is asked of each image of a batch, alpha = 5, beta = 10; Dice has one pixel added
  to both sides;
* two SS-Former blocks (``--ss_blocks``).

M has (h * w)^2 elements for a deepest map of h x w: choose the depth so that this is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from guided_diffusion.networks.ss_former import SSFormerBlock
from guided_diffusion.nn import Downsample, GroupNorm32, Output, Upsample, zeroed
from guided_diffusion.unet import Condition, UNetModel

_REACH = 3
"""Pixels that the Gaussian reaches in each direction."""


class Understanding(NamedTuple):
    """What the condition U-Net makes of an image.

    Attributes:
        last: last decoder feature f_c^-1, [B, C_0, H, W].
        deepest: c0, [B, C_n, H / 2^n, W / 2^n].
        coarse: its own mask, float32 [B, K, H, W] in (0, 1).
    """

    last: Tensor
    deepest: Tensor
    coarse: Tensor


class ConditionUNet(nn.Module):
    """The condition model.

    Args:
        in_channels: channels of the image.
        mask_channels: K.
        widths: channels of each level, finest first; multiples of 32.
        use_checkpoint: recompute activations to save memory.
    """

    def __init__(
        self, in_channels: int, mask_channels: int, widths: Sequence[int], *, use_checkpoint: bool
    ) -> None:
        super().__init__()
        channels = [in_channels, *widths]
        self.contracting = nn.ModuleList(
            Convolutions(i, o, use_checkpoint) for i, o in pairwise(channels)
        )
        self.halving = nn.ModuleList(Downsample(width) for width in widths[:-1])
        self.doubling = nn.ModuleList(Upsample(width) for width in widths[:0:-1])
        self.expanding = nn.ModuleList(
            Convolutions(deep + fine, fine, use_checkpoint) for deep, fine in pairwise(widths[::-1])
        )
        self.out = nn.Conv2d(widths[0], mask_channels, 1)

    def forward(self, image: Tensor) -> Understanding:
        """Read images [B, C, H, W]; H and W divisible by 2 to the number of halvings."""
        skips = [self.contracting[0](image)]
        for halve, block in zip(self.halving, self.contracting[1:], strict=True):
            skips.append(block(halve(skips[-1])))

        h = deepest = skips.pop()
        for double, block in zip(self.doubling, self.expanding, strict=True):
            h = block(torch.cat([double(h), skips.pop()], dim=1))
        return Understanding(h, deepest, self.out(h).float().sigmoid())


class Convolutions(nn.Module):
    """Two times convolution, group normalisation, SiLU."""

    def __init__(self, channels: int, out_channels: int, use_checkpoint: bool) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.layers = nn.Sequential(
            nn.Conv2d(channels, out_channels, 3, padding=1),
            GroupNorm32(out_channels),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            GroupNorm32(out_channels),
            nn.SiLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C_out, h, w]."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self.layers, x, use_reentrant=False))
        return cast(Tensor, self.layers(x))


class UncertainSpatialAttention(nn.Module):
    """U-SA: the anchor, relaxed, and the gate it becomes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_width = nn.Parameter(torch.zeros(channels))
        self.reduce = nn.Conv2d(channels, 1, 1)

    def relax(self, feature: Tensor) -> Tensor:
        """f_anc = max(f_c * k_Gauss, f_c), [B, C, H, W]: widen what the condition is sure of."""
        return torch.maximum(gaussian_blur(feature, self.log_width.exp()), feature)

    def forward(self, feature: Tensor) -> Tensor:
        """sigmoid(conv1x1(f_anc)): the gate [B, 1, H, W] in (0, 1) of f_c^-1 [B, C, H, W]."""
        return torch.sigmoid(self.reduce(self.relax(feature)))


def constrain(feature: Tensor, gate: Tensor) -> Tensor:
    """f_d' = gate . f_d + f_d: [B, C, H, W] and [B, 1, H, W]."""
    return gate * feature + feature


def gaussian_blur(x: Tensor, width: Tensor) -> Tensor:
    """Blur each channel of [B, C, H, W] by a Gaussian of its own standard deviation [C], in pixels.

    The kernel is cut at 3 pixels and sums to 1; the border is repeated.
    """
    channels, place = x.shape[1], torch.arange(-_REACH, _REACH + 1, device=x.device)
    kernel = torch.softmax(-(place**2) / (2 * width[:, None] ** 2), dim=-1).to(x.dtype)
    x = F.pad(x, (_REACH,) * 4, mode="replicate")
    x = F.conv2d(x, kernel[:, None, :, None], groups=channels)
    return F.conv2d(x, kernel[:, None, None, :], groups=channels)


@dataclass(frozen=True, eq=False)
class SpectrumCondition(Condition):
    """What :class:`SpectrumUNet` knows of the image.

    Attributes:
        gate: where the diffusion U-Net is to look, [B, 1, H, W] in (0, 1).
        deepest: c0, [B, C_n, h, w].
        coarse: the condition U-Net's own mask, float32 [B, K, H, W] in (0, 1).
    """

    gate: Tensor
    deepest: Tensor
    coarse: Tensor


class SpectrumUNet(UNetModel):
    """The network of ``--version 2``.

    Args:
        in_channels: image channels plus mask channels.
        mask_channels: K.
        ss_blocks: SS-Former blocks.
        unet: the other arguments of :class:`guided_diffusion.unet.UNetModel`, by keyword.
    """

    def __init__(
        self, *, in_channels: int, mask_channels: int = 1, ss_blocks: int = 2, **unet: Any
    ) -> None:
        super().__init__(in_channels=mask_channels, mask_channels=mask_channels, **unet)
        self.in_channels = in_channels
        deepest = self.widths[-1]
        self.condition_net = ConditionUNet(
            self.in_channels - self.mask_channels,
            self.mask_channels,
            self.widths,
            use_checkpoint=self.use_checkpoint,
        )
        self.spatial_attention = UncertainSpatialAttention(self.widths[0])
        self.ss_former = nn.ModuleList(
            SSFormerBlock(deepest, 4 * self.model_channels) for _ in range(ss_blocks)
        )
        self.join = zeroed(nn.Conv2d(deepest, deepest, 1))

    def encode(self, image: Tensor) -> SpectrumCondition:
        """Compute what depends on the image alone: all of the condition U-Net, and the gate.

        Args:
            image: [B, C, H, W]; H and W divisible by 2 to the number of halvings.
        """
        seen = self.condition_net(image)
        gate = self.spatial_attention(seen.last)
        unseen = super().encode(image[:, :0]).stem
        return SpectrumCondition(unseen, gate, seen.deepest, seen.coarse)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: SpectrumCondition,  # type: ignore[override]
        y: Tensor | None = None,
    ) -> Output:
        """Predict from a noisy mask [B, K, H, W] at times [B]; the coarse mask is the image's."""
        emb = self.embed(t, y)
        first = constrain(self.enter(x, condition), condition.gate)
        skips = self.contract(first, emb)

        deepest, joined = skips[-1], condition.deepest
        for block in self.ss_former:
            if self.use_checkpoint and torch.is_grad_enabled():
                joined = checkpoint(block, joined, deepest, emb, use_reentrant=False)
            else:
                joined = block(joined, deepest, emb)
        raw = self.expand(deepest + self.join(joined), skips, emb)
        return Output(raw, condition.coarse)
