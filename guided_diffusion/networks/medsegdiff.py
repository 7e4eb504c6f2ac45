"""MedSegDiff: the U-Net with the highway as condition network, in its two published versions.

Wu et al. (2023). ``--version new`` (:class:`AnchoredUNet`) adds anchors, which are feature maps of
the highway, to the first feature map. In ``--version 1`` (:class:`HighwayUNet`) features of the
U-Net gate the highway, and the highway's deepest map is added to the U-Net's. All tensors of the
plain U-Net keep their names; those of the highway are ``hwm.*``.
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
"""Channels of the concatenated anchors: 32, the same 32 again, and 64."""
_SECOND_OF_GATES = "hwm.conv_trans_blocks_b."
_ONCE_RANDOM = ("highway_embedding.", "hwm.conv_trans_blocks_a.", _SECOND_OF_GATES)


@dataclass(frozen=True, eq=False)
class AnchoredCondition(Condition):
    """The condition of :class:`AnchoredUNet`; its stem includes the anchors.

    Attributes:
        coarse: the highway's mask, float32 [B, K, H, W] in (0, 1).
    """

    coarse: Tensor


class AnchoredUNet(UNetModel):
    """The network of ``--version new``: the highway runs once per image, before the first step.

    Args:
        unet: the arguments of :class:`guided_diffusion.unet.UNetModel`, by keyword.

    If the first level has 128 channels, as in published weights, the anchors are added unchanged,
    otherwise through a learned projection. The diffusion loss has no gradient into the highway,
    which learns from the loss of its coarse mask alone.
    """

    def __init__(self, **unet: Any) -> None:
        super().__init__(**unet)
        self.hwm = Highway(self.in_channels - self.mask_channels, self.mask_channels)
        width = self.widths[0]
        self.project_anchors = (
            nn.Identity() if width == ANCHORS else nn.Conv2d(ANCHORS, width, 1, bias=False)
        )

    def encode(self, image: Tensor) -> AnchoredCondition:
        """Compute what depends on the image alone: the whole highway.

        Args:
            image: [B, C, H, W]; H and W multiples of 32.
        """
        highway = self.hwm(self.hwm.enter(image))
        *_, third, second, _ = highway.decoded
        narrow, wide = (
            F.interpolate(m.detach(), size=image.shape[-2:], mode="bilinear", align_corners=False)
            for m in (second, third)
        )
        anchors = self.project_anchors(torch.cat([narrow, narrow, wide], dim=1))
        return AnchoredCondition(super().encode(image).stem + anchors, highway.coarse)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: AnchoredCondition,  # type: ignore[override]
        y: Tensor | None = None,
    ) -> Output:
        """Predict from a noisy mask, as the plain network does; add the image's coarse mask."""
        return Output(super().forward(x, t, condition, y).raw, condition.coarse)


@dataclass(frozen=True, eq=False)
class HighwayCondition(Condition):
    """The condition of :class:`HighwayUNet`.

    Attributes:
        first: the highway's map before its first gate, [B, 32, H, W].
    """

    first: Tensor


class HighwayUNet(UNetModel):
    """The network of ``--version 1``: U-Net and highway exchange features at every step.

    Args:
        unet: the arguments of :class:`guided_diffusion.unet.UNetModel`, by keyword.

    The input maps of the U-Net's second to fifth level, as far as there are any, gate the highway;
    the highway's deepest map is projected and added to the U-Net's. Published networks drew that
    projection at random in every call, those of January 2023 also the convolutions of the gates;
    here they are parameters.
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
        """Predict from a noisy mask [B, K, H, W] at timesteps [B], with this step's coarse mask."""
        emb = self.embed(t, y)
        skips = self.contract(self.enter(x, condition), emb)
        gating = skips[self.num_res_blocks + 1 :: self.num_res_blocks + 1]
        highway = self.hwm(condition.first, gating[: len(WIDTHS) - 2])

        added, deepest = self.highway_embedding(highway.bottleneck), skips[-1]
        if added.shape != deepest.shape:
            added = F.interpolate(added, deepest.shape[-2:], mode="bilinear", align_corners=False)
        return Output(self.expand(deepest + added, skips, emb), highway.coarse)

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Complete published weights with the mean of what the published code drew at random.

        The projection and the products of the gates had mean zero, so both become 0. In each gate
        the first convolution is 0 and the second a constant 1, so that training can open it.
        Filters for another image size are interpolated.
        """
        adapted = dict(weights)
        for name, value in self.state_dict().items():
            if name not in weights and name.startswith(_ONCE_RANDOM):
                constant = name.startswith(_SECOND_OF_GATES) and name.endswith(".bias")
                adapted[name] = torch.full_like(value, float(constant))
            elif name.endswith(".complex_weight") and weights[name].shape[3:] == (2,):
                size = (value.shape[1], 2 * (value.shape[2] - 1))
                adapted[name] = interpolate_spectrum(weights[name], size)
        return adapted
