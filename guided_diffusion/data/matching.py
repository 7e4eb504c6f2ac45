"""Which files of a folder are the images and masks of a layout, by their names alone.

:class:`Files` lists a folder once; a layout is recognised by a few names of every folder in it, and
then matched with all.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from guided_diffusion.data.folders import ENDINGS, GIF, split_name, walk
from guided_diffusion.data.layout_table import (
    BARE,
    CURRENT_NAMES,
    NUMBERED,
    TABLE,
    Layout,
    part_of,
)

FEW_NAMES = 40
FEW_FOLDERS = 60
Key = tuple[str, str]
"""A case, and its part where the layout's masks have one, too."""


class Files(NamedTuple):
    """The images and masks that may be in a folder: each one's path below it, and its ending.

    ``paths`` are without ending, as :mod:`layout_table` matches them, and ``endings`` as stored;
    ``few`` are the positions of a few files of every folder.
    """

    folder: Path
    paths: list[str]
    endings: list[str]
    few: list[int]

    def path(self, number: int) -> Path:
        """The path of a file."""
        return self.folder / (self.paths[number] + self.endings[number])


@dataclass
class Found:
    """The files of a layout.

    ``images`` and ``masks`` are numbers of files by case: of an image, by the name of its channel;
    ``parts`` and ``patients`` are those of cases, where the names say them; ``others`` belong to
    nothing.
    """

    layout: Layout
    images: dict[Key, dict[str, int]] = field(default_factory=dict)
    masks: dict[Key, list[int]] = field(default_factory=dict)
    parts: dict[Key, str] = field(default_factory=dict)
    patients: dict[Key, str] = field(default_factory=dict)
    twice: list[tuple[int, int]] = field(default_factory=list)
    others: list[int] = field(default_factory=list)

    @property
    def pairs(self) -> bool:
        """Whether any image has a mask."""
        return not self.images.keys().isdisjoint(self.masks)


def files_below(folder: Path) -> Files:
    """List the pictures and NIfTI files in a folder and below it; nothing is opened."""
    listed = Files(folder, [], [], [])
    start = len(str(folder).rstrip("/")) + 1
    for count, (root, names) in enumerate(walk(folder)):
        before = f"{str(root)[start:]}/" if root != folder else ""
        _add(listed, before, names, few=count < FEW_FOLDERS)
    return listed


def only_files(folder: Path, names: Sequence[str]) -> Files:
    """List some files that are directly in a folder."""
    listed = Files(folder, [], [], [])
    _add(listed, "", names, few=True)
    return listed


def _add(listed: Files, before: str, names: Iterable[str], *, few: bool) -> None:
    first = len(listed.paths)
    for name in names:
        stem, ending = split_name(name)
        if ending in ENDINGS or ending == GIF:
            listed.paths.append(before + stem)
            listed.endings.append(name[len(stem) :])
    if few:
        listed.few.extend(range(first, min(first + FEW_NAMES, len(listed.paths))))


def match(
    layout: Layout, files: Files, modalities: Collection[str] = (), *, few: bool = False
) -> Found:
    """Match the names with a layout's patterns; ``few`` looks at a few of every folder.

    ``modalities`` are those that count, where the layout's images have any; empty for all.
    """
    found, is_mask, is_image = Found(layout), layout.mask.fullmatch, layout.image.fullmatch
    with_part = "{part}" in layout.masks
    for number in files.few if few else range(len(files.paths)):
        path = files.paths[number]
        if not path.isascii():
            path = unicodedata.normalize("NFC", path)
        hit = is_mask(path)
        if hit is not None:
            known = hit.groupdict() if with_part else {"case": hit.group("case")}
            key = known["case"], part_of(known.get("part"))
            found.masks.setdefault(key, []).append(number)
            continue
        hit = is_image(path)
        if hit is None or files.endings[number].lower() == GIF:
            found.others.append(number)
            continue
        known = hit.groupdict()
        part = part_of(known.get("part"))
        key = known["case"], part if with_part else ""
        channel = _channel(known, modalities) if layout.several else ""
        if channel is None:
            found.others.append(number)
            continue
        channels = found.images.setdefault(key, {})
        if channel in channels:
            found.twice.append((channels[channel], number))
        channels.setdefault(channel, number)
        if part:
            found.parts[key] = part
        if known.get("patient"):
            found.patients[key] = known["patient"]
    return found


