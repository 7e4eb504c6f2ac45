"""Every flag of every script, as frozen dataclasses: one per concern, field name = flag name.

A field carries its own default, help line and choices, so nothing is listed twice. Names, types,
bool rule and defaults are those of Diffusion-based-Segmentation and MedSegDiff, except for the
deviations in the changelog. No torch here: ``--help`` has to answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn, get_type_hints


def parse(
    description: str, groups: Sequence[type], argv: Sequence[str] | None = None
) -> dict[str, Any]:
    """Read a command line and return the flags that were typed, by name.

    Raises:
        UserError: an unknown flag, a missing value, or a value of the wrong kind.
    """
    parser = _Parser(description=description, argument_default=argparse.SUPPRESS)
    for group in groups:
        _add_group(parser, group)
    return vars(parser.parse_args(_glue_negative_values(sys.argv[1:] if argv is None else argv)))


def str2bool(text: str) -> bool:
    """Read yes, true, t, y, 1 and no, false, f, n, 0 in any case."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    hint = ""
    if "--" in text:
        value, _, flag = text.partition("--")
        hint = f"; a blank is missing between {value!r} and '--{flag}'"
    raise argparse.ArgumentTypeError(f"boolean value expected, found {text!r}{hint}")


class _Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one message."""

    @property
    def known(self) -> Iterable[str]:
        """Every spelling of every flag."""
        return self._option_string_actions

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        close = difflib.get_close_matches(unknown[1] if unknown else "", self.known, n=1)
        hint = f"Did you mean {close[0]}?" if close else "--help lists all flags."
        print(f"error: {message}. {hint}", file=sys.stderr)
        sys.exit(2)


def _add_group(parser: _Parser, group: type) -> None:
    """Add a group's flags; one that an earlier group has is not added again."""
    hints = get_type_hints(group)
    section = parser.add_argument_group((group.__doc__ or "").split("\n")[0])
    for entry in fields(group):
        info, kind = entry.metadata, hints[entry.name]
        if f"--{entry.name}" in parser.known:
            continue
        names = [f"--{entry.name}", *([info["alias"]] if info["alias"] else [])]
        words = info["words"]
        shown = "" if entry.default in ("", None, ()) else f" (default: {entry.default})"
        dead = f"; no effect: {info['dead']}" if info["dead"] else ""
        section.add_argument(
            *names,
            nargs="?" if info["switch"] else len(words) or None,
            const=True if info["switch"] else None,
            dest=entry.name,
            type=str2bool if kind is bool else str if words else kind,
            choices=info["choices"] or None,
            metavar=None if info["choices"] else words or kind.__name__.upper(),
            help=(info["help"] + shown + dead).replace("%", "%%"),
        )


def _glue_negative_values(argv: Sequence[str]) -> list[str]:
    """Let ``--mask_range -1,1`` pass: argparse would take the value for a flag."""
    glued: list[str] = []
    for word in argv:
        if re.fullmatch(r"-[\d.][\d.,-]*", word) and glued and re.fullmatch(r"--[\w-]+", glued[-1]):
            glued[-1] += f"={word}"
        else:
            glued.append(word)
    return glued
