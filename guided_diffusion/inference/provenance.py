"""Records of what was run, in the folder of its results, which the report shows.

``config.yaml`` has a section for each command that wrote into the folder: what would repeat it.
``sampling.json`` says how the masks beside it were drawn. Either is rewritten only when something
other than the date changes, so that a repeated run does not change the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from guided_diffusion import __version__, logger
from guided_diffusion.dist_util import describe, dev, rank, world_size
from guided_diffusion.errors import UserError
from guided_diffusion.files import DamagedFile, atomic_write, read_json, set_aside
from guided_diffusion.options.flags import Flags

CONFIG = "config.yaml"
MOST_LISTED = 1_000_000
"""Files of a data folder whose names and sizes are counted."""
CHANGING = ("out_dir", "resume", "resume_checkpoint")
"""Flags of training that a run which continues another has of its own."""
PART = ("job",)
"""Flags that say which part of the work a run did."""
_HEAD = """\
# What would repeat the runs that wrote into this folder, a section for each command.
# --config with this file reads the flags that were given; those of the command line win.
"""
RECORD = "sampling.json"
PROGRESS = "progress.csv"
HINT = "The next sampling into this folder makes it anew."
PACKAGES = ("torch", "numpy", "scipy", "nibabel", "pillow")


def command() -> str:
    """The command line of this process, as a shell would take it."""
    program, *flags = sys.argv
    script = Path(program)
    if script.name == "__main__.py":
        return shlex.join(["python", "-m", script.parent.name, *flags])
    if script.suffix == ".py":
        return shlex.join(["python", str(Path(script.parent.name, script.name)), *flags])
    return shlex.join([script.stem, *flags])


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def versions() -> dict[str, str]:
    """Python and the packages that scores and masks depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that brings its own
            continue
    return found


def note_sampling(
    folder: Path, fingerprint: str, *, model: str, seed: int, options: Mapping[str, Any]
) -> None:
    """Record in a result folder how its masks were drawn.

    ``model`` describes the weights and the sampling, ``options`` are what the checkpoint records.

    Raises:
        UserError: the note cannot be written.
    """
    path = folder / RECORD
    try:
        known = read_json(path, hint=HINT) or {"fingerprint": ""}
        if not isinstance(known.get("fingerprint"), str):
            raise DamagedFile(path, "it has no fingerprint", HINT)
    except DamagedFile as error:
        kept = set_aside(path).name
        logger.log(f"{path} is damaged ({error.why}); it is kept as {kept}, and made anew")
        known = {}
    if known.get("fingerprint") == fingerprint:
        return
    note = {
        "fingerprint": fingerprint,
        "date": now(),
        "command": command(),
        "model": model,
        "seed": seed,
        "options": dict(options),
        "versions": versions(),
    }
    with atomic_write(path) as part:
        part.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def describe_run(folder: Path, *, scored: bool = True) -> dict[str, Any]:
    """Describe training, sampling and, if ``scored``, scoring, as far as recorded, for people.

    Returns labels with texts, or with settings by name.
    """
    try:
        note = read_json(folder / RECORD, hint=HINT) or {}
    except UserError as error:
        note = {"date": str(error)}
    runs = _read_config(folder / CONFIG)
    sampling, scoring = runs.get("sample", {}), runs.get("score", {}) if scored else {}
    return {
        **_description("Trained", "Training", "training", sampling.get("training")),
        "Sampled": str(note.get("date", "")),
        "Sampling command": str(note.get("command", "")),
        "Model": str(note.get("model", "")),
        "Seed": str(note.get("seed", "")),
        "Checkpoint options": _mapping(note.get("options")),
        "Sampling flags": _mapping(sampling.get("given")),
        "Other flags of sampling": _mapping(sampling.get("other")),
        "Sampling data": _mapping(sampling.get("data")),
        "Versions, sampling": _mapping(note.get("versions")),
        "Scored": str(scoring.get("date", "")),
        "Scoring command": str(scoring.get("command", "")),
        "Scoring flags": _mapping(scoring.get("given")),
        "Other flags of scoring": _mapping(scoring.get("other")),
        "Versions, scoring": _mapping(scoring.get("versions")),
    }


def _description(date: str, what: str, last: str, record: object) -> dict[str, Any]:
    """Describe the record of a run as labels with texts or settings."""
    if not isinstance(record, dict):
        return {}
    where = [record.get(name) for name in ("host", "device")]
    return {
        date: str(record.get("date", "")),
        f"{what} command": str(record.get("command", "")),
        f"{what} flags": _mapping(record.get("given")),
        f"Other flags of {last}": _mapping(record.get("other")),
        f"{what} data": _mapping(record.get("data")),
        f"{what} on": ", ".join(str(part) for part in where if part),
        f"Versions, {last}": _mapping(record.get("versions")),
    }


def training_log(folder: Path) -> Path | None:
    """Find the ``progress.csv`` of the training whose masks a folder holds; None without one.

    It is in the folder itself, or in that of the checkpoint, or where the training wrote.
    """
    sampling = _read_config(folder / CONFIG).get("sample", {})
    training = _mapping(sampling.get("training"))
    places = [
        folder,
        *_recorded_path(sampling, "model_path"),
        *_recorded_path(training, "out_dir"),
    ]
    logs = (place / PROGRESS for place in places)
    return next((log for log in logs if log.is_file()), None)


def _recorded_path(record: Mapping[str, Any], flag: str) -> list[Path]:
    """The folder that a flag of a recorded run named, if it is recorded."""
    value = {**_mapping(record.get("other")), **_mapping(record.get("given"))}.get(flag)
    if not isinstance(value, str) or not value:
        return []
    path = Path(str(record.get("directory", "")), value.split(",")[0]).expanduser()
    return [path.parent if path.suffix else path]


