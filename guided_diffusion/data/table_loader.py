"""The data sets of :data:`guided_diffusion.data.layout_table.TABLE`: pictures, slices and volumes.

The files of a case are found by :mod:`matching`. Several image files are the channels of one image,
as are the last axis of a file of four; several masks of a case are united, where its layout has
such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.data.dataset_json import json_notes
from guided_diffusion.data.datasets import AS_STORED, Entry, Reading, SegmentationDataset
from guided_diffusion.data.folders import counted, is_nifti, listing, safe_name
from guided_diffusion.data.geometry import Affine, place, plane_affine
from guided_diffusion.data.layout_table import Layout
from guided_diffusion.data.masks import MaskSet
from guided_diffusion.data.matching import Files, Found, Key, match, shown
from guided_diffusion.data.readers import (
    image_channels,
    nifti_shape,
    read_nifti_slice,
    read_picture,
)
from guided_diffusion.data.volumes import MEMORY, VolumeDataset, VolumeStore
from guided_diffusion.errors import UserError, refuse

Further = Mapping[str, tuple[Path, ...]]
"""The masks of a case beside its first one, by its name."""


class TablePictures(SegmentationDataset):
    """Pictures or slices of one file each: image [1 or 3, H, W], mask [K, H, W]."""

    def __init__(
        self,
        folder: Path,
        entries: Sequence[Entry],
        *,
        layout: str,
        channels: int,
        further: Further,
        reading: Reading = AS_STORED,
    ) -> None:
        self.layout = layout
        super().__init__(folder, entries, channels=channels, reading=reading)
        self.further = further
        if further:
            more = [path for paths in further.values() for path in paths]
            self.masks = MaskSet([*(entry.mask for entry in self.entries), *more], reading.classes)

    def read_mask(self, entry: Entry) -> Tensor | None:
        """Decode the masks of a case and unite them, float32 [K, H, W] in [0, 1]."""
        mask = super().read_mask(entry)
        for path in self.further.get(entry.name, ()):
            other = super().read_mask(entry._replace(mask=path))
            assert mask is not None and other is not None
            if mask.shape != other.shape:
                raise UserError(
                    path,
                    f"the mask has another size than {entry.mask}",
                    "Export all masks of an image at its size.",
                )
            mask = torch.maximum(mask, other)
        return mask


class TableStacks(TablePictures):
    """Pictures or slices of one file per channel: image [C, H, W]."""

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Stack the channels, float32 [C, H, W]; the first one's grid is that of all."""
        if not is_nifti(entry.images[0]):
            return _stacked(entry, [read_picture(path, channels=1) for path in entry.images]), None
        first, placed = read_nifti_slice(entry.images[0])
        self._last = entry.images[0], placed
        others = [read_nifti_slice(path, like=self._last)[0] for path in entry.images[1:]]
        return torch.from_numpy(np.stack([first, *others])), plane_affine(placed)


def _stacked(entry: Entry, channels: list[Tensor]) -> Tensor:
    for path, channel in zip(entry.images, channels, strict=True):
        if channel.shape != channels[0].shape:
            raise UserError(
                path,
                f"its size differs from that of {entry.images[0].name}",
                "Export all channels of an image at one size.",
            )
    return torch.cat(channels)


