"""What a segmenter gives for a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from guided_diffusion.data.classes import Classes
from guided_diffusion.data.readers import Array


class Segmentation(NamedTuple):
    """The segmentation of a case, at its own size.

    A network of declared classes (``--mask_labels``) has a class axis before H, W in everything
    but ``labels``: [E, K, H, W] and [K, H, W].

    Attributes:
        members: the drawn masks, soft, float32 [E, H, W] in [0, 1].
        fused: the ensemble's mask, soft, float32 [H, W] in [0, 1]; the members are joined with the
            coarse mask first, as the plan says. Their spread is measured before that.
        uncertainty: by ``measure``, float32 [H, W]; the standard deviation lies in [0, 0.5].
        classes: what the channels are; None where everything is one class.
        measure: of the uncertainty: ``std``, ``variance`` or ``entropy``.
        coarse: the condition network's own mask, soft, float32 [H, W] in [0, 1]; None where the
            network has none.
        per_weights: how many of the members are of each of several weights, in their order; empty
            where all are of the same.
    """

    members: Tensor
    fused: Tensor
    uncertainty: Tensor
    classes: Classes | None = None
    measure: str = "std"
    coarse: Tensor | None = None
    per_weights: tuple[int, ...] = ()

    @property
    def mask(self) -> Tensor:
        """The binary mask, bool [H, W]: fused at least one half.

        Of classes that share no label only the likeliest of each pixel.
        """
        if self.classes is None:
            return self.fused >= 0.5
        return torch.from_numpy(self.classes.masks(self.fused.numpy()))

    @property
    def labels(self) -> Tensor:
        """The label map, uint8 [H, W]: 0 and the labels of the classes, or 0 and 1."""
        if self.classes is None:
            return self.mask.to(torch.uint8)
        return torch.from_numpy(self.classes.label_map(self.fused.numpy()))

    def turned(self, turn: Callable[[Array], Array]) -> Segmentation:
        """Turn the planes of all maps [..., H, W] alike."""
        members, fused, uncertainty, coarse = (
            values if values is None else torch.from_numpy(turn(values.numpy()).copy())
            for values in (self.members, self.fused, self.uncertainty, self.coarse)
        )
        assert members is not None and fused is not None and uncertainty is not None
        return self._replace(members=members, fused=fused, uncertainty=uncertainty, coarse=coarse)