# ------------------------------------------------------------------------------- config.yaml


def run_record(
    flags: Flags, *, data: str = "", values: Mapping[str, Any] = {}, gpu_dev: str = "0"
) -> dict[str, Any]:
    """Describe a run by what would repeat it, as plain values.

    Empty in all processes but the first, and for a run that no command has started.

    Args:
        flags: of its command.
        data: the folder or file that it reads.
        values: final values of flags that were not given, as the data decided them.
        gpu_dev: index of its CUDA device.
    """
    if rank() or not flags.command:
        return {}
    entries = {entry.name: entry for group in flags.groups[::-1] for entry in fields(group)}
    found = {
        name: _plain({**flags.preset, **values, **flags.resolved}.get(name, entry.default))
        for name, entry in entries.items()
        if name not in flags.given and name not in PART
    }
    return {
        "name": flags.command[0],
        "command": command(),
        "directory": str(Path().absolute()),
        "date": now(),
        "given": _given(flags),
        "other": found,
        "data": listing_of(data) if data else {},
        "code": code_version(),
        "versions": versions(),
        "host": platform.node(),
        "device": describe(dev(gpu_dev)),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }


def _given(flags: Flags) -> dict[str, Any]:
    """The flags that were given, all but which part of the work it was."""
    names = dict.fromkeys(entry.name for group in flags.groups[::-1] for entry in fields(group))
    return {
        name: _plain(flags.given[name])
        for name in names
        if name in flags.given and name not in PART
    }


def is_noted(folder: Path, flags: Flags) -> bool:
    """Whether a folder's ``config.yaml`` holds a run of the same command with the same flags."""
    if not flags.command:
        return False
    return _read_config(folder / CONFIG).get(flags.command[0], {}).get("given") == _given(flags)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value if isinstance(value, bool | int | float | str) else str(value)


def code_version() -> dict[str, str]:
    """The version of this package, and the commit of its repository where it runs from one."""
    root = Path(__file__).resolve().parents[2]
    found = {"version": __version__}
    if not (root / ".git").exists():
        return found
    git = ["git", "-C", str(root), "-c", "core.fsmonitor=false"]
    asked = ["describe", "--match=", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(
            [*git, *asked], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return found
    return {**found, "commit": done.stdout.strip()}


def listing_of(path: str) -> dict[str, Any]:
    """Count the files of a folder, and digest their names and sizes; contents are not read.

    Hidden files and the records of runs do not count.
    """
    root = Path(path).expanduser().absolute()
    names = [(root.name, root.stat().st_size)] if root.is_file() else []
    complete = True
    for name, size in _files_below(root):
        names.append((name, size))
        if len(names) >= MOST_LISTED:
            complete = False
            break
    digest = hashlib.sha256()
    for name, size in sorted(names):
        digest.update(os.fsencode(f"{name} {size}\n"))
    return {
        "path": str(root),
        "files": len(names) if complete else f"more than {len(names)}",
        "bytes": sum(size for _, size in names),
        "listing": digest.hexdigest()[:16],
    }


def _files_below(root: Path) -> Iterator[tuple[str, int]]:
    """Yield the name of every file below a folder, and its size."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name != CONFIG:
                file = Path(folder, name)
                try:
                    yield file.relative_to(root).as_posix(), file.stat().st_size
                except OSError:  # a link that leads nowhere
                    yield file.relative_to(root).as_posix(), -1


def note_run(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run, if it is not empty, into the ``config.yaml`` of its folder.

    The records of other commands in the file stay. A file of that name that no run has written is
    kept under another name.

    Raises:
        UserError: it cannot be written.
    """
    if not record:
        return
    path, name = folder / CONFIG, record["name"]
    known = _read_config(path)
    if path.exists() and not known:
        logger.log(f"{path} is not that of a run; it is kept as {set_aside(path, 'old').name}")
    own = {key: value for key, value in record.items() if key != "name"}
    if _undated(known.get(name, {})) == _undated(own):
        return
    text = yaml.safe_dump({**known, name: own}, sort_keys=False, allow_unicode=True)
    with atomic_write(path) as part:
        part.write_text(_HEAD + text, encoding="utf-8")


def _undated(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "date"}


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Read what earlier runs have recorded; empty where there is nothing of theirs."""
    try:
        found = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    sections = found.values() if isinstance(found, dict) else [None]
    ours = all(isinstance(part, dict) and "command" in part for part in sections)
    return dict(found) if ours else {}


def other_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Say in what a run differs from the one that it continues; empty if in nothing known."""
    changes = []
    one, other = (_settings(record) for record in (before, after))
    for name in one.keys() & other.keys():
        if one[name] != other[name]:
            changes.append(f"{name} {_shown(one[name])} -> {_shown(other[name])}")
    return ", ".join(sorted(changes))


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """All that the weights of a run may depend on, by name."""
    parts = {name: _mapping(record.get(name)) for name in ("given", "other", "versions", "data")}
    flags = {**parts["other"], **parts["given"]}
    further = {
        **{name: record.get(name) for name in ("threads", "processes")},
        "torch": parts["versions"].get("torch"),
        "files of the data": parts["data"].get("listing"),
    }
    return {
        **{name: value for name, value in flags.items() if name not in CHANGING},
        **{name: value for name, value in further.items() if value is not None},
    }


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _shown(value: object) -> str:
    return "''" if value == "" else str(value)
