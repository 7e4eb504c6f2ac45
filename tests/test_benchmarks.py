"""The benchmarks: versions (finished runs are kept), method and device."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file

from guided_diffusion.checkpoint import latest_checkpoint, load_checkpoint
from guided_diffusion.ensemble import BLENDS
from guided_diffusion.inference.plan import make_plan
from guided_diffusion.layouts import open_dataset
from guided_diffusion.options.segmentation import RunOptions, SamplingOptions
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.tools import phantom_folders

CPU = torch.device("cpu")


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


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("method")


def test_members_are_compared_with_each_other_and_with_the_truth(method: ModuleType) -> None:
    """Masks of 2, 2 and 0 pixels: 1 - Dice is 1/2, 1 and 1 among them, 1/3, 1/3 and 1 with one."""
    members = torch.tensor([[[1, 1, 0]], [[1, 0, 1]], [[0, 0, 0]]]).bool()
    truth = torch.tensor([[[1, 0, 0]]]).bool()[0]
    between, wrong = method.distances(members, truth)
    assert between == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert wrong == pytest.approx((1 / 3 + 1 / 3 + 1) / 3)
    empty = torch.zeros(2, 1, 3).bool()
    assert method.distances(empty, empty[0]) == (0.0, 0.0)


def test_the_finals_are_chosen_by_validation(method: ModuleType) -> None:
    def line(recipe: str, stage: str = "screen", **dice: float) -> dict[str, Any]:
        found = {name.replace("_", " "): {"dice": value} for name, value in dice.items()}
        return {"recipe": recipe, "stage": stage, "validation": found}

    done = [
        line("unet", direct=0.99),
        line("a", **{"direct": 0.7, "1 x 4": 0.9}),
        line("b", **{"direct": 0.8, "1 x 4": 0.6}),
        line("c", **{"direct": 0.5, "1 x 4": 0.5}),
        line("d", "finals", **{"direct": 1.0, "1 x 4": 1.0}),
        line("x0 mse", **{"1 x 4": 0.95}),
    ]
    assert method.best(done, 2) == ["a", "b"]


def test_every_recipe_can_be_built_and_asked(method: ModuleType) -> None:
    for flags in method.recipes().values():
        net, diffusion = create_model_and_diffusion(
            **method.NETWORK, **flags, image_size=64, in_ch=4
        )
        for asked in method.evaluations(flags).values():
            make_plan(SamplingOptions(**asked), RunOptions(), diffusion, device=CPU, own=True)
        assert (diffusion.mask_dropout > 0) == ("direct" in method.evaluations(flags))
        assert (net.mask_channels, net.in_channels) == (1, 4)


def test_the_stored_runs_name_recipes_and_settings(method: ModuleType) -> None:
    """What the tables are made of: flags as they are now, and the Dice of every test case."""
    lines = method.read(ROOT / "results/method.jsonl")
    for line in lines:
        assert line["flags"] == method.recipes()[line["recipe"]]
        for found in line.get("test", {}).values():
            assert sum(found["cases"]) / len(found["cases"]) == pytest.approx(
                found["dice"], abs=1e-4
            )
    assert (ROOT / "results/method.md").read_text(encoding="utf-8") == method.tables(lines)


def test_a_run_after_a_torn_line_has_a_line_of_its_own(
    method: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (ROOT / "results/method.jsonl").read_text(encoding="utf-8").splitlines()[0]
    out = tmp_path / "method.jsonl"
    out.write_text(whole + '\n{"stage": "scr', encoding="utf-8")
    (tmp_path / "isbi2016_256/Train").mkdir(parents=True)
    monkeypatch.setattr(method, "load", lambda *_: None)
    monkeypatch.setattr(method, "results", lambda *_: [json.loads(whole)])
    words = ["--data", tmp_path, "--out", out, "--sets", "isic", "--stages", "screen"]
    monkeypatch.setattr(sys, "argv", ["method.py", *map(str, words)])
    monkeypatch.setattr(method, "DATA", {})
    method.main()
    assert len(method.read(out)) >= 2


def test_the_best_weights_in_validation_become_the_starter(
    method: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the shipped weights and those of a new network, the shipped ones come out again."""
    starter = importlib.import_module("starter")
    phantom_folders.write_isic(tmp_path / "isbi2016_256", 0, patients=4, size=64, training=0.75)
    names = [entry.name for entry in open_dataset(tmp_path / "isbi2016_256/Train").entries]
    parts = ("training", "validation", "validation")
    lines = (f"{name} {part}\n" for name, part in zip(names, parts, strict=True))
    (tmp_path / "isic.txt").write_text("".join(lines))
    monkeypatch.setattr(starter, "SPLITS", tmp_path)
    shipped = load_file(ROOT / "guided_diffusion/weights/isic-small.safetensors")
    for seed in (1, 2):
        weights = {name: value.float() * (seed - 1) for name, value in shipped.items()}
        torch.save(weights, tmp_path / f"isic-{starter.RECIPE}-{seed}-64-1200.pt")
    out = tmp_path / "best.safetensors"
    words = ["--data", tmp_path, "--weights", tmp_path, "--out", out]
    monkeypatch.setattr(sys, "argv", ["starter.py", *map(str, words)])
    starter.main()
    written, known = load_checkpoint(out), load_checkpoint(latest_checkpoint("isic-small"))
    assert (written.options, written.step) == (known.options, known.step)
    assert written.run["given"] == {"preset": "small", "seed": 2}
    assert all(torch.equal(value, shipped[name]) for name, value in written.model.items())


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
    assert sum(line.startswith("| the parents' procedure, fp32 | 1 |") for line in lines) == 1
    rows = [line for line in lines if "| ours" in line or "| the parents' procedure, batch" in line]
    table = [line.split(" | ") for line in rows]
    assert [row[0].removeprefix("| ") for row in table] == [
        "the parents' procedure, batch 1, fp32",
        *("ours, fp32", "ours, bf16"),
    ]
    first = float(table[0][1])
    for _, rate, times, *_ in table:
        assert float(times) == pytest.approx(float(rate) / first, abs=0.01)
    assert sum(line.startswith(("| plain", "| --use_checkpoint")) for line in lines) == 4


