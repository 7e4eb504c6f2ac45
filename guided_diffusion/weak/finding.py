"""Where the two networks of weak supervision are: in the folders of their runs, under known names.

The published scripts are given one folder for the classifier and another, or none, for the
diffusion; ours share one. Both are found.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from guided_diffusion.checkpoint import (
    CLASSIFIER,
    IMAGES,
    LATEST,
    Checkpoint,
    Weights,
    kind_of,
    latest_checkpoint,
    load_checkpoint,
    read_content,
)
from guided_diffusion.data.folders import counted, listing
from guided_diffusion.errors import UserError
from guided_diffusion.files import expanded
from guided_diffusion.options.flags import Flags

DIFFUSION_FILE, CLASSIFIER_FILE = "model.pt", "classifier_model.pt"
"""What the published scripts call the two networks' latest weights in ``save_dir``."""
CLASSIFIER_FOLDER = "classifier"
CLASS_ROWS = "label_emb.weight"
PUBLISHED_FOLDERS = ("runs/results", "run/results")
"""Where the published commands have their folders."""


def diffusion_file(flags: Flags, folder: str) -> Path:
    """Find the diffusion of images that ``--model_path`` names, else that of the run's folder.

    Where the folder has none, that of a folder beside it is taken if it is the only one there. A
    named folder has to exist.

    Raises:
        UserError: there is none, or more than one to choose from.
    """
    if given := flags.get("model_path"):
        return _file_in(given, "--model_path")
    own = None
    with suppress(UserError):
        own = _file_in(folder, "--save_dir")
    if own and kind_in(own) == IMAGES:
        return own
    named = "out_dir" in flags.given
    found = _beside(folder, everywhere=not named) if expanded(folder).exists() or not named else []
    if len(found) == 1:
        return found[0]
    if found:
        names = listing([str(path.parent) for path in found])
        raise UserError(
            "--model_path",
            f"is needed: {folder} has no diffusion, but {counted(len(found), 'folder')} beside it "
            f"have one: {names}",
            "Name the one to use.",
        )
    return _file_in(folder, "--save_dir")


def _file_in(path: str, flag: str) -> Path:
    """The latest checkpoint in a folder, else the file with the published name."""
    named = expanded(path, flag=flag) / DIFFUSION_FILE
    latest = expanded(path, flag=flag) / LATEST
    return latest_checkpoint(named if named.is_file() and not latest.is_file() else path, flag=flag)


def _beside(folder: str, *, everywhere: bool) -> list[Path]:
    """The diffusions of the folders beside one and, if ``everywhere``, of published commands."""
    own = expanded(folder)
    places = [own.parent, *(map(Path, PUBLISHED_FOLDERS) if everywhere else ())]
    paths = [path for place in places for path in sorted(place.glob(f"*/{DIFFUSION_FILE}"))]
    return [path for path in paths if path.parent != own and _is_diffusion(path)]


def _is_diffusion(path: Path) -> bool:
    with suppress(UserError):
        return kind_in(path) == IMAGES
    return False


def classifier_file(flags: Flags, folder: str) -> Path:
    """Find the classifier that ``--classifier_path`` names, else that of the run's folder.

    Raises:
        UserError: there is none.
    """
    given = flags.get("classifier_path")
    text, flag = (given, "--classifier_path") if given else (folder, "--save_dir")
    path = expanded(text, flag=flag)
    if given and not path.is_dir():
        return latest_checkpoint(given, flag=flag)
    if (named := path / CLASSIFIER_FILE).is_file():
        return named
    others = (path / CLASSIFIER_FOLDER / LATEST, path / LATEST, path / DIFFUSION_FILE)
    for other in others:
        if other.is_file() and kind_in(other) == CLASSIFIER:
            return other
    raise UserError(
        flag,
        f"there is no file {named}: the folder has no classifier",
        f"Train one with scripts/classifier_tumor_train.py --save_dir {text}, or name one with "
        "--classifier_path.",
    )


def kind_in(path: Path) -> str:
    """Return the kind of the network in a file; the names of bare weights decide.

    Raises:
        UserError: the file cannot be read.
    """
    content = read_content(path, on_disk=True)
    options = content.get("options") if isinstance(content, dict) else None
    if isinstance(options, dict) and options:
        return kind_of(Checkpoint(options, step=0, model={}))
    weights = load_checkpoint(path, training=False, on_disk=True).model
    return IMAGES if is_unet(weights) else CLASSIFIER


def is_unet(weights: Weights) -> bool:
    """Whether bare weights are those of a U-Net, which a classifier is only half of."""
    return "output_blocks.0.0.in_layers.0.weight" in weights


def with_two_classes(checkpoint: Checkpoint, path: Path, lesion: int) -> tuple[Checkpoint, int]:
    """Keep two rows of bare weights' label embedding.

    The published scripts have 1000 rows, and train row 0 and the one that their ``--class_index``
    names.

    Args:
        checkpoint: bare weights.
        path: their file.
        lesion: the class of images with a lesion.

    Returns:
        The weights, and the lesion's row; 0 where they have no classes.

    Raises:
        UserError: they have no such class.
    """
    embedding = checkpoint.model.get(CLASS_ROWS)
    if embedding is None or embedding.ndim != 2:
        return checkpoint, 0
    rows = len(embedding)
    row = 1 if rows == 2 else max(lesion, 1)
    if row >= rows:
        raise UserError(
            f"--class_index {lesion}",
            f"{path} has only {rows} classes",
            "Name the label that it was trained with.",
        )
    model, *averages = (
        {**weights, CLASS_ROWS: weights[CLASS_ROWS][[0, row]]}
        for weights in (checkpoint.model, *checkpoint.ema.values())
    )
    ema = dict(zip(checkpoint.ema, averages, strict=True))
    return replace(checkpoint, model=model, ema=ema), row


def rows_note(row: int) -> str:
    """Say which rows of a label embedding are used."""
    return f"classes in rows 0 and {row} of its label embedding"
