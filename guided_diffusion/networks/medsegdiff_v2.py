"""MedSegDiff-V2: a condition U-Net, connected to the diffusion U-Net in space and in the spectrum.

Wu et al. (2024), ``--version 2``. A condition U-Net reads the image. Its last feature map, smoothed
by a Gaussian, gates the first map of the diffusion U-Net (uncertain spatial attention); its deepest
map and the diffusion U-Net's pass through a stack of SS-Former blocks (``ss_former``); its coarse
mask is trained with an anchor loss (``losses.coarse_dice_ce``). The paper has no public code. What
it leaves open is chosen here as follows:

* the condition U-Net has the levels and widths of the diffusion U-Net, so that the two deepest
  embeddings have one shape; two convolutions per level with group normalisation, no attention;
* the diffusion loss trains the condition U-Net through both connections: the two are one model;
* the input of the diffusion U-Net is the noisy mask alone; f_d^0 is the output of its first
  convolution;
* the learnable Gaussian has one width per channel, initially 1 pixel, a radius of 3 pixels, and
  replicates the border;
* the sine is taken of the real part of the product of two spectra, the second one conjugated, since
  a sine of complex numbers grows exponentially; the product is divided by the square root of the
  number of channels;
* F^-1(M) is the operator on maps whose spectrum is M, divided by the square root of the number of
  frequencies;
* one head; queries, keys and values are normalised by groups before their projections, which have
  no bias;
* the MLP refines the sum of attention and value: c0 in the first attention of a block, e in the
  second; it has one hidden layer of twice the width;
* each attention has a band-pass filter. Its coordinates are the vertical and horizontal frequency
  and their distance from zero; two convolutions with 32 channels and a sigmoid map them to the gain
  of each frequency; an element of M is multiplied by the gains of its two frequencies;
* w starts at 1, the filters nearly open, and the result of the last block is added to the deepest
  embedding through a convolution that starts at 0, so that a new network begins without it;
* t = 0 mod alpha is evaluated per image of a batch, alpha = 5, beta = 10; Dice has one added to
  numerator and denominator;
* two SS-Former blocks (``--ss_blocks``).

M has (h * w)^2 elements for a deepest map of h x w: choose the depth so that this is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.networks.ss_former import SSFormerBlock
from guided_diffusion.nn import Downsample, GroupNorm32, Output, Upsample, maybe_checkpoint, zeroed
from guided_diffusion.unet import Condition, UNetModel

_RADIUS = 3
"""Radius of the Gaussian's kernel in pixels."""


class ConditionOutput(NamedTuple):
    """The output of the condition U-Net for an image.

    Attributes:
        last: last decoder feature f_c^-1, [B, C_0, H, W].
        deepest: c0, [B, C_n, H / 2^n, W / 2^n].
        coarse: the coarse mask, float32 [B, K, H, W] in (0, 1).
    """

    last: Tensor
    deepest: Tensor
    coarse: Tensor


class ConditionUNet(nn.Module):
    """The U-Net that reads the image.

    Args:
        in_channels: channels of the image.
        mask_channels: K.
        widths: channels of each level, finest first; multiples of 32.
        checkpoint_levels: so many of the finest levels recompute activations to save memory.
    """

    def __init__(
        self,
        in_channels: int,
        mask_channels: int,
        widths: Sequence[int],
        *,
        checkpoint_levels: int = 0,
    ) -> None:
        super().__init__()
        channels = [in_channels, *widths]
        self.contracting = nn.ModuleList(
            ConvBlock(i, o, level < checkpoint_levels)
            for level, (i, o) in enumerate(pairwise(channels))
        )
        self.halving = nn.ModuleList(Downsample(width) for width in widths[:-1])
        self.doubling = nn.ModuleList(Upsample(width) for width in widths[:0:-1])
        self.expanding = nn.ModuleList(
            ConvBlock(widths[level + 1] + widths[level], widths[level], level < checkpoint_levels)
            for level in reversed(range(len(widths) - 1))
        )
        self.out = nn.Conv2d(widths[0], mask_channels, 1)

    def forward(self, image: Tensor) -> ConditionOutput:
        """Encode and decode images [B, C, H, W]; H and W divisible by 2^(number of halvings)."""
        skips = [self.contracting[0](image)]
        for halve, block in zip(self.halving, self.contracting[1:], strict=True):
            skips.append(block(halve(skips[-1])))

        h = deepest = skips.pop()
        for double, block in zip(self.doubling, self.expanding, strict=True):
            h = block(torch.cat([double(h), skips.pop()], dim=1))
        return ConditionOutput(h, deepest, self.out(h).float().sigmoid())