def run_of(recipe: str, seed: int | str, cases: Sequence[float], **more: Any) -> dict[str, Any]:
    """A line of the finals on the BraTS slices, with one answer."""
    answer = {"cases": [*cases], "dice": sum(cases) / len(cases)}
    return {"stage": "finals", "set": "brats", "recipe": recipe, "seed": seed, **more} | {
        "test": {"direct": answer}
    }


def test_differences_are_those_of_the_seeds_that_both_have(method: ModuleType) -> None:
    """The U-Net's third seed, of 0, has no partner; patients a and b differ by 0.2 and 0.1."""
    tables = importlib.import_module("method_tables")
    lines = [
        *(run_of("unet", seed, [0.5, 0.5, 0.6]) for seed in (1, 2)),
        run_of("unet", 3, [0.0, 0.0, 0.0]),
        run_of("ours", 1, [0.6, 0.8, 0.7]),
        run_of("ours", 2, [0.6, 0.8, 0.7]),
    ]
    text = tables.differences(lines, ["a", "a", "b"])
    assert "| patient a | patient b |" in text
    (row,) = [row for row in text.splitlines() if row.startswith("| ours")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["ours", "1, 2", "direct", "+0.1667"]
    assert cells[4:] == ["+0.1000", "+0.2000", "+0.2000", "+0.1000"]
    assert len(tables.patients("brats")) == 126 and tables.patients("isic") is None


def test_members_are_chosen_among_those_that_spread_as_they_err(method: ModuleType) -> None:
    found = {
        "direct": {"spread_skill": None, "dice": 0.9},
        "alike": {"spread_skill": 0.5, "dice": 0.89},
        "fitting": {"spread_skill": 1.08, "dice": 0.87},
        "nearer, but worse": {"spread_skill": 1.0, "dice": 0.8},
    }
    assert method.spreading(found) == "fitting"
    assert method.spreading({name: found[name] for name in ("direct", "alike")}) == "alike"


def test_figures_show_what_the_stored_runs_say(method: ModuleType) -> None:
    figures = importlib.import_module("figures")
    curve = [(10, 0.01, 0.1), (30, 0.99, 0.9)]
    sums = figures.as_sums(curve)
    assert sums[0] == pytest.approx([10, 0.1, 1.0]) and sums[-1] == pytest.approx([30, 29.7, 27])
    assert sums.sum() == pytest.approx(10 + 0.1 + 1 + 30 + 29.7 + 27)

    lines = method.read(ROOT / "results/method.jsonl")
    finals = [line for line in lines if line["stage"] == "finals"]
    drawn = figures.evaluations(lines)
    level = figures.dice_of(finals, "isic", "unet", "direct")
    assert f"| unet | 3 | direct | {level:.4f} ± " in method.tables(finals)
    shown = [list(line.get_ydata()) for line in drawn.axes[0].lines]
    assert [level, level] in shown


@pytest.mark.slow
def test_trainings_at_full_size_continue_in_their_next_turn(
    method: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_size = importlib.import_module("full_size")
    (tmp_path / "brats15_2d").symlink_to(ROOT / "data")
    small = ("--image_size", "32", "--num_channels", "32", "--channel_mult", "1,2")
    small += ("--attention_resolutions", "16", "--num_res_blocks", "1", "--batch_size", "2")

    def run(steps: int, cases: int) -> str:
        words = ("--data", tmp_path, "--out", tmp_path / "out", "--presets", "wolleb")
        words += ("--runs", tmp_path / "runs.jsonl", "--cases", cases, "--max_steps", steps)
        monkeypatch.setattr(sys, "argv", ["full_size.py", *map(str, words), "--flags", *small])
        full_size.main()
        return (tmp_path / "runs.md").read_text(encoding="utf-8")

    assert "| brats | wolleb | 1 | " in run(1, cases=0)
    assert "| brats | wolleb | 3 | " in run(3, cases=1)
    first, second = full_size.read(tmp_path / "runs.jsonl")
    assert (first["steps"], second["steps"], second["step"]) == (1, 2, 3)
    assert 0 <= second["dice"] <= 1
    run(3, cases=1)
    assert len(full_size.read(tmp_path / "runs.jsonl")) == 2


def test_the_profile_counts_a_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the profiler lists them: a kernel, the operation that launched it, a range around both."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    device = importlib.import_module("device")
    kinds = torch.autograd.DeviceType

    def entry(key: str, kind: Any, named: bool = False) -> Any:
        return SimpleNamespace(
            key=key, device_type=kind, is_user_annotation=named, self_device_time_total=5.0
        )

    listed = [entry("aten::conv2d", kinds.CPU), entry("gemm_kernel", kinds.CUDA)]
    listed += [entry("Optimizer.step", kinds.CUDA, named=True), entry("copy", kinds.CUDA)]
    assert device.kernel_times(listed) == {"gemm_kernel": 5.0, "copy": 5.0}


def test_the_table_of_memory(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    memory = importlib.import_module("memory")
    words = ["memory.py", "--sizes", "32", "--versions", "plain", "--precision", "bf16"]
    monkeypatch.setattr(sys, "argv", words)
    memory.main()
    said = capsys.readouterr().out
    assert "simulated" in said or torch.cuda.is_available()
    values = [float(line.split(" | ")[2].rstrip(" |")) for line in said.splitlines()[4:]]
    assert len(values) == 3 and values == sorted(values, reverse=True) and values[0] > 0


# ---------------------------------------------------------------------- the plan for many devices


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("cluster")


def parts_of(cluster: ModuleType, **changes: float) -> Any:
    """A step of 0.9 s, 0.6 of it backward; 100 bytes of gradients in 10 buckets."""
    known = {
        **{"step": 0.9, "backward": 2 / 3, "batch": 8, "gradients": 100, "bucket": 10},
        **{"inside": 1000.0, "between": 100.0, "latency": 0.0, "node": 8},
        **{"reading": 1e9, "shared": 1e9, "checkpoint": 0, "writing": 1.0, "interval": 1},
    }
    return cluster.Parts(**{**known, **changes})


def test_the_exchange_is_that_of_a_ring(cluster: ModuleType) -> None:
    """Of 2 processes each sends its 100 bytes once, of many nearly twice, over the slower link."""
    parts = parts_of(cluster)
    times = [cluster.exchange_time(count, parts) for count in (1, 2, 4, 8, 16)]
    assert times == pytest.approx([0, 0.1, 0.15, 0.175, 1.875])
    late = cluster.exchange_time(8, parts_of(cluster, latency=0.001))
    assert late == pytest.approx(0.175 + 10 * 6 * 0.001)


@pytest.mark.parametrize("exchange", [0.0, 0.1, 0.5, 0.6, 0.7, 3.0])
@pytest.mark.parametrize("number", [1, 2, 10])
def test_what_the_backward_pass_does_not_hide(
    cluster: ModuleType, exchange: float, number: int
) -> None:
    """The same as going through the buckets, each of which waits for itself and the one before."""
    parts = parts_of(cluster, bucket=100 // number)
    assert cluster.buckets(parts) == number
    end = 0.0
    for bucket in range(1, number + 1):
        end = max(end, 0.6 * bucket / number) + exchange / number
    assert cluster.exposed_time(exchange, parts) == pytest.approx(end - 0.6)


def test_the_slowest_part_decides(cluster: ModuleType) -> None:
    assert cluster.step_on(1, parts_of(cluster)).seconds == pytest.approx(0.9)
    assert cluster.step_on(2, parts_of(cluster)).seconds == pytest.approx(0.91)
    read = cluster.step_on(64, parts_of(cluster, between=1e9, shared=128.0))
    assert read.seconds == read.reading == pytest.approx(4)  # 2 of 8 images in a second
    written = cluster.step_on(1, parts_of(cluster, checkpoint=300, writing=10.0, interval=20))
    assert written.seconds == written.writing == pytest.approx(1.5)


def test_the_plan_is_marked_as_a_model(
    cluster: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--image_size", "32", "--num_channels", "32", "--num_res_blocks", "1"]
    monkeypatch.setattr(sys, "argv", ["cluster.py", *small, "--step", "0.5", "--gpus", "1", "16"])
    cluster.main()
    said = capsys.readouterr().out
    assert said.startswith("**A model, not a measurement**")
    assert "| seconds of a step of one GPU | 0.5 | given |" in said and "HDR InfiniBand" in said
    rows = [line.split(" | ") for line in said.splitlines() if line.endswith("| model |")]
    assert [row[0] for row in rows] == ["| 1", "| 16"]
    net, _ = create_model_and_diffusion(image_size=32, num_channels=32, num_res_blocks=1)
    assert cluster.gradient_bytes(net) == 4 * sum(p.numel() for p in net.parameters())

    found = {"step": 0.25, "backward": 0.5, "writing": 2.0}
    monkeypatch.setattr(cluster, "measure", lambda _: found)
    monkeypatch.setattr(sys, "argv", ["cluster.py", *small, "--measure", "--writing", "3"])
    cluster.main()
    said = capsys.readouterr().out
    assert "| seconds of a step of one GPU | 0.25 | measured on cpu" in said
    assert "| GB/s of writing | 3 | given |" in said
    assert said.count("| measured |") == 1 and said.count("| model |") == 6
