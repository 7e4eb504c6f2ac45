"""The page of results of weak supervision, made from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

Json = dict[str, Any]
TITLES = {
    "halves": "BraTS half-slices at equal heights",
    "phantoms": "Phantoms whose lesions are not the brightest structure",
    "slices": "BraTS slices whose class follows from their height",
}
ABOUT = {
    "halves": """Of a slice with a lesion on one side alone, that half is an image with a lesion and
the other half a normal image: both classes have the same patients and heights. Four patients to
train on, two held out; lesions lie on the left in two of the four and in one of the two. FLAIR, in
which lesions are bright.""",
    "phantoms": """T2-weighted brain phantoms, in which fluid and cysts are brighter than lesions;
every other patient is healthy, and the slices of both lie at the same heights.""",
    "slices": """`brats15_weak_128`: all normal slices of training lie below the tumours, of which
`check_data` warns. The settings are those of the half-slices. One seed.""",
}
TRIVIAL = ("Otsu", "Otsu twice", "image, chosen cut")
WITH_MASKS = ("plain U-Net",)
STUDENT = "second stage"
PRESET = "encoded, preset weak-ours"
SAME_CLASS = "encoded, decoded as a lesion again"
CEILING = "true masks at the networks' size"
HEAD = """# Masks from image-level labels

```bash
python benchmarks/weak.py --data $REAL_DATA
```

Diffusion and classifier saw labels alone; the settings of the maps were chosen on training images
with the first seed, by the masks of these. Dice over held-out images with a lesion: mean and
standard deviation over seeds. AUROC and AP (average precision) rank the pixels of each image by the
map, before any cut. *Otsu twice* takes the threshold of the image a second time, among the pixels
above the first, and fills the largest component; *image, chosen cut* takes the image as the map,
and its cut is chosen like those of the maps. The *second stage* is a plain U-Net trained on the
weak masks of the encoded maps, the *plain U-Net* one trained on true masks. *Decoded as a lesion
again* is a control that asks whether the class matters; *true masks at the networks' size* are
scaled down and up again, which no network of that size can exceed. The settings of the *preset* are
the best of half-slices and phantoms together, on training images, too. *Published settings* are
those of Hu et al. (2023): two branches whose embeddings differ by a twentieth of the classes', for
ten of 1000 timesteps, and a cut of the signed map.
"""


def tables(rows: Sequence[Json]) -> str:
    """The whole page."""
    parts = [HEAD]
    for task in TITLES:
        own = [row for row in rows if row["task"] == task]
        if own:
            parts.append(section(task, own))
    return "\n".join(parts)


def section(task: str, rows: Sequence[Json]) -> str:
    """One task: who wins, the table, and what was trained."""
    names = dict.fromkeys(row["method"] for row in rows)
    by_name = {name: [row for row in rows if row["method"] == name] for name in names}
    weak = [name for name in names if name not in (*TRIVIAL, *WITH_MASKS, SAME_CLASS, CEILING)]
    scores = {name: fmean(row["dice"] for row in own) for name, own in by_name.items()}
    trivial = max((scores[name] for name in TRIVIAL if name in scores), default=0.0)
    lines = [f"## {TITLES[task]}", ""]
    above = [name for name in weak if scores[name] > trivial]
    if above:
        lines += [f"Above the threshold of the image ({trivial:.3f}): {'; '.join(above)}.", ""]
    else:
        lines += [f"**No method beats the threshold of the image, which has {trivial:.3f}.**", ""]
    lines += [
        *(ABOUT[task], ""),
        "| method | Dice | by patient | AUROC | AP | seconds per image |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(names, key=lambda name: -scores[name]):
        lines.append(f"| {name} | {' | '.join(cells(by_name[name]))} |")
    last = rows[-1]
    lines += [
        "",
        f"{last['images']} images with a lesion, networks at {last['image_size']} px, "
        f"{last['steps']} steps of the diffusion, {last['device']}, torch {last['torch']}.",
    ]
    for row in rows:
        if "labels" in row:
            told = ", ".join(
                f"{who} AUROC {found['auroc']:.3f}, accuracy {found['accuracy']:.3f}"
                for who, found in row["labels"].items()
            )
            lengths = row["embeddings"]
            ratio = lengths["classes"] / lengths["time"]
            lines.append(
                f"* Seed {row['seed']}: class of held-out images by {told}; the classes' "
                f"embeddings differ by {ratio:.1f} times the length of the time's."
            )
    lines += ["", "Chosen settings:", ""]
    for name in weak:
        settings = by_name[name][0]["settings"]
        if settings:
            words = " ".join(f"--{flag} {value}" for flag, value in settings.items())
            lines.append(f"* {name}: `{words}`")
    minutes: dict[str, list[float]] = {}
    for row in {row["seed"]: row for row in rows}.values():
        for name, spent in row["minutes"].items():
            minutes.setdefault(name, []).append(spent)
    spent = ", ".join(f"{name} {fmean(values):.1f}" for name, values in minutes.items())
    return "\n".join([*lines, "", f"Minutes of training: {spent}.", ""])


def cells(rows: Sequence[Json]) -> list[str]:
    """What a table says of a method over its seeds."""
    patients = {owner: [row["patients"][owner] for row in rows] for owner in rows[0]["patients"]}
    few = [f"{owner.split('_')[-1]} {fmean(dices):.3f}" for owner, dices in patients.items()]
    means = [fmean(dices) for dices in patients.values()]
    by_patient = ", ".join(few) if len(few) <= 3 else f"{fmean(means):.3f} ({len(few)} patients)"
    return [
        over_seeds([row["dice"] for row in rows]),
        by_patient,
        *(f"{fmean(row[name] for row in rows):.3f}" for name in ("auroc", "average_precision")),
        f"{fmean(row['seconds'] for row in rows):.2f}",
    ]


def over_seeds(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f} (one seed)"
    return f"{fmean(values):.3f} ± {stdev(values):.3f} ({len(values)} seeds)"
