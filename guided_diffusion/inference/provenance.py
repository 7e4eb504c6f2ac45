"""A record of what was run: ``sampling.json`` beside the masks, which the report shows.

It is rewritten only when the settings change, so that a repeated run does not change the folder.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from guided_diffusion import logger
from guided_diffusion.errors import UserError
from guided_diffusion.files import DamagedFile, atomic_write, read_json, set_aside

RECORD = "sampling.json"
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


def describe_run(folder: Path) -> dict[str, str]:
    """Describe the sampling, if recorded, and this scoring, as labels and texts for people."""
    try:
        note = read_json(folder / RECORD, hint=HINT) or {}
    except UserError as error:
        note = {"date": str(error)}
    return {
        "Sampled": str(note.get("date", "")),
        "Sampling command": str(note.get("command", "")),
        "Model": str(note.get("model", "")),
        "Seed": str(note.get("seed", "")),
        "Checkpoint options": _pairs(note.get("options")),
        "Versions, sampling": _pairs(note.get("versions")),
        "Scored": now(),
        "Scoring command": command(),
        "Versions, scoring": _pairs(versions()),
    }


def _pairs(values: object) -> str:
    if not isinstance(values, dict):
        return ""
    return "  ".join(f"{key}={value}" for key, value in values.items())
