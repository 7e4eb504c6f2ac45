"""Predictions of other tools: masks under the names and in the layouts that truths are read in.

nnU-Net writes ``<case>.nii.gz`` and ``<case>.png``, label maps of 0 and 1 or 0 to K; others write
``<case>_seg.nii.gz``, ``masks/<case>.png`` or a folder for each rater, whose masks are then the
members. What their values mean is decided over all of them, as for truths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from guided_diffusion.bratsloader import named_since_2023
from guided_diffusion.data.classes import Classes
from guided_diffusion.data.folders import image_files
from guided_diffusion.data.masks import MaskSet
from guided_diffusion.data.truths import Truth
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_masks
from guided_diffusion.scoring.predictions import Found, Source, sources_in, volumes_of

OWN = ("_uncertainty", "_overlay", "_debug", "_output_ens")
"""Ends of the names of this suite's pictures that are no masks."""


def find_masks(
    folder: Path, classes: Classes | None, truths: Mapping[str, Truth], *, plane: str
) -> list[dict[str, Found]]:
    """List the masks in ``folder`` by case id, once for each class; none where there is no mask.

    Raises:
        UserError: the files are those of the truths, or cannot be listed.
    """
    number = 1 if classes is None else len(classes)
    there = _listed(folder, classes, plane)
    files = {
        truth.volume or name: tuple(
            member.source for member in truth.raters or (truth,) if member.source
        )
        for name, truth in there.items()
    }
    _refuse_truths(folder, files, truths)
    every = [path for paths in files.values() for path in paths]
    since_2023 = named_since_2023(path.name for path in every)
    masks = MaskSet(every, classes, brats="2023" if since_2023 else "")
    volumes, found = volumes_of(truths), dict[str, list[Source]]()
    for case, paths in files.items():
        for index, path in enumerate(paths):
            for (name, _), source in sources_in(case, index, path, masks, volumes):
                found.setdefault(name, []).append(replace(source, labels=True))
    return [
        {name: _one_class(sources, channel) for name, sources in found.items()}
        for channel in range(number)
    ]


def _listed(folder: Path, classes: Classes | None, plane: str) -> dict[str, Truth]:
    """What would be the truths of a folder; none where it has no mask, or other results."""
    pictures = image_files(folder)
    if any(stem.endswith(OWN) for stem in pictures):
        return {}
    try:
        return open_masks(folder, classes, plane=plane)
    except UserError:
        if pictures:
            raise
        return {}


def _one_class(sources: list[Source], channel: int) -> Found:
    """The single mask, or several as members."""
    own = tuple(replace(source, channel=channel) for source in sources)
    return Found(own[0], ()) if len(own) == 1 else Found(None, own)


def _refuse_truths(
    folder: Path, files: Mapping[str, tuple[Path, ...]], truths: Mapping[str, Truth]
) -> None:
    """Refuse to score the ground truth against itself."""
    own = (rater for truth in truths.values() for rater in truth.raters or (truth,))
    true = {truth.source.resolve() for truth in own if truth.source}
    same = next((p for paths in files.values() for p in paths if p.resolve() in true), None)
    if same:
        raise UserError(
            f"--inp_pth {folder}",
            f"holds the ground truth itself, such as {same.name}",
            "Pass the folder of the predicted masks.",
        )
