"""The command line: argparse filled from option groups, with one message for every mistake.

Flags are accepted with ``-`` for ``_``. ``-h`` shows the basic ones, ``--help_all`` all of them.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NoReturn, get_type_hints

from guided_diffusion.errors import did_you_mean
from guided_diffusion.options.flags import KINDS, Flags


def parse(
    groups: Sequence[type],
    argv: Sequence[str],
    *,
    command: str = "",
    program: str = "",
    summary: str = "",
    examples: Sequence[str] = (),
    basic: Sequence[str] = (),
) -> Flags:
    """Read a command line.

    Args:
        groups: the option groups of the command.
        argv: its arguments.
        command: its name, kept in the flags.
        program: the command line before the arguments, for the help.
        summary: one sentence for the help.
        examples: command lines for the help.
        basic: names of the flags that ``-h`` shows; ``--help_all`` shows all.

    An unknown flag, a missing value or one of the wrong kind ends the process with exit code 2.
    """
    words = _glue_negative_values([_underscored(word) for word in argv])
    parser = _Parser(
        prog=program or None,
        usage="%(prog)s [flags]",
        description=summary,
        epilog="\n  ".join(["examples:", *map(_broken, examples)]) if examples else None,
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=26),
        add_help=False,
    )
    entries = {entry.name: (group, entry) for group in groups[::-1] for entry in fields(group)}
    all_flags = any(word.startswith("--help_") for word in words)
    shown = [] if all_flags else [name for name in basic if name in entries]
    if shown:
        section = parser.add_argument_group("basic flags")
        for name in shown:
            _add_flag(section, *entries.pop(name))
    for group in groups:
        title = (group.__doc__ or "").split("\n")[0].rstrip(".")
        section = parser.add_argument_group(None if shown else title)
        for entry in fields(group):
            if entries.get(entry.name, (None,))[0] is group:
                _add_flag(section, *entries.pop(entry.name), hidden=bool(shown))
    about = parser.add_argument_group("help")
    about.add_argument("-h", "--help", action="help", help="show the basic flags")
    about.add_argument("--help_all", action="help", help="show all flags")
    about.add_argument("--about", action="store_true", help="show version, torch and device")
    given, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"unrecognized arguments: {shlex.join(unknown)}")
    return Flags(tuple(groups), vars(given), command=(command, *argv))


class _Parser(argparse.ArgumentParser):
    """argparse that answers a mistake with one message."""

    def error(self, message: str) -> NoReturn:
        known = self._option_string_actions
        if about := re.match(r"argument (--\w+)[/\w-]*: (.*)", message, re.DOTALL):
            flag, problem = about.groups()
            if choices := known[flag].choices:
                wrong = re.match(r"invalid choice: (.*) \(choose from ", problem, re.DOTALL)
                problem = f"{wrong[1]} is not a choice" if wrong else problem
                hint = f"Use {', '.join(map(repr, choices))}."
            else:
                hint = f"Give {_values(known[flag])}."
            message = f"{flag}: {problem}"
        elif message.startswith("ambiguous option"):
            hint = "Write the flag out."
        elif unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            hint = did_you_mean(unknown[1], known, "--help_all lists all flags.")
        else:
            hint = "Put every value behind its flag, and values with blanks in quotes."
        print(f"error: {message}. {hint}", file=sys.stderr)
        sys.exit(2)


def _values(action: argparse.Action) -> str:
    """What a flag without choices takes: 'a number'."""
    if isinstance(action.nargs, int):
        return f"{action.nargs} values"
    kinds = {str2bool: KINDS[bool], int: KINDS[int], float: KINDS[float]}
    return kinds.get(action.type, "a value")


def _add_flag(section: Any, group: type, entry: Any, *, hidden: bool = False) -> None:
    """Add one flag to a section of the parser."""
    info, kind = entry.metadata, get_type_hints(group)[entry.name]
    words = info["words"]
    section.add_argument(
        *filter(None, (f"--{entry.name}", info["alias"])),
        nargs="?" if info["switch"] else len(words) or None,
        const=True if info["switch"] else None,
        dest=entry.name,
        type=str2bool if kind is bool else str if words else kind,
        choices=info["choices"] or None,
        metavar=None if info["choices"] else words or kind.__name__.upper(),
        help=argparse.SUPPRESS if hidden else help_line(entry).replace("%", "%%"),
    )


def help_line(entry: Any) -> str:
    """What the help says of a flag: its meaning, its default, and whether it has an effect."""
    info = entry.metadata
    shown = "" if entry.default in ("", None, ()) else f" (default: {entry.default})"
    return info["help"] + shown + (f"; no effect: {info['dead']}" if info["dead"] else "")


def _broken(command: str) -> str:
    """Break a command line before a flag where it grows longer than a screen is wide."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) > 74:
            lines[-1] += " \\"
            lines.append("    " + part)
        else:
            lines[-1] += " " * bool(lines[-1]) + part
    return "\n  ".join(lines)


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


def _underscored(word: str) -> str:
    """Let ``--num-ensemble`` pass for ``--num_ensemble``."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if re.match(r"--\w", word) else word


def _glue_negative_values(argv: Sequence[str]) -> list[str]:
    """Let ``--mask_range -1,1`` pass: argparse would take the value for a flag."""
    glued: list[str] = []
    for word in argv:
        if re.fullmatch(r"-[\d.][\d.,:e-]*", word) and glued and re.fullmatch(r"--\w+", glued[-1]):
            glued[-1] += f"={word}"
        else:
            glued.append(word)
    return glued
