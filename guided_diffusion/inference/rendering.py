"""A result per class: soft maps, areas, components, uncertainty and overlay.

Where everything is one class, each function gives a single map without a class in its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from guided_diffusion.data.classes import Classes, each
from guided_diffusion.data.datasets import Case
from guided_diffusion.ensemble import UNCERTAINTIES, disagreement
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.report.canvas import Pixels
from guided_diffusion.report.pictures import MOST_LABELS, class_overlay, overlay, strip
from guided_diffusion.scoring.components import Component, find_components


def class_columns(classes: Classes | None) -> list[str]:
    """The columns of each class: areas, of declared classes, and members by component."""
    areas = [] if classes is None else [f"area{end}" for _, end in each(classes)]
    return areas + [f"component_shares{end}" for _, end in each(classes)]


def components_of(result: Segmentation) -> list[list[Component]]:
    """The largest components of each class's mask, and how many members contain each.

    Empty with a single member, which contains nearly all by itself.
    """
    if len(result.members) < 2:
        return [[] for _ in each(result.classes)]
    if result.classes is None:
        masks, members = result.mask.numpy()[None], (result.members >= 0.5).numpy()[:, None]
    else:
        masks = result.mask.numpy()
        members = np.stack([result.classes.masks(member.numpy()) for member in result.members])
    return [find_components(mask, members[:, k], most=MOST_LABELS) for k, mask in enumerate(masks)]


def measured(result: Segmentation) -> dict[str, Any]:
    """Area of the foreground and of each declared class, and how far the members disagree.

    The disagreement is the mean over the classes. Of each class's components, the largest first,
    the share of members that contain it.
    """
    size = result.fused.shape[-2:]
    masks = result.mask.reshape(-1, *size)
    members = result.members.reshape(len(result.members), -1, *size)
    apart = [disagreement(members[:, k]) for k, _ in each(result.classes)]
    components = components_of(result)
    return {
        **{f"area{end}": int(masks[k].sum()) for k, end in each(result.classes)},
        **{
            f"component_shares{end}": " ".join(f"{c.found / len(members):g}" for c in components[k])
            for k, end in each(result.classes)
        },
        "area": int(masks.any(dim=0).sum()),
        "disagreement": round(sum(apart) / len(apart), 4),
        "uncertainty": round(float(combined_uncertainty(result).mean()), 6),
    }


def spreads(result: Segmentation) -> dict[str, float]:
    """How far members of the same weights disagree, and members of different ones.

    Both are means over all such pairs, and over the classes. Empty for members of one.
    """
    if not result.per_weights:
        return {}
    members = result.members.reshape(len(result.members), -1, *result.members.shape[-2:])
    classes = [members[:, k] for k, _ in each(result.classes)]
    total = sum(_summed(masks) for masks in classes) / len(classes)
    own = [_summed(part) for masks in classes for part in masks.split([*result.per_weights])]
    within, pairs = sum(own) / len(classes), sum(map(_pairs, result.per_weights))
    return {
        "within_weights": round(within / max(pairs, 1), 4),
        "between_weights": round((total - within) / (_pairs(len(members)) - pairs), 4),
    }


def _summed(masks: Tensor) -> float:
    """The sum of the disagreement over all pairs of [E, H, W]."""
    return disagreement(masks) * _pairs(len(masks))


def _pairs(count: int) -> float:
    return count * (count - 1) / 2


def combined_uncertainty(result: Segmentation) -> Tensor:
    """The uncertainty [H, W]: of declared classes the largest."""
    return result.uncertainty if result.classes is None else result.uncertainty.amax(dim=0)


def soft_maps(result: Segmentation, *, members: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Fused mask, coarse mask and members [H, W] of every class, by the end of their file's name.

    Networks without a coarse mask have no such map. Of the members, the first so many; None for
    all.
    """
    size = result.fused.shape[-2:]
    for k, end in each(result.classes):
        yield f"output_ens{end}", result.fused.reshape(-1, *size)[k]
        if result.coarse is not None:
            yield f"coarse{end}", result.coarse.reshape(-1, *size)[k]
        for index, member in enumerate(result.members[:members]):
            yield f"output{index}{end}", member.reshape(-1, *size)[k]


def draw_strip(case: Case, result: Segmentation, channels: Sequence[str] = ()) -> Pixels:
    """Every channel, the truth, the fused mask and every member in grey, uint8 [h, w, 3].

    ``channels`` are the names of the image's.
    """
    names = channels or [f"channel {index}" for index in range(len(case.image))]
    panels = dict(zip(names, map(_stretched, case.image), strict=True))
    for k, end in each(result.classes):
        if case.mask is not None:
            panels[f"truth{end}"] = case.mask[k]
    panels |= dict(soft_maps(result))
    return strip(list(panels.values()), list(panels), title=case.name, columns=len(names))


def _stretched(channel: Tensor) -> Tensor:
    """A channel [H, W] of any range, between its least and its largest value."""
    low, high = channel.aminmax()
    return (channel - low) / (high - low).clamp(min=1e-12)


def draw_overlay(case: Case, result: Segmentation) -> Pixels:
    """Image, truth, fused mask and uncertainty side by side, uint8 [h, w, 3]."""
    image, unsure = case.image.numpy(), combined_uncertainty(result).numpy()
    scale, members = (result.measure, UNCERTAINTIES[result.measure].most), len(result.members)
    truth = None if case.mask is None else (case.mask >= 0.5).numpy()
    components = components_of(result)
    if result.classes is None:
        return overlay(
            image,
            None if truth is None else truth[0],
            result.fused.numpy(),
            unsure,
            name=case.name,
            members=members,
            components=components[0],
            scale=scale,
        )
    order = result.classes.painted
    return class_overlay(
        image,
        None if truth is None else truth[order],
        result.mask.numpy()[order],
        unsure,
        classes=[result.classes.names[k] for k in order],
        name=case.name,
        members=members,
        components=[components[k] for k in order],
        scale=scale,
    )