class TableVolumes(VolumeDataset):
    """Volumes of one file per channel, or of one file whose last of four axes is the channel."""

    def __init__(
        self,
        folder: Path,
        volumes: Sequence[Entry],
        *,
        layout: str,
        channels: int,
        reading: Reading = AS_STORED,
    ) -> None:
        self.layout = layout
        stores = []
        if len(volumes[0].images) < channels:
            stores = [
                VolumeStore(reading.cache_dir, channel=k, most_bytes=MEMORY // channels)
                for k in range(channels)
            ]
        super().__init__(
            folder, volumes, channels=channels, reading=reading, store=stores[0] if stores else None
        )
        self.stores = stores

    def read_image(self, entry: Entry) -> tuple[Tensor, Affine | None]:
        """Stack one plane of every channel, float32 [C, H, W]; the affine is that plane's."""
        if not self.stores:
            return super().read_image(entry)
        path = entry.images[0]
        placed = place(self.store.grid(path), self.plane)
        planes = [
            self._plane(path, entry, placed, scale=self.normalise, store=store)
            for store in self.stores
        ]
        return torch.from_numpy(np.stack(planes)), plane_affine(placed, entry.plane or 0)


class _Listed(NamedTuple):
    """The cases of a folder: their entries, further masks, and the channels' names."""

    entries: list[Entry]
    further: dict[str, tuple[Path, ...]]
    modalities: tuple[str, ...]


def open_layout(
    layout: Layout, files: Files, *, wanted: str, reading: Reading = AS_STORED
) -> SegmentationDataset | None:
    """Open the cases of a part of a folder by a layout; None where that has none.

    Args:
        layout: of the folder.
        files: in it.
        wanted: 'training', which needs a mask for every image, 'validation' or 'testing'. A folder
            without parts has cases for training and testing; testing takes those of validation,
            then all, where there are none.
        reading: how files are read.
    """
    found = match(layout, files, reading.modalities)
    if found.twice:
        first, second = (files.path(number) for number in found.twice[0])
        problem = f"{first.name} and {second} are both the image of one case"
        refuse(UserError(files.folder, problem, "Rename or remove one of them."))
    keys = _chosen(found, wanted)
    if keys is None:
        return None
    _require_masks(files, found, keys, needed=wanted == "training")
    listed = _listed(files, found, keys, reading)
    dataset = _opened(layout, files.folder, listed, reading)
    dataset.modalities = listed.modalities
    if layout.name in ("NNUNET", "MSD"):
        dataset.notes += json_notes(files.folder, one_class=reading.classes is None)
    if found.others:
        count, example = len(found.others), files.path(found.others[0]).relative_to(files.folder)
        dataset.notes.append(f"ignored {counted(count, 'file')}, such as {example}")
    return dataset


def _opened(layout: Layout, folder: Path, listed: _Listed, reading: Reading) -> SegmentationDataset:
    """The class for what the first image is: a picture, a slice or a volume."""
    entries = listed.entries
    axes, channels = 0, len(entries[0].images)
    if is_nifti(entries[0].images[0]):
        axes, last = _axes([entry.images[0] for entry in entries])
        channels = last if axes == 4 and channels == 1 else channels
    if axes > 2:
        if listed.further:
            name, paths = next(iter(listed.further.items()))
            problem = f"volume {name} has several masks, such as {paths[0].name}"
            raise UserError(folder, problem, "Unite them in one file.")
        volumes = [entry._replace(patient=entry.patient or entry.name) for entry in entries]
        return TableVolumes(folder, volumes, layout=layout.name, channels=channels, reading=reading)
    kind = TableStacks if channels > 1 else TablePictures
    if channels == 1:
        channels = image_channels([entry.images[0] for entry in entries])
    return kind(
        folder,
        entries,
        layout=layout.name,
        channels=channels,
        further=listed.further,
        reading=reading,
    )


def _axes(paths: Sequence[Path]) -> tuple[int, int]:
    """The number of axes of the first NIfTI file that can be read, and the length of the last."""
    for path in paths:
        with suppress(UserError):
            shape = nifti_shape(path)
            return len(shape), shape[-1]
    return 2, 1


def _chosen(found: Found, wanted: str) -> list[Key] | None:
    """The cases of a part."""
    for part in {"testing": ("testing", "validation")}.get(wanted, (wanted,)):
        keys = [key for key in found.images if found.parts.get(key) == part]
        if keys:
            return keys
    if wanted == "validation":
        return None
    plain = [key for key in found.images if key not in found.parts]
    return plain or (list(found.images) if wanted == "testing" else plain) or None


def _require_masks(files: Files, found: Found, keys: Sequence[Key], *, needed: bool) -> None:
    """Refuse images without a mask, where one is needed, and masks without an image."""
    layout = found.layout
    lonely = sorted(case for case, part in found.masks.keys() - found.images.keys())
    if lonely:
        problem = f"has {counted(len(lonely), 'mask')} without image: {listing(lonely)}"
        hint = f"Add the images as {shown(layout.images)}, or remove the masks."
        refuse(UserError(files.folder, problem, hint, cases=lonely))
    bare = sorted(key[0] for key in keys if key not in found.masks)
    if bare and needed:
        problem = f"has {counted(len(bare), 'image')} without mask: {listing(bare)}"
        hint = f"Add the masks as {shown(layout.masks)}, or remove the images."
        refuse(UserError(files.folder, problem, hint, cases=bare))
    if layout.united:
        return
    for key in keys:
        if len(masks := found.masks.get(key, [])) > 1:
            first, second = files.path(masks[0]), files.path(masks[1])
            problem = f"{first.name} and {second.name} are both the mask of {key[0]}"
            refuse(UserError(files.folder, problem, "Remove one of them.", cases=[key[0]]))


def _listed(files: Files, found: Found, keys: Sequence[Key], reading: Reading) -> _Listed:
    """Make the entries; every case must have all channels, as the data set has them."""
    several = found.layout.several
    names = sorted({name for key in keys for name in found.images[key]}, key=_rank)
    channels = reading.modalities if several == "modality" and reading.modalities else names
    entries, further = [], {}
    for key in keys:
        images = found.images[key]
        if missing := [name for name in channels if name not in images]:
            problem = f"case {key[0]} lacks {several} {', '.join(missing)}; the data set has "
            hint = "Add the file, or remove the case from the data set."
            error = UserError(files.folder, problem + ", ".join(channels), hint, cases=[key[0]])
            refuse(error)
            continue
        masks = [files.path(number) for number in found.masks.get(key, ())]
        name = safe_name(key[0])
        entries.append(
            Entry(
                name,
                tuple(files.path(images[channel]) for channel in channels),
                masks[0] if masks else None,
                patient=safe_name(found.patients[key]) if key in found.patients else "",
            )
        )
        if masks[1:]:
            further[name] = tuple(masks[1:])
    if not entries:
        problem = f"has no complete case of the {found.layout.name} layout"
        raise UserError(files.folder, problem, "Add the missing files.")
    _require_one_kind(entries)
    return _Listed(entries, further, tuple(channels) if several == "modality" else ())


def _rank(name: str) -> tuple[int, str]:
    """The order of channels: that of BraTS, then the alphabet's."""
    usual = ("t1", "t1ce", "t2", "flair")
    return (usual.index(name) if name in usual else len(usual), name)


def _require_one_kind(entries: Sequence[Entry]) -> None:
    """Refuse NIfTI files among pictures: their first axis is x, not y."""
    first = entries[0].images[0]
    kind = is_nifti(first)
    for entry in entries:
        for path in (*entry.images, *([entry.mask] if entry.mask else [])):
            if is_nifti(path) != kind:
                raise UserError(
                    path,
                    f"NIfTI files and pictures are mixed in one data set, as with {first.name}",
                    "Convert the images and masks to the same format.",
                )
