"""Where the checkpoints of a folder are: by number, and the latest one."""

from __future__ import annotations

from pathlib import Path

from guided_diffusion.checkpoint.portable import SUFFIX
from guided_diffusion.checkpoint.starters import other_name, starter_file, starter_named
from guided_diffusion.errors import UserError
from guided_diffusion.files import expanded, nearest_path

LATEST = "savedmodel.pt"
BEST = "bestmodel.pt"


def numbered_checkpoints(folder: Path) -> list[Path]:
    """List the ``savedmodelNNNNNN.pt`` of a folder, ordered by step."""
    return sorted(folder.glob("savedmodel[0-9]*.pt"), key=step_of)


def step_of(path: Path) -> int:
    """Read the step from a file name: the number between the last ``model`` and the dot, or 0."""
    number = str(path).rpartition("model")[2].partition(".")[0]
    return int(number) if number.isdecimal() else 0


def latest_checkpoint(path: str | Path, *, flag: str = "--model_path") -> Path:
    """Find the checkpoint that a path names: a file, or the latest one in a folder.

    A folder without any may hold a single ``.safetensors`` file instead. Where there is neither, a
    name of :data:`~guided_diffusion.checkpoint.starters.STARTERS` is that of its file.

    Raises:
        UserError: there is none; ``flag`` names the path in the message.
    """
    may_be_starter = flag != "--save_dir"  # which is a run's own folder
    if may_be_starter and starter_named(path):
        return starter_file(str(path))
    file = expanded(path, flag=flag)
    if file.is_dir():
        folder, file = file, file / LATEST
        portable = sorted(folder.glob(f"*{SUFFIX}"))
        others = numbered_checkpoints(folder) or (portable if len(portable) == 1 else [])
        if others and not file.exists():
            file = others[-1]
    if not file.is_file():
        hint = f"Name a checkpoint or a folder that holds {LATEST}, or train one first."
        suggest = other_name if may_be_starter else nearest_path
        raise UserError(
            flag,
            f"there is no file {file}" if str(path) else "no path given",
            suggest(expanded(path, flag=flag), hint),
        )
    return file
