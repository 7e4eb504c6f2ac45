"""The benchmarks: versions (finished runs are kept, a U-Net without diffusion) and device."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import ROOT
from torch.testing import assert_close

from guided_diffusion.ensemble import BLENDS
from guided_diffusion.nn import Output
from guided_diffusion.schedule import NoiseLevel, NoiseSchedule


@pytest.fixture(scope="module")
def versions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("versions", ROOT / "benchmarks/versions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_finished_runs_are_kept(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, runs = tmp_path / "versions.jsonl", []

    def fake_run(key: dict[str, Any], *rest: object) -> dict[str, Any]:
        runs.append((key["method"], key["seed"], key["evaluations"]))
        score = 0.5 + 0.1 * key["seed"]
        rules = BLENDS if key["method"] == "2" else ["none"]
        return {
            "dice": dict.fromkeys(rules, score),
            **{"steps": 7, "parameters": 2_000_000, "device": "cpu", "torch": "2"},
            **{"ms_per_evaluation": 3.0, "ms_per_image": 1.0},
        }

    def run(*methods: str, seeds: Sequence[int]) -> list[tuple[str, int, int]]:
        runs.clear()
        arguments = ["--data", ROOT / "data", "--out", out]
        arguments += ["--methods", *methods, "--seeds", *seeds]
        monkeypatch.setattr(sys, "argv", ["versions.py", *map(str, arguments)])
        versions.main()
        return list(runs)

    monkeypatch.setattr(versions, "run", fake_run)
    assert run("unet", "2", seeds=[1]) == [("unet", 1, 1), ("2", 1, 5)]
    whole = out.read_text()
    out.write_text(whole + '{"set": "demo", "meth')  # a run that was killed while it wrote
    assert run("unet", "2", seeds=[1, 2]) == [("unet", 2, 1), ("2", 2, 5)]
    assert run("unet", "2", seeds=[1, 2]) == []

    rows = out.with_suffix(".md").read_text().splitlines()
    figures = "| 0.6500 ± 0.0707 | 2 | 2.00 | 7 | 3.00 | 1.00 |"
    assert f"| the same U-Net, no diffusion {figures}" in rows
    assert f"| version 2 {figures}" in rows
    assert f"| version 2 {'| 0.6500 ± 0.0707 ' * 5}|" in rows


def test_the_network_without_diffusion_predicts_in_one_evaluation(versions: ModuleType) -> None:
    """Its loss is Dice + cross-entropy of its output for an empty mask at t = 0."""
    diffusion = versions.Direct(NoiseSchedule.named("linear", 50), mask_range=(-1.0, 1.0))
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def net(x: torch.Tensor, t: torch.Tensor, condition: None, y: None) -> Output:
        inputs.append((x, t))
        return Output(torch.zeros_like(x))

    truth = torch.tensor([[[[1.0, -1.0], [-1.0, -1.0]]]])
    terms = diffusion.training_losses(
        net, truth, torch.tensor([30]), eps=torch.randn_like(truth), condition=None
    )
    assert_close(terms["loss"], torch.tensor([0.5 + 0.6931472]))
    level = NoiseLevel(30.0, 0.6, 0.8)
    prediction = diffusion.denoiser(net, None)(torch.randn_like(truth), level)
    assert_close(prediction.x0, torch.zeros_like(truth))
    assert not any(x.any() or t.any() for x, t in inputs)


@pytest.mark.slow
def test_the_device_benchmark(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """At a small size on any device: each setting has a row, compared with the first one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    device = importlib.import_module("device")
    small = "--image_size 32 --num_channels 32 --num_res_blocks 1 --images 1 --steps 2 --repeats 1"
    flags = [*small.split(), "--batches", "1", "2", "--compile", ""]
    monkeypatch.setattr(sys, "argv", ["device.py", *flags])
    device.main()
    lines = capsys.readouterr().out.splitlines()
    table = [line.split(" | ") for line in lines if "| ours" in line or "| the parents'" in line]
    assert [row[0].removeprefix("| ") for row in table] == [
        "the parents' procedure, batch 1, fp32",
        *("ours, fp32", "ours, bf16"),
    ]
    first = float(table[0][1])
    for _, rate, times, *_ in table:
        assert float(times) == pytest.approx(float(rate) / first, abs=0.01)
    assert sum(line.startswith(("| plain", "| --use_checkpoint")) for line in lines) == 4
