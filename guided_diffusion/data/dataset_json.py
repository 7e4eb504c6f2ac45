"""What ``dataset.json`` says of nnU-Net's and the Decathlon's data, in words for the log."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from guided_diffusion.files import read_text

RECORD = "dataset.json"


def json_notes(folder: Path, *, one_class: bool) -> list[str]:
    """The names of channels, and for ``one_class`` the ``--mask_labels`` that names the labels.

    Nothing where the file is absent, or not what those tools write.
    """
    broken = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
    with suppress(OSError, *broken):
        facts = json.loads(read_text(folder / RECORD))
        return [*_channels(facts), *(_labels(facts) if one_class else [])]
    return []


def _channels(facts: Mapping[str, Any]) -> list[str]:
    names = facts.get("channel_names") or facts.get("modality") or {}
    ordered = [str(names[key]) for key in sorted(names, key=int)]
    return [f"{RECORD} calls the channels {', '.join(ordered)}"] if ordered else []


def _labels(facts: Mapping[str, Any]) -> list[str]:
    """Both forms: nnU-Net's name to number, or list of numbers, and the former number to name."""
    found: dict[str, list[int]] = {}
    for key, value in (facts.get("labels") or {}).items():
        old = str(key).isdecimal() and isinstance(value, str) and not value.isdecimal()
        name, numbers = (value, [int(key)]) if old else (key, value)
        numbers = numbers if isinstance(numbers, list) else [int(numbers)]
        if numbers != [0] and str(name).lower() != "ignore":
            found[re.sub(r"[^\w-]+", "_", str(name)).strip("_")] = [int(n) for n in numbers]
    if len(found) < 2:
        return []
    items = (f"{name}={'+'.join(map(str, numbers))}" for name, numbers in found.items())
    return [f"all labels are one class; {RECORD} names them: --mask_labels {','.join(items)}"]