class ConvBlock(nn.Module):
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
        return maybe_checkpoint(self.use_checkpoint, self.layers, x)


class UncertainSpatialAttention(nn.Module):
    """U-SA: turns the condition's last feature into a gate, with the paper's relaxed anchor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_width = nn.Parameter(torch.zeros(channels))
        self.reduce = nn.Conv2d(channels, 1, 1)

    def relax(self, feature: Tensor) -> Tensor:
        """f_anc = max(f_c * k_Gauss, f_c), [B, C, H, W]: widen the regions of high activation."""
        return torch.maximum(gaussian_blur(feature, self.log_width.exp()), feature)

    def forward(self, feature: Tensor) -> Tensor:
        """sigmoid(conv1x1(f_anc)): the gate [B, 1, H, W] in (0, 1) of f_c^-1 [B, C, H, W]."""
        return torch.sigmoid(self.reduce(self.relax(feature)))


def constrain(feature: Tensor, gate: Tensor) -> Tensor:
    """f_d' = gate . f_d + f_d: [B, C, H, W] and [B, 1, H, W]."""
    return gate * feature + feature


def gaussian_blur(x: Tensor, width: Tensor) -> Tensor:
    """Blur each channel of [B, C, H, W] by a Gaussian with standard deviations [C] in pixels.

    The kernel ends at 3 pixels and sums to 1; the border is replicated.
    """
    channels, offset = x.shape[1], torch.arange(-_RADIUS, _RADIUS + 1, device=x.device)
    kernel = torch.softmax(-(offset**2) / (2 * width[:, None] ** 2), dim=-1).to(x.dtype)
    x = F.pad(x, (_RADIUS,) * 4, mode="replicate")
    x = F.conv2d(x, kernel[:, None, :, None], groups=channels)
    return F.conv2d(x, kernel[:, None, None, :], groups=channels)


@dataclass(frozen=True, eq=False)
class SpectrumCondition(Condition):
    """The condition of :class:`SpectrumUNet`.

    Attributes:
        gate: weights of the first map's pixels, [B, 1, H, W] in (0, 1).
        deepest: c0, [B, C_n, h, w].
        coarse: the condition U-Net's mask, float32 [B, K, H, W] in (0, 1).
    """

    gate: Tensor
    deepest: Tensor
    coarse: Tensor


class SpectrumUNet(UNetModel):
    """The network of ``--version 2``.

    Args:
        in_channels: image channels plus mask channels.
        mask_channels: K.
        ss_blocks: number of SS-Former blocks.
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
            checkpoint_levels=self.style.checkpoint_levels if self.style.use_checkpoint else 0,
        )
        self.spatial_attention = UncertainSpatialAttention(self.widths[0])
        self.ss_former = nn.ModuleList(
            SSFormerBlock(deepest, 4 * self.model_channels) for _ in range(ss_blocks)
        )
        self.join = zeroed(nn.Conv2d(deepest, deepest, 1))

    def encode(self, image: Tensor) -> SpectrumCondition:
        """Compute what depends on the image alone: all of the condition U-Net, and the gate.

        Args:
            image: [B, C, H, W]; H and W divisible by 2^(number of halvings).
        """
        output = self.condition_net(image)
        gate = self.spatial_attention(output.last)
        stem = super().encode(image[:, :0]).stem  # the first convolution reads the mask alone
        return SpectrumCondition(stem, gate, output.deepest, output.coarse)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: SpectrumCondition,  # type: ignore[override]
        y: Tensor | None = None,
    ) -> Output:
        """Predict from a noisy mask [B, K, H, W] at timesteps [B]; add the image's coarse mask."""
        emb = self.embed(t, y)
        first = constrain(self.enter(x, condition), condition.gate)
        skips = self.contract(first, emb)

        recompute = self.style.at_level(len(self.widths) - 1).use_checkpoint
        deepest, joined = skips[-1], condition.deepest
        for block in self.ss_former:
            joined = maybe_checkpoint(recompute, block, joined, deepest, emb)
        raw = self.expand(deepest + self.join(joined), skips, emb)
        return Output(raw, condition.coarse)
