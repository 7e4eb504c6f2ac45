"""Every flag of every script, as frozen dataclasses: one per concern, field name = flag name.

A field carries its own default, help line and choices, so nothing is listed twice. Names, types,
bool rule and defaults are those of Diffusion-based-Segmentation and MedSegDiff, except for the
deviations in the changelog. No torch here: ``--help`` has to answer at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any, TypeVar

from guided_diffusion.errors import UserError

Group = TypeVar("Group")


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    alias: str = "",
    dead: str = "",
    run: bool = False,
    switch: bool = False,
    least: float = -math.inf,
    most: float = math.inf,
    words: str = "",
) -> Any:
    """Declare a flag: ``dead`` says why it does nothing, ``run`` that no checkpoint binds it.

    Numbers are refused outside ``least`` to ``most``, and none but finite ones is taken; a
    ``switch`` alone means True; ``words`` names the several values it takes.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "alias": alias,
        "dead": dead,
        "run": run,
        "switch": switch,
        "least": least,
        "most": most,
        "words": tuple(words.split()),
    }
    return field(default=default, metadata=metadata)


def fill(group: type[Group], values: dict[str, Any]) -> Group:
    """Make one group's options from flags by name; the others are left alone.

    Raises:
        UserError: a number that the flag cannot have.
    """
    known = {entry.name: entry.metadata for entry in fields(group)}  # type: ignore[arg-type]
    chosen = {name: value for name, value in values.items() if name in known}
    for name, value in chosen.items():
        least, most = known[name]["least"], known[name]["most"]
        endless = isinstance(value, float) and not math.isfinite(value)
        if endless or (isinstance(value, int | float) and not least <= value <= most):
            bounds = f"{least} to {most}" if most < math.inf else f"{least} or more"
            raise UserError(
                f"--{name}",
                found=value,
                expected="a finite number" if endless else bounds,
                hint=f"Leave --{name} away for its default.",
            )
    return group(**chosen)


def recorded(*options: Any) -> dict[str, Any]:
    """Return what a checkpoint remembers of these groups: all but what belongs to a run."""
    return {
        entry.name: getattr(group, entry.name)
        for group in options
        for entry in fields(group)
        if not entry.metadata["run"]
    }


def refuse_contradictions(typed: dict[str, Any], trained: dict[str, Any], path: object) -> None:
    """Raise a UserError for the first typed flag that differs from what a checkpoint records."""
    for name, value in typed.items():
        if name in trained and value not in (trained[name], "auto"):
            raise UserError(
                f"--{name}",
                found=value,
                expected=f"{trained[name]!r}, which {path} was trained with",
                hint=f"Leave --{name} away: a checkpoint brings its own options.",
            )


def numbers(flag: str, text: str, kind: type = int) -> list[Any]:
    """Read a comma-separated list of numbers, as ``--channel_mult 1,2,4`` has it."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(
            f"--{flag}",
            found=repr(text),
            expected="numbers separated by commas",
            hint=f"Write for example --{flag} 1,2.",
        ) from None


def slice_range(text: str) -> tuple[int | None, int | None]:
    """Read the two ends of ``--slices 80:129``; either may be empty, or count from the end."""
    match = re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*", text or ":")
    if match is None:
        raise UserError(
            "--slices",
            found=repr(text),
            expected="first:end, counted from 0, the end left out",
            hint="Write for example --slices 80:129, or 80:-26.",
        )
    first, end = (int(part) if part else None for part in match.groups())
    return first, end
