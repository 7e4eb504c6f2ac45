"""The benchmark of weak supervision: its data, its rows by value, and its page."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, script, succeeded
from PIL import Image
from skimage.filters import threshold_otsu

from guided_diffusion.data.tumorloader import TumourImages, patient_of


@pytest.fixture
def weak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, whose scripts run in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    weak = importlib.import_module("weak")

    def run(name: object, *words: object) -> float:
        succeeded(script(str(name), *words))
        return 0.5

    monkeypatch.setattr(weak, "run", run)
    return weak


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_halves_hold_a_lesion_or_none_at_the_same_heights(
    weak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = importlib.import_module("weak_halves")
    for name, pixels_of_80 in (("HEIGHT", 58), ("WIDTH", 26), ("SMALLEST", 5)):
        monkeypatch.setattr(halves, name, pixels_of_80)
    taken = halves.write_halves(ROOT / "data" / "training", tmp_path)
    labels = TumourImages(tmp_path).labels
    heights: dict[int, list[Any]] = {0: [], 1: []}
    for name, label in labels.items():
        heights[label].append((patient_of(name), int(name[-3:])))
    assert taken == len(heights[0]) > 0 and sorted(heights[0]) == sorted(heights[1])
    for path in (tmp_path / "seg").iterdir():
        assert (pixels(path) > 0).sum() >= 5
        assert pixels(path).shape == pixels(tmp_path / "tumor" / path.name).shape == (58, 26)


def test_both_halves_face_the_same_way(weak: ModuleType) -> None:
    halves = importlib.import_module("weak_halves")
    values = np.abs(np.arange(240) - 119.5)[:, None] * np.ones((1, 240))
    middle = halves.middle((values < 70).any(axis=1))
    left, right = halves.halves(values, middle, 120)
    assert middle == 120 and (left == right).all() and (left[0, :3] == [0.5, 1.5, 2.5]).all()


@pytest.mark.slow
def test_rows_are_scores_of_the_methods_and_are_kept(
    weak: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    words = ["--data", tmp_path, "--out", tmp_path, "--rows", rows, "--tasks", "phantoms"]
    words += ["--seeds", 1, "--image_size", 16, "--patients", 20, "--batch_size", 2]
    words += ["--diffusion_steps", 2, "--classifier_steps", 2, "--supervised_steps", 2]
    words += ["--chosen_on", 1, "--cases", 2]
    monkeypatch.setattr(sys, "argv", ["weak.py", *map(str, words)])
    few = {name: walks[:1] for name, walks in weak.candidates().items()}
    monkeypatch.setattr(weak, "CUTS", weak.CUTS[:2])
    monkeypatch.setattr(weak, "candidates", lambda: few)
    weak.main()
    found = {row["method"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert {*found} == {
        *(*weak.FIXED, *weak.candidates(), weak.SAME_CLASS),
        *(*weak.WITH_MASKS, weak.CEILING, weak.STUDENT),
    }
    dices = []
    for name in ("phantom_019_", "phantom_019_"):
        own = sorted((tmp_path / "phantoms/data/validate/tumor").glob(f"{name}*"))
        path = own[len(dices) * len(own) // 2]
        grey, truth = pixels(path), pixels(path.parents[1] / "seg" / path.name) > 0
        mask = grey > threshold_otsu(grey)
        dices.append(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    assert found["Otsu"]["dice"] == pytest.approx(np.mean(dices), abs=0.002)
    assert 0.7 < found[weak.CEILING]["dice"] < 1
    assert found["encoded"]["settings"] in [
        {**walk, **cut} for walk in weak.candidates()["encoded"] for cut in weak.CUTS
    ]
    before = rows.read_bytes()
    weak.main()
    assert rows.read_bytes() == before


def test_the_preset_is_the_best_of_both_tasks_on_training_images(
    weak: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.7 + 0.7 is more than 0.9 + 0.1 and 0.2 + 0.8."""
    dices = {"halves": [0.9, 0.7, 0.2], "phantoms": [0.1, 0.7, 0.8]}

    class Fake:
        def __init__(self, arguments: object, task: str, seed: int) -> None:
            self.task, self.seed, self.known = task, seed, []

        def lacks(self, method: str) -> bool:
            return method != "encoded"

        def tried(self, method: str) -> list[tuple[float, dict[str, int]]]:
            return [(dice, {"level": k}) for k, dice in enumerate(dices[self.task])]

        def cases(self, *part: str, **of: int) -> list[str]:
            return []

        def score_weak(self, method: str, cases: object, settings: object) -> object:
            return self.task, self.seed, method, settings

    monkeypatch.setattr(weak, "Study", Fake)
    arguments = SimpleNamespace(tasks=["halves", "phantoms", "slices"], seeds=[1, 2], cases=0)
    assert [*weak.preset_rows(arguments)] == [
        (task, seed, weak.PRESET, {"level": 1}) for task in dices for seed in (1, 2)
    ]


def test_the_page_says_first_where_nothing_beats_the_threshold_of_the_image(
    weak: ModuleType,
) -> None:
    page = importlib.import_module("weak_tables")

    def row(method: str, dice: float, seed: int) -> dict[str, Any]:
        return {
            **{"task": "halves", "method": method, "seed": seed, "dice": dice, "images": 9},
            **{"patients": {"a_1": dice}, "auroc": 0.9, "average_precision": 0.5, "seconds": 0.1},
            **{"settings": {}, "minutes": {}, "image_size": 48, "steps": 9, "device": "CPU"},
            **{"torch": "2", "commit": "c"},
        }

    rows = [row("Otsu twice", 0.7, 1), row("encoded", 0.6, 1), row("encoded", 0.7, 2)]
    said = page.tables([*rows, row("plain U-Net", 0.9, 1)])
    title, _, first = said[said.index("## ") :].splitlines()[:3]
    assert title == "## BraTS half-slices at equal heights"
    assert first == "**No method beats the threshold of the image, which has 0.700.**"
    assert "| encoded | 0.650 ± 0.071 (2 seeds) | 1 0.650 |" in said
    said = page.tables([*rows, row("encoded", 0.9, 3)])
    assert "No method" not in said and "Above the threshold of the image (0.700): encoded." in said
