"""MedSegDiff: the U-Net joined with the highway, as its two published versions join them.

Wu et al. (2023). ``--version new`` (:class:`AnchoredUNet`) adds anchors, the highway's feature
maps, to the first feature map. ``--version 1`` (:class:`HighwayUNet`) lets the features of the
U-Net gate the highway and adds the highway's deepest map to its own. All tensors of the plain
U-Net keep their names; those of the highway are ``hwm.*``. Built by ``script_util``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.networks.highway import WIDTHS, Highway, interpolate_spectrum
from guided_diffusion.nn import Output, zeroed
from guided_diffusion.unet import Condition, UNetModel

ANCHORS = 128
"""Channels of the anchors side by side: 32, the same 32 again, and 64."""
_SECOND_OF_GATES = "hwm.conv_trans_blocks_b."
_ONCE_RANDOM = ("highway_embedding.", "hwm.conv_trans_blocks_a.", _SECOND_OF_GATES)


@dataclass(frozen=True, eq=False)
class AnchoredCondition(Condition):
    """What :class:`AnchoredUNet` knows of the image; its stem holds the anchors as well.

    Attributes:
        coarse: the highway's own mask, float32 [B, K, H, W] in (0, 1).
    """

    coarse: Tensor


class AnchoredUNet(UNetModel):
    """The network of ``--version new``: the highway speaks once per image, before the first step.

    Args:
        unet: the arguments of :class:`guided_diffusion.unet.UNetModel`, by keyword.

    A first level of 128 channels takes the anchors as they are, as published weights do; any other
    width has a learned projection of them. The diffusion loss does not reach the highway, which
    learns from its coarse mask alone.
    """

    def __init__(self, **unet: Any) -> None:
        super().__init__(**unet)
        self.hwm = Highway(self.in_channels - self.mask_channels, self.mask_channels)
        width = self.widths[0]
        self.project_anchors = (
            nn.Identity() if width == ANCHORS else nn.Conv2d(ANCHORS, width, 1, bias=False)
        )

    def encode(self, image: Tensor) -> AnchoredCondition:
        """Compute what depends on the image alone: everything of the highway.

        Args:
            image: [B, C, H, W]; H and W multiples of 32.
        """
        seen = self.hwm(self.hwm.enter(image))
        *_, third, second, _ = seen.decoded
        narrow, wide = (
            F.interpolate(m.detach(), size=image.shape[-2:], mode="bilinear", align_corners=False)
            for m in (second, third)
        )
        anchors = self.project_anchors(torch.cat([narrow, narrow, wide], dim=1))
        return AnchoredCondition(super().encode(image).stem + anchors, seen.coarse)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: AnchoredCondition,  # type: ignore[override]
        y: Tensor | None = None,
    ) -> Output:
        """Predict from a noisy mask, as the plain network does; the coarse mask is the image's."""
        return Output(super().forward(x, t, condition, y).raw, condition.coarse)


@dataclass(frozen=True, eq=False)
class HighwayCondition(Condition):
    """What :class:`HighwayUNet` knows of the image before the first step.

    Attributes:
        first: the highway's map up to its first gate, [B, 32, H, W].
    """

    first: Tensor


class HighwayUNet(UNetModel):
    """The network of ``--version 1``: U-Net and highway speak to each other at every step.

    Args:
        unet: the arguments of :class:`guided_diffusion.unet.UNetModel`, by keyword.

    The feature maps with which the U-Net enters its second to fifth level (as far as it has them)
    gate the highway; the highway's deepest map, projected, is added to the U-Net's. Published
    networks drew that projection anew in every call, those of January 2023 the convolutions of
    the gates as well; here they are parameters.
    """

    def __init__(self, **unet: Any) -> None:
        super().__init__(**unet)
        self.hwm = Highway(
            self.in_channels - self.mask_channels,
            self.mask_channels,
            gate_channels=self.widths[:-1][: len(WIDTHS) - 2],
            image_size=self.image_size,
        )
        self.highway_embedding = zeroed(nn.Conv2d(WIDTHS[-1], self.widths[-1], 1))

    def encode(self, image: Tensor) -> HighwayCondition:
        """Compute what depends on the image alone: the highway up to its first gate.

        Args:
            image: [B, C, H, W]; H and W multiples of 32.
        """
        return HighwayCondition(super().encode(image).stem, self.hwm.enter(image))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: HighwayCondition,  # type: ignore[override]
        y: Tensor | None = None,
    ) -> Output:
        """Predict from a noisy mask [B, K, H, W] at times [B]; the coarse mask is of this step."""
        emb = self.embed(t, y)
        skips = self.contract(self.enter(x, condition), emb)
        entering = skips[self.num_res_blocks + 1 :: self.num_res_blocks + 1]
        seen = self.hwm(condition.first, entering[: len(WIDTHS) - 2])

        added, deepest = self.highway_embedding(seen.bottleneck), skips[-1]
        if added.shape != deepest.shape:
            added = F.interpolate(added, deepest.shape[-2:], mode="bilinear", align_corners=False)
        return Output(self.expand(deepest + added, skips, emb), seen.coarse)

    def adopt(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Complete published weights by the expectation of what they drew at random instead.

        The projection and the products of the gates had mean zero: both become 0. Of each gate the
        second convolution is a constant 1 and the first is 0, so that training can open it. Filters
        of another image size are interpolated.
        """
        adopted = dict(weights)
        for name, value in self.state_dict().items():
            if name not in weights and name.startswith(_ONCE_RANDOM):
                constant = name.startswith(_SECOND_OF_GATES) and name.endswith(".bias")
                adopted[name] = torch.full_like(value, float(constant))
            elif name in weights and name.endswith(".complex_weight"):
                size = (value.shape[1], 2 * (value.shape[2] - 1))
                adopted[name] = interpolate_spectrum(weights[name], size)
        return adopted
