"""``report.html`` of a result folder that has no scores yet: its cases, the most doubtful first.

What sampling has recorded of every case stands beside its picture. Scoring replaces the page. Of
each volume one slice is shown, the most doubtful one.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.data.classes import Classes, each
from guided_diffusion.data.folders import counted
from guided_diffusion.data.jobs import PREDICTIONS
from guided_diffusion.errors import UserError
from guided_diffusion.report.charts import (
    Axis,
    Plot,
    bars,
    captioned,
    dots,
    figure,
    round_marks,
    upright,
)
from guided_diffusion.report.page import (
    REPORT,
    Column,
    Page,
    Section,
    Shown,
    Strip,
    pictures_beside,
    tables_beside,
)
from guided_diffusion.report.tables import figure_cell, number
from guided_diffusion.report.thumbnails import (
    MOST_PICTURES,
    layers,
    outlines,
    overlay_view,
    picture_in,
)
from guided_diffusion.report.training_charts import training_section
from guided_diffusion.scoring.predictions import read_soft
from guided_diffusion.scoring.tables import write_text

Row = Mapping[str, Any]
STRIP = 6
"""Cases in the strip of pictures."""
COLUMNS = (
    Column("disagreement", "Disagreement", 3, falling=True),
    Column("uncertainty", "Uncertainty", 4, falling=True),
    Column("area", "Area, px", 0),
    Column("empty_members", "Empty members", 0),
)
OF_VOLUMES = (Column("slices", "Slices", 0), Column("voxels", "Voxels", 0))
NOTES = (
    "There are no scores here yet: nothing says how good these masks are. Scoring them against a "
    "truth replaces this page.",
    "The disagreement of a case is the mean 1 less Dice of two of its members: 0 where all are "
    "alike. Cases are in the order of it; a single member cannot disagree, and they are then in "
    "that of the uncertainty.",
    "The uncertainty of a case is the mean of its map over all pixels.",
    "The area is that of the mask, in pixels of the case's own size. Empty members found nothing.",
)


def is_current(folder: Path) -> bool:
    """Whether a folder has a page of all the cases that are recorded in it."""
    try:
        return (folder / REPORT).stat().st_mtime_ns >= (folder / PREDICTIONS).stat().st_mtime_ns
    except OSError:
        return False


def write_unscored(
    folder: Path,
    rows: Sequence[Row],
    run: Mapping[str, Any],
    *,
    classes: Classes | None = None,
    volumes: Mapping[str, str] = {},
    training: Path | None = None,
) -> Path:
    """Write ``report.html`` into a result folder and return its path.

    Args:
        folder: the result folder.
        rows: of its ``predictions.csv``, those of the cases to show.
        run: what was run: labels with texts or settings.
        classes: of the masks; None where everything is one class.
        volumes: the volume of every case that is a slice of one, by name.
        training: the ``progress.csv`` of the training; None where it is not known.

    Raises:
        UserError: the file cannot be written.
    """
    path = folder / REPORT
    text = unscored_page(
        folder, rows, run, classes=classes, volumes=volumes, training=training
    ).text()
    write_text(path, text)
    return path


def unscored_page(
    folder: Path,
    rows: Sequence[Row],
    run: Mapping[str, Any],
    *,
    classes: Classes | None = None,
    volumes: Mapping[str, str] = {},
    training: Path | None = None,
) -> Page:
    """Make the page; the arguments are those of :func:`write_unscored`."""
    own = [_measured(row) for row in rows]
    columns = [column for column in COLUMNS if any(row[column.key] for row in own)]
    columns = columns or [COLUMNS[0]]
    order = next((column.key for column in columns if column.falling), "area")
    own.sort(key=lambda row: (-row[COLUMNS[0].key], -row[COLUMNS[1].key], row["name"]))
    number_of_slices = len(own)
    if any(row["name"] in volumes for row in own):
        own = _one_slice_each(own, volumes)
        columns += OF_VOLUMES
    return Page(
        kind="sampling",
        kicker="Segmentation without scores",
        title=folder.resolve().name or "results",
        subtitle=_subtitle(own, number_of_slices, classes),
        headline=_headline(own),
        before=_figures(own),
        after=training_section(training),
        strips=_strips(own, order),
        columns=columns,
        cases=_cases(folder, own, classes, volumes),
        order=order,
        range=order,
        layers=("photo", "fused", "uncertainty"),
        links=tables_beside(folder, ["predictions.csv"]),
        run=run,
        notes=NOTES,
    )


def _measured(row: Row) -> dict[str, Any]:
    """The numbers of a row of ``predictions.csv``, 0 for those that it lacks."""
    return {
        "name": row["name"],
        **{key: float(row.get(key) or 0) for key in ("disagreement", "uncertainty", "seconds")},
        **{key: int(row.get(key) or 0) for key in ("area", "empty_members", "members")},
    }


def _one_slice_each(rows: Sequence[dict[str, Any]], volumes: Mapping[str, str]) -> list[Any]:
    """Of rows in order the first of each volume, with the number of its slices and its voxels."""
    slices = Counter(volumes.get(row["name"], row["name"]) for row in rows)
    voxels: Counter[str] = Counter()
    for row in rows:
        voxels[volumes.get(row["name"], row["name"])] += row["area"]
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        volume = volumes.get(row["name"], row["name"])
        first.setdefault(volume, {**row, "slices": slices[volume], "voxels": voxels[volume]})
    return list(first.values())


def _subtitle(rows: Sequence[Row], slices: int, classes: Classes | None) -> str:
    volumes = len(rows) < slices
    parts = [counted(len(rows), "volume" if volumes else "case")]
    if volumes:
        parts.append(f"{slices} slices, of each volume the most doubtful one is shown")
    if classes:
        parts.append(f"classes {', '.join(classes.names)}")
    most = max((row["members"] for row in rows), default=0)
    return " · ".join([*parts, f"{counted(most, 'member')} each", "the most doubtful first"])


def _headline(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    found = sum(row["area"] > 0 for row in rows)
    most = max(rows, key=lambda row: (row["disagreement"], row["uncertainty"]))
    apart = sum(0 < row["empty_members"] < row["members"] for row in rows)
    return "".join(
        [
            figure_cell(str(len(rows)), "Cases", f"{found} with a mask that is not empty"),
            figure_cell(
                number(statistics.median(row["disagreement"] for row in rows)),
                "Disagreement of members",
                "median",
            ),
            figure_cell(number(most["disagreement"]), "Largest disagreement", most["name"]),
            figure_cell(str(apart), "Found by some members only", "members are empty or not"),
            figure_cell(
                number(statistics.mean(row["seconds"] for row in rows), 2),
                "Seconds per case",
                "mean",
            ),
        ]
    )


def _figures(rows: Sequence[Row]) -> list[Section]:
    """How much the members disagree, and how that goes with the size of the mask."""
    apart = [row["disagreement"] for row in rows]
    if not any(apart) or len(rows) < 3:
        return []
    ends = round_marks(max(apart))
    counts = np.histogram(apart, bins=20, range=(0, ends[-1]))[0].tolist()
    marks = round_marks(max(counts))
    across = Axis("disagreement", 0, ends[-1], ends)
    frame = Plot("Histogram of the disagreement", across, Axis("cases", 0, marks[-1], marks))
    middle = statistics.median(apart)
    areas = [row["area"] for row in rows]
    sizes = round_marks(max(areas))
    plane = Plot("Area and disagreement", Axis("area, px", 0, sizes[-1], sizes), across)
    points = list(zip(areas, apart, strict=True))
    drawn = [
        (
            figure(frame, bars(frame, counts), upright(frame, middle, f"median {middle:.3f}")),
            "How much the members of a case disagree.",
        ),
        (
            figure(plane, dots(plane, points, [r["name"] for r in rows], [*range(len(rows))])),
            "The area of a case's mask, and how much its members disagree.",
        ),
    ]
    return [("figures", "Disagreement", f'<div class="figures">{captioned(drawn)}</div>')]


def _strips(rows: Sequence[Row], order: str) -> list[Strip]:
    some = [(index, number(row[order])) for index, row in enumerate(rows[:STRIP])]
    return [("Most doubtful", some)] if len(rows) > STRIP else []


def _cases(
    folder: Path,
    rows: Sequence[Row],
    classes: Classes | None,
    volumes: Mapping[str, str],
) -> list[Shown]:
    """Every case; the first of them with layers, the others with their overlays."""
    ends = [end for _, end in each(classes)]
    shown = []
    for index, row in enumerate(rows):
        name = row["name"]
        view = _layers(folder, name, ends) if index < MOST_PICTURES else {}
        links = pictures_beside(folder, name, end=ends[0])
        volume = f"{volumes.get(name, name)}_mask.nii.gz"
        if (folder / volume).exists():
            links["mask, NIfTI"] = volume
        shown.append(Shown(name, row, [view or overlay_view(folder, name)], links))
    return shown


def _layers(folder: Path, name: str, ends: Sequence[str]) -> dict[str, Any]:
    """The layers of a case from its files, all classes in one; empty where one is damaged."""
    try:
        masks = np.stack([read_soft(folder / f"{name}_output_ens{end}.png") for end in ends])
        uncertainty = read_soft(folder / f"{name}_uncertainty.png") / 2
        size = (masks.shape[1], masks.shape[2])
        overlay = folder / f"{name}_overlay.png"
        picture = picture_in(overlay, size) if overlay.exists() else None
    except (UserError, ValueError):
        return {}
    found = layers(picture, np.zeros(size), masks[0], uncertainty)
    return found._replace(fused=outlines(masks))._asdict()
