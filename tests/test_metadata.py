"""What is installed: the ranges, the pins, the locked list with its hashes, and the licences."""

from __future__ import annotations

import re
import runpy

from helpers import ROOT
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

SETUP = (ROOT / "setup.py").read_text("utf-8")
LOCK = (ROOT / "requirements-dev.lock.txt").read_text("utf-8")
LOCKED = {
    name: (Requirement(name), hashes)
    for name, hashes in runpy.run_path(str(ROOT / "docs/lock.py"))["blocks"](LOCK).items()
}


def required() -> list[Requirement]:
    """The lines of requirements.txt and requirements-dev.txt."""
    files = [ROOT / name for name in ("requirements.txt", "requirements-dev.txt")]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and line[0] not in "#-"]


def ranges() -> list[Requirement]:
    """What setup.py asks for, extras included."""
    return [Requirement(text) for text in re.findall(r'"([a-z-]+>=[^"]+)"', SETUP)]


def version_of(locked: Requirement) -> Version:
    (one,) = locked.specifier
    assert one.operator == "=="
    return Version(one.version)


def test_the_locked_list_is_that_of_the_requirements() -> None:
    for wanted in required():
        name = canonicalize_name(wanted.name)
        locked = [entry for entry, _ in LOCKED.values() if entry.name == name]
        assert locked, f"{name} is not locked: make lock"
        for entry in locked:
            assert version_of(entry) in wanted.specifier, f"{entry}: make lock"


def test_a_locked_package_has_one_version_for_each_python() -> None:
    for minor in ("3.11", "3.12", "3.13", "3.14"):
        python = {"python_version": minor, "python_full_version": f"{minor}.0"}
        names = [
            entry.name
            for entry, _ in LOCKED.values()
            if Marker(str(entry.marker or "python_version > '3'")).evaluate(python)
        ]
        assert len(names) == len(set(names)) > 40


def test_every_locked_package_has_hashes_and_no_address() -> None:
    for _, hashes in LOCKED.values():
        assert hashes
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes)
    assert "://" not in LOCK and not re.search(r"^(nvidia|cuda|triton|-)", LOCK, re.MULTILINE)


def test_ranges_admit_what_is_pinned_and_begin_with_what_was_tried() -> None:
    pinned = {canonicalize_name(pin.name): pin for pin in required()}
    tried = dict(re.findall(r"\b([a-z-]+)\s([\d.]+\d)\b", SETUP.split("Of older ones")[0]))
    for wanted in ranges():
        if wanted.name in pinned:
            assert version_of(pinned[wanted.name]) in wanted.specifier
        (least,) = [part.version for part in wanted.specifier if part.operator == ">="]
        if wanted.name in tried:
            assert Version(tried[wanted.name]) == Version(least)
    assert {wanted.name for wanted in ranges()} >= {*tried} >= {"torch", "numpy", "pydicom"}


def test_every_dependency_has_its_licence_in_the_pages() -> None:
    page = (ROOT / "docs/development.md").read_text("utf-8")
    table = page.split("## Licences")[1].split("## Style")[0]
    named = set(re.findall(r"[a-z][\w-]+", table))
    needed = {entry.name for entry, _ in LOCKED.values()} | {wanted.name for wanted in ranges()}
    assert needed <= named, f"without a licence: {sorted(needed - named)}"