def _channel(known: dict[str, str], modalities: Collection[str]) -> str | None:
    """The name of the channel in a file's name; None where it is not one of ``modalities``."""
    name = known.get("modality")
    if name is None:
        return known.get("channel", "")
    own = name.lower()
    current = own if own in modalities else CURRENT_NAMES.get(own, own)
    return current if not modalities or current in modalities else None


def recognised(
    files: Files,
    *,
    test: bool = False,
    modalities: Collection[str] = (),
    table: Sequence[Layout] = TABLE,
) -> Layout | None:
    """The first layout that a few of the files have, or None.

    That takes an image with its mask. To be segmented, images alone do, of a layout that they
    show by themselves.
    """
    tried = [(layout, match(layout, files, modalities, few=True)) for layout in table]
    tried = [(layout, found) for layout, found in tried if found.images and _is_complete(found)]
    particular = any(layout.is_particular for layout, _ in tried)
    for layout, found in tried:
        if found.pairs and not (particular and layout.is_general):
            return layout
    for layout, _ in tried if test else ():
        if not layout.by_pairs or (modalities and layout.several == "modality"):
            return layout
    return None


def _is_complete(found: Found) -> bool:
    """Whether the numbered channels of some case start at 0; those of others are just numbers."""
    if found.layout.several != "channel":
        return True
    return all("0000" in channels for channels in found.images.values())


def bare(folder: Path, names: Sequence[str]) -> tuple[Layout, Files] | None:
    """The layout of images directly in a folder, without masks; None where it has none.

    Files ``<case>_0000`` and so on are channels in a folder that nnU-Net names, or if there are
    several such cases, all of the same channels.
    """
    files = only_files(folder, names)
    if not any(ending.lower() != GIF for ending in files.endings):
        return None
    found = match(NUMBERED, files)
    channels = {tuple(sorted(names)) for names in found.images.values()}
    alike = len(channels) == 1 and "0000" in next(iter(channels))
    named = re.fullmatch("images(tr|ts|val)", folder.resolve().name, re.IGNORECASE)
    if alike and not found.others and (named or len(found.images) > 1):
        return NUMBERED, files
    return BARE, files


def nearest(files: Files, table: Sequence[Layout] = TABLE) -> Iterator[tuple[Layout, str]]:
    """Yield the layouts of which a folder has the images or the masks, and what is missing."""
    for layout in table:
        if layout.by_pairs:
            continue
        found = match(layout, files, few=True)
        if found.images and not found.masks:
            yield layout, f"has no mask {shown(layout.masks)}"
        elif found.masks and not found.images and not layout.masks.startswith("**/{case}"):
            yield layout, f"has no image {shown(layout.images)}"
        elif found.images and found.masks:
            yield layout, "has no mask whose case is that of an image"


def shown(pattern: str) -> str:
    """A pattern as a message shows it: ``labelsTr/<case>``."""
    plain = re.sub(r"\{(\w+)(:[^}]*)?\}", r"<\1>", pattern.replace("**/", ""))
    plain = plain.replace("<part>400", "Training400").replace("<part>", "Tr")
    plain = plain.replace("/Tr/", "/train/").replace("<channel>", "0000")
    plain = re.sub(r"\[.*?\]", "", plain)
    while (short := re.sub(r"\(([^()|]*)\|[^()]*\)", r"\1", plain)) != plain:
        plain = short
    return plain.replace("*", "")
