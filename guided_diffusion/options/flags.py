"""What a flag is, and the flags of one command: declared once, checked once, read as options.

A flag is a field of a frozen dataclass: its name is the flag's name, and its metadata hold the help
line, the choices and the limits. :class:`Flags` are the values of a command's flags, the given ones
apart from those that a checkpoint or the data decided. No torch here: ``-h`` answers at once.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral
from typing import Any, TypeVar, get_type_hints

from guided_diffusion.errors import UserError, did_you_mean

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
    cap: float = math.inf,
    words: str = "",
) -> Any:
    """Declare a flag as a dataclass field.

    Args:
        default: its value where nothing is given.
        help: one line, without the default.
        choices: the only values that it takes.
        alias: a second spelling, dashes included.
        dead: why the flag is accepted but has no effect.
        run: it belongs to a run; no checkpoint records it.
        switch: given without a value it means True.
        least: smallest number that is allowed.
        most: largest number that is allowed; only finite ones are.
        cap: a number far above all that is sensible, larger ones are taken for mistakes.
        words: names of the values, for a flag that takes several.
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
        "cap": cap,
        "words": tuple(words.split()),
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Flags:
    """The values of a command's flags.

    Attributes:
        groups: the option groups that the command has.
        given: what the user gave, by name.
        resolved: what a checkpoint or the data decided, by name; it wins over ``given``.
        command: the command's name and its arguments, to start it again in other processes.
        preset: what a preset sets in place of defaults, by name; all others win over it.
    """

    groups: tuple[type, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    resolved: Mapping[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    preset: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Sequence[type], *, without: Collection[str] = (), **values: Any) -> Flags:
        """Take flags from Python, all those of the groups but for some.

        Raises:
            UserError: a name that no group has, or a value of another kind.
        """
        known = {
            entry.name: get_type_hints(group)[entry.name]
            for group in groups
            for entry in _fields(group)
            if entry.name not in without
        }
        given = {}
        for name, value in values.items():
            if name not in known:
                hint = did_you_mean(name, known, "docs/cli.md lists all flags.")
                raise UserError(name, "no such flag", hint)
            try:
                given[name] = _converted(value, known[name])
            except (TypeError, ValueError, OverflowError):
                kind = KINDS[known[name]]
                raise UserError(f"--{name}", f"{value!r} is not {kind}", f"Give {kind}.") from None
        return cls(tuple(groups), given)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a flag's value if it was given, resolved or preset, else ``default``."""
        return {**self.preset, **self.given, **self.resolved}.get(name, default)

    def group(self, kind: type[Group]) -> Group:
        """Make the options of one group; other flags are passed over.

        Raises:
            UserError: a value outside the flag's choices or limits, or a number that is not finite.
        """
        values = {**self.preset, **self.given, **self.resolved}
        chosen = {e.name: values[e.name] for e in _fields(kind) if e.name in values}
        for entry in _fields(kind):
            value = chosen.get(entry.name, entry.default)
            if problem := unfit(entry, value):
                choices = entry.metadata["choices"]
                what = f"--{entry.name}" if choices else f"--{entry.name} {value}"
                hint = f"Omit it for the default, {entry.default}."
                raise UserError(what, problem, choices_hint(choices) if choices else hint)
        return kind(**chosen)

    def with_given(self, **values: Any) -> Flags:
        """Return these flags with some of the given values in another spelling."""
        return replace(self, given={**self.given, **values})

    def with_resolved(self, **values: Any) -> Flags:
        """Return these flags with further values that a checkpoint or the data decided."""
        return replace(self, resolved={**self.resolved, **values})

    def refuse_contradictions(
        self, trained: Mapping[str, Any], path: object, *, passing: Collection[str] = ()
    ) -> None:
        """Compare the given flags, all but ``passing``, with what a checkpoint records.

        Raises:
            UserError: for the first flag that differs.
        """
        for name, value in self.given.items():
            known = name in trained and name not in passing
            if known and value not in (trained[name], "auto"):
                was = "''" if trained[name] == "" else trained[name]
                raise UserError(
                    f"--{name} {value}",
                    f"contradicts {was}, which {path} was trained with",
                    f"Omit --{name}: a checkpoint brings its own options.",
                )


def _fields(group: type) -> tuple[Any, ...]:
    return fields(group)


KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def _converted(value: Any, kind: Any) -> Any:
    """Convert a value from Python to the type of a flag; NumPy's are accepted."""
    is_bool = str(getattr(value, "dtype", type(value).__name__)) == "bool"
    is_text = isinstance(value, str | os.PathLike)
    if is_bool != (kind is bool) or (is_text and kind is float):
        raise TypeError
    if kind is str and not (is_text or isinstance(value, Integral)):
        raise TypeError
    return operator.index(value) if kind is int else kind(value)


def unfit(entry: Any, value: Any) -> str:
    """Say which choice or limit of its flag a value breaks; empty if none."""
    least, most, cap = (entry.metadata[key] for key in ("least", "most", "cap"))
    if (choices := entry.metadata["choices"]) and value not in choices:
        return f"{value!r} is not a choice"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int | float) and not least <= value <= most:
        if least == most:
            return f"is {entry.metadata['help']}"
        limits = f"between {least} and {most}"
        return f"must be {limits if most < math.inf else f'{least} or more'}"
    if isinstance(value, int | float) and value > cap:
        return f"must be at most {cap}"
    return ""


def choices_hint(choices: Sequence[str]) -> str:
    """Say what a flag with choices takes."""
    return f"Use {', '.join(map(repr, choices))}."


def mistyped(group: type, entry: Any, value: Any) -> str:
    """Say that a recorded value is not of its flag's type; empty if it is."""
    kind = get_type_hints(group)[entry.name]
    if type(value) is kind or (kind is float and type(value) is int):
        return ""
    return f"{value!r} is not {KINDS.get(kind, 'a list of texts')}"


def recorded(*options: Any) -> dict[str, Any]:
    """Return what a checkpoint records of these groups: all but what belongs to a run."""
    return {
        entry.name: getattr(group, entry.name)
        for group in options
        for entry in fields(group)
        if not entry.metadata["run"]
    }


def numbers(flag: str, text: str, kind: type = int) -> list[Any]:
    """Read a comma-separated list of numbers, as ``--channel_mult 1,2,4`` has it."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(
            f"--{flag} {text!r}",
            "is not a list of numbers",
            f"Separate them by commas, as in --{flag} 1,2.",
        ) from None


def slice_range(text: str) -> tuple[int | None, int | None]:
    """Read the two ends of ``--slices 80:129``; either may be empty, or count from the end."""
    match = re.fullmatch(r"\s*(-?\d{1,18})?\s*:\s*(-?\d{1,18})?\s*", text or ":")
    if match is None:
        raise UserError(
            f"--slices {text!r}",
            "is not first:end, counted from 0, the end left out",
            "Write for example --slices 80:129, or 80:-26.",
        )
    first, end = (int(part) if part else None for part in match.groups())
    return first, end
