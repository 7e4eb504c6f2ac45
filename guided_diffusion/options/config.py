"""Flags from a YAML file, ``--config FILE``: one's own, or the ``config.yaml`` of a run.

A file has flags and their values, either directly or in a section for each command; a run writes
its flags below ``given`` in the section of its command. A value is read as the command line reads
it, whatever YAML takes it for: ``1e-4`` is a number and ``80:59`` a text.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from guided_diffusion.errors import UserError, did_you_mean
from guided_diffusion.options.flags import KINDS, choices_hint, unfit
from guided_diffusion.options.parser import str2bool

MOST_BYTES = 2**20
MOST_BRACKETS = 1000  # a parser's time grows with the square of their depth
GIVEN = "given"
NOTHING = ("null", "Null", "NULL", "~")


def read_config(
    path: str, command: str, groups: Sequence[type], *, commands: Sequence[str] = ()
) -> dict[str, Any]:
    """Read the flags of a command from a YAML file.

    Args:
        path: of the file.
        command: whose section is read, if the file has sections.
        groups: the option groups of the command.
        commands: the names of all commands, which may head sections.

    Raises:
        UserError: no such file, one that is not YAML, an unknown flag, or a value that its flag
            does not take.
    """
    content = _section(_content(path), path, command, commands)
    entries = {entry.name: (group, entry) for group in groups[::-1] for entry in fields(group)}
    aliases = {
        entry.metadata["alias"].lstrip("-"): name
        for name, (_, entry) in entries.items()
        if entry.metadata["alias"]
    }
    values = {}
    for key, text in content.items():
        name = key.lstrip("-").replace("-", "_")
        name = aliases.get(name, name)
        if name not in entries:
            hint = did_you_mean(name, entries, f"guided-diffusion {command} --help_all lists all.")
            raise UserError(path, f"{key} is no flag of {command}", hint)
        values[name] = _value(*entries[name], text, path)
    return values


def _content(path: str) -> dict[str, Any]:
    """Read a mapping whose values are texts, lists or mappings."""
    import yaml

    hint = "Name a file of flags, such as the config.yaml of a run."
    try:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError("--config", f"there is no file {path}", hint)
        if file.stat().st_size > MOST_BYTES:
            raise UserError(path, "is too large for a file of flags", hint)
        text = file.read_text("utf-8-sig")
        if text.count("[") + text.count("{") > MOST_BRACKETS:
            raise UserError(path, "is too deep for a file of flags", hint)
        found = yaml.load(text, yaml.BaseLoader)  # texts, no objects
    except (yaml.YAMLError, RecursionError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(path, f"is not YAML ({why})", hint) from error
    if found in (None, ""):
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(path, "does not hold flags with values", hint)
    return found


def _section(
    content: dict[str, Any], path: str, command: str, commands: Sequence[str]
) -> dict[str, Any]:
    """Choose what concerns a command: its section, or all where there are no sections."""
    sections = [name for name in content if name in commands]
    if not any(isinstance(content[name], dict) for name in sections):
        return content
    if command not in content:
        hint = f"It has those of {', '.join(sections)}."
        raise UserError(path, f"has no section {command}", hint)
    own = content[command] or {}
    own = own.get(GIVEN, own) if isinstance(own, dict) else own
    if not isinstance(own or {}, dict):
        raise UserError(path, f"section {command} does not hold flags with values", "Correct it.")
    return own or {}


def _value(group: type, entry: Any, text: Any, path: str) -> Any:
    """Convert a text, or a list of texts, to the type of its flag."""
    kind, words = get_type_hints(group)[entry.name], entry.metadata["words"]
    what = f"{path}, {entry.name}"
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        if words and len(text) == len(words):
            return text
        text = ",".join(text) if kind is str else text
    if not isinstance(text, str) or words:
        takes = f"{len(words)} texts" if words else KINDS[kind]
        raise UserError(what, f"{_shown(text)} is not {takes}", f"Give {takes}.")
    if text in NOTHING or (not text and kind is not str):
        raise UserError(what, "has no value", "Omit it for the default.")
    try:
        value = str2bool(text) if kind is bool else kind(text)
    except (ValueError, ArgumentTypeError):
        raise UserError(what, f"{text!r} is not {KINDS[kind]}", f"Give {KINDS[kind]}.") from None
    if problem := unfit(entry, value):
        choices = entry.metadata["choices"]
        hint = choices_hint(choices) if choices else f"The default is {entry.default}."
        raise UserError(what, problem if choices else f"{value} {problem}", hint)
    return value


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a group of names"
    return "a list" if isinstance(value, list) else repr(value)
