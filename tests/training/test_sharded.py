"""A network that is divided between two processes trains as one in a single process does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, script, succeeded, torchrun, training
from loops import equal
from sharded_programs import NARROW, STEPS, VERSIONS, make_version_loop, three_steps
from torch.testing import assert_close

from guided_diffusion import dist_util
from guided_diffusion.checkpoint import LATEST, Checkpoint, load_checkpoint, save_checkpoint
from guided_diffusion.checkpoint.sharded import remove_unnamed
from guided_diffusion.dist_util import _refuse_mixed_code
from guided_diffusion.errors import UserError
from guided_diffusion.networks import highway, medsegdiff
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.network import DiffusionOptions, NetworkOptions
from guided_diffusion.options.segmentation import RunOptions, TrainingOptions
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.training import estimates
from guided_diffusion.training.estimates import (
    check_size,
    divides,
    fewest_processes,
    sharded_gib,
    training_gib,
)
from guided_diffusion.training.resolve import refuse_undivided

PROGRAM = ROOT / "tests" / "sharded_programs.py"
NOISE = 1e-6
"""A gradient below this share of the largest is rounding alone."""


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("versions")
    done = torchrun(2, PROGRAM, "versions", folder, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}") for rank in (0, 1)]


@pytest.fixture(scope="module")
def runs(brats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes: uninterrupted, killed and resumed, from a plain file, and refused."""
    root = tmp_path_factory.mktemp("runs")

    def command(name: str, *more: object) -> list[Any]:
        flags = training(brats, root / name)
        flags[flags.index("--batch_size") + 1] = 1
        return [*flags, "--cache_dir", "none", "--fsdp", "on", "--max_steps", 4, *more]

    plain = [*training(brats, root / "alone"), "--max_steps", 2]
    succeeded(script("segmentation_train", *plain))
    killed = torchrun(2, PROGRAM, "kill", root, *command("killed"), timeout=400)
    assert killed.returncode != 0
    shutil.copytree(root / "killed", root / "before")
    damaged = root / "killed" / "damaged.pt"
    shutil.copy(root / "killed" / LATEST, damaged)
    shutil.copytree(root / "killed", root / "changed")
    (shard,) = (root / "changed").glob("savedmodel000002-*/__1_0.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    damaged.unlink()

    fixed = ("--lr", 0, "--max_steps", 3, "--resume_checkpoint")
    words = " ".join(map(str, command("three", "--max_steps", 2)))
    more = " ".join(map(str, command("of_fewer", *fixed, root / "before" / LATEST)))
    done = torchrun(3, PROGRAM, "runs", root, f"{words} + {more}", timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]

    watched = ("--val_dir", brats / "testing", "--val_interval", 1, "--val_steps", 1)
    commands = [
        command("whole"),
        command("killed", "--resume", "auto"),
        command("from_plain", "--resume_checkpoint", root / "alone" / LATEST, "--max_steps", 3),
        command("changed", "--resume", "auto"),
        command("validated", *watched, "--max_steps", 2, "--keep", 1),
        command("of_more", *fixed, root / "three" / LATEST),
    ]
    words = " + ".join(" ".join(map(str, words)) for words in commands)
    done = torchrun(2, PROGRAM, "runs", root, words, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("version", [*VERSIONS, "2 recomputed"])
def test_three_steps_are_those_of_a_single_process(
    version: str, versions: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias in front of a normalisation of its channel alone has the gradient 0 but for rounding,
    and Adam divides it by its own size: such a bias moves by up to the rate at each step, in either
    direction, without effect on what the network predicts. All others agree."""
    for module in (highway, medsegdiff):
        monkeypatch.setattr(module, "WIDTHS", NARROW)
    loop = make_version_loop(version[:5].split()[0], tmp_path, sharded=False)
    alone, both = three_steps(loop), versions[0][version]
    assert equal(both["gradients"], versions[1][version]["gradients"])
    largest = max(float(value.abs().max()) for value in alone["gradients"][0].values())
    for name, value in alone["gradients"][0].items():
        atol = 1e-5 * float(value.abs().max()) + NOISE * largest
        assert_close(both["gradients"][0][name], value, rtol=1e-4, atol=atol, msg=name)
    assert_close(both["norms"], alone["norms"], rtol=1e-4, atol=0)

    noise = {
        name
        for name in alone["gradients"][0]
        if max(float(step[name].abs().max()) for step in alone["gradients"]) < NOISE * largest
    }
    assert all(name.endswith(".bias") for name in noise)
    for kind in ("model", "average"):
        for name, value in alone[kind].items():
            moved = STEPS * 2e-3 if name in noise else 2e-5
            assert_close(both[kind][name], value, rtol=0, atol=moved, msg=name)
    other = make_version_loop(version[:5].split()[0], tmp_path, sharded=False)
    other.net.load_state_dict(both["model"])
    x, t = torch.ones(1, 1, 32, 32), torch.tensor([7])
    one, two = (each.net(x, t, each.net.encode(x)).raw for each in (loop, other))
    assert_close(one, two, rtol=1e-3, atol=1e-4 * float(one.detach().abs().max()))


@pytest.mark.slow
def test_processes_hold_equal_buffers_and_different_shares(versions: list[dict[str, Any]]) -> None:
    one, other = versions
    assert one["buffers"] and equal(one["buffers"], other["buffers"])
    assert one["share"] + other["share"] == one["all"]
    assert (one["made"], other["made"]) == (["meta", "cpu"], ["meta"]), "one has it whole, at first"
    assert abs(one["share"] - other["share"]) < 0.1 * one["all"]


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_process_changes_nothing_in_any(
    versions: list[dict[str, Any]],
) -> None:
    for found in versions:
        assert found["unchanged"] and equal(found["buffers"], found["buffers after"])


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(runs: Path) -> None:
    before, resumed, whole = (
        load_checkpoint(runs / name / LATEST) for name in ("before", "killed", "whole")
    )
    assert (before.step, resumed.step, whole.step) == (2, 4, 4)
    for part in ("model", "ema", "training"):
        assert equal(getattr(resumed, part), getattr(whole, part))
    assert len(list((runs / "before").glob("savedmodel000004-*"))) == 1, "it was not completed"
    names = sorted(path.name[:16] for path in (runs / "killed").glob("*.shards"))
    assert names == ["savedmodel000002", "savedmodel000004"], "what was not completed is gone"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("earlier", "later", "count", "now"), [("three", "of_more", 3, 2), ("before", "of_fewer", 2, 3)]
)
def test_shards_of_more_or_fewer_processes_are_divided_anew(
    runs: Path, earlier: str, later: str, count: int, now: int
) -> None:
    """The rate is 0, so that a step leaves the weights that were read as they are."""
    one, other = (load_checkpoint(runs / name / LATEST) for name in (earlier, later))
    assert (one.step, other.step) == (2, 3) and equal(one.model, other.model)
    assert other.run["processes"] == now
    said = (runs / later / "log.txt").read_text("utf-8") + (runs / "0.txt").read_text("utf-8")
    assert f"shards of {count} processes, divided among {now}" in said


@pytest.mark.slow
def test_the_first_weights_are_those_of_a_single_process(
    runs: Path, brats: Path, tmp_path: Path
) -> None:
    command = [*training(brats, tmp_path), "--lr", 0, "--max_steps", 1]
    succeeded(script("segmentation_train", *command))
    first, trained = load_checkpoint(tmp_path / LATEST), load_checkpoint(runs / "whole" / LATEST)
    moved = [
        float((trained.model[name] - value).abs().max()) for name, value in first.model.items()
    ]
    assert 0 < max(moved) < 4 * 2 * 3e-3


@pytest.mark.slow
def test_a_plain_checkpoint_continues_in_shards_and_back(
    runs: Path, brats: Path, tmp_path: Path
) -> None:
    """Shards of step 2, exported with their training state and sharded again, are the same."""
    assert load_checkpoint(runs / "from_plain" / LATEST).step == 3
    file = tmp_path / "plain.pt"
    shards = next((runs / "whole").glob("savedmodel000002.pt"))
    export = ["--model_path", shards, "--out", file, "--training", True]
    assert "step 2, to continue from," in succeeded(script("export_weights", *export))
    one, other = load_checkpoint(shards), load_checkpoint(file)
    for part in ("options", "step", "model", "ema", "training", "run"):
        assert equal(getattr(one, part), getattr(other, part))

    flags = training(brats, tmp_path / "again")
    flags[flags.index("--batch_size") + 1] = 1
    more = ["--cache_dir", "none", "--fsdp", "on", "--max_steps", 4, "--resume_checkpoint", file]
    words = " ".join(map(str, [*flags, *more]))
    assert torchrun(2, PROGRAM, "runs", tmp_path, words, timeout=400).returncode == 0
    again, whole = (load_checkpoint(f / LATEST) for f in (tmp_path / "again", runs / "whole"))
    for part in ("model", "ema", "training"):
        assert equal(getattr(again, part), getattr(whole, part))

    alone = [*training(brats, tmp_path / "alone"), "--resume_checkpoint", shards]
    assert "resuming" in succeeded(script("segmentation_train", *alone, "--max_steps", 3))


@pytest.mark.slow
def test_one_process_samples_with_shards(runs: Path, brats: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    succeeded(script("export_weights", "--model_path", runs / "whole", "--out", file))
    for name, path in (("shards", runs / "whole"), ("file", file)):
        command = ["--data_dir", brats / "testing", "--model_path", path, "--dpm_solver", True]
        more = ["--out_dir", tmp_path / name, "--steps", 2, "--num_ensemble", 1]
        succeeded(script("segmentation_sample", *command, *more))
    masks = [sorted((tmp_path / name).glob("*_output_ens.png")) for name in ("shards", "file")]
    assert masks[0] and len(masks[0]) == len(masks[1])
    for one, other in zip(*masks, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_validation_has_the_whole_average(runs: Path) -> None:
    best = load_checkpoint(runs / "validated" / "bestmodel.pt")
    assert best.training["best"]["step"] in (1, 2) and best.model
    kept = {path.name[:16] for path in (runs / "validated").glob("*.shards")}
    assert kept == {"savedmodel000002", f"savedmodel{best.step:06d}"}


@pytest.mark.slow
def test_every_process_refuses_a_changed_shard(runs: Path) -> None:
    said = [(runs / f"{rank}.txt").read_text() for rank in (0, 1)]
    for text in said:
        errors = [line for line in text.splitlines() if "/changed/" in line]
        assert len(errors) == 1 and "__1_0.distcp is damaged or of another run" in errors[0]
    assert load_checkpoint(runs / "before" / LATEST).step == 2


@pytest.mark.slow
def test_shards_that_are_missing_or_of_another_run_are_refused(runs: Path, tmp_path: Path) -> None:
    def changed(name: str) -> tuple[Path, Path]:
        shutil.copytree(runs / "whole", tmp_path / name)
        (shards,) = (tmp_path / name).glob("savedmodel000004-*.shards")
        return tmp_path / name / LATEST, shards

    path, shards = changed("missing")
    (shards / "__1_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__1_0.distcp is missing"):
        load_checkpoint(path)

    path, shards = changed("no folder")
    shutil.rmtree(shards)
    with pytest.raises(UserError, match=r"__0_0.distcp is missing"):
        load_checkpoint(path)

    path, shards = changed("mixed")
    (other,) = (runs / "whole").glob("savedmodel000002-*.shards")
    shutil.copy(other / "__1_0.distcp", shards)
    with pytest.raises(UserError, match=r"__1_0.distcp is damaged or of another run"):
        load_checkpoint(path)

    path, shards = changed("more")
    shutil.copy(other / "__1_0.distcp", shards / "__2_0.distcp")
    with pytest.raises(UserError, match=r"__2_0.distcp is not one of its 2 shards"):
        load_checkpoint(path)

    path, shards = changed("forged")
    (shards / ".metadata").write_bytes(b"cos\nsystem\n(S'touch forged'\ntR.")
    assert load_checkpoint(path).step == 4, "the pickle beside the shards is not read"

    content = torch.load(path, weights_only=True)
    for change in (
        {"folder": "../whole"},
        {"files": {}},
        {"pieces": {}},
        {"pieces": {name: [] for name in content["shards"]["pieces"]}},
        {"processes": "two"},
    ):
        torch.save({**content, "shards": {**content["shards"], **change}}, path)
        with pytest.raises(UserError, match=r"damaged|missing|not one of"):
            load_checkpoint(path)


def test_folders_stay_where_a_checkpoint_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "savedmodel000002-0123abcd.shards"
    folder.mkdir()
    (tmp_path / "savedmodel.pt").write_bytes(b"no checkpoint")
    remove_unnamed(tmp_path)
    assert folder.exists()
    (tmp_path / "savedmodel.pt").unlink()
    (tmp_path / "own.shards").mkdir()
    save_checkpoint(tmp_path, Checkpoint({}, 1, {"w": torch.ones(1)}))
    assert not folder.exists() and (tmp_path / "own.shards").exists()


# ------------------------------------------------------------------------------- what is chosen


def plus_plus() -> torch.nn.Module:
    flags = {"image_size": 256, "in_ch": 4, "num_channels": 512, "num_res_blocks": 12}
    more = {"num_heads": 8, "attention_resolutions": "24", "use_scale_shift_norm": True}
    with torch.device("meta"):
        return create_model_and_diffusion(**flags, **more, learn_sigma=True, version="new")[0]


def test_medsegdiff_plus_plus_fits_eight_devices_of_80_gib() -> None:
    net = plus_plus()
    count = sum(parameter.numel() for parameter in net.parameters())
    copy, each = training_gib(count, 1), sharded_gib(net, 1, 8)
    assert copy == pytest.approx(254.6, abs=0.1)
    assert copy / 8 < each < copy / 8 + 3, "and two blocks of it at a time"
    assert divides("auto", copy, each, 80, 8)
    assert not divides("auto", copy, sharded_gib(net, 1, 2), 80, 2), "which do not fit two"
    assert fewest_processes(net, 1, 80) == 4
    assert fewest_processes(net, 1, 1) == 0


def test_medsegdiff_plus_plus_is_no_longer_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "total_gib", lambda _: 80.0)
    flags = {"version": "new", "image_size": 256, "in_ch": 4, "num_channels": 512}
    more = {"num_res_blocks": 12, "num_heads": 8, "attention_resolutions": "24"}
    network = Flags(given={**flags, **more, "use_scale_shift_norm": True}).group(NetworkOptions)
    network = replace(network, use_checkpoint=True)

    def divided(processes: int, fsdp: str = "auto") -> bool:
        monkeypatch.setattr(estimates, "world_size", lambda: processes)
        options = TrainingOptions(batch_size=8, fsdp=fsdp)
        diffusion = DiffusionOptions(learn_sigma=True)
        return check_size(network, diffusion, options, classes=None, device=torch.device("cpu"))

    assert divided(8)
    with pytest.raises(UserError, match=r"254.6 GiB .* or 4 such devices, or lower"):
        divided(2)
    with pytest.raises(UserError, match="or 4 such devices without --fsdp off"):
        divided(8, "off")


@pytest.mark.parametrize(
    ("fsdp", "copy", "share", "processes", "divided"),
    [
        ("auto", 79, 10, 8, False),
        ("auto", 81, 10, 8, True),
        ("auto", 81, 81, 1, False),
        ("on", 1, 1, 2, True),
        ("on", 1, 1, 1, False),
        ("off", 81, 10, 8, False),
    ],
)
def test_a_network_is_divided_where_a_copy_does_not_fit(
    fsdp: str, copy: float, share: float, processes: int, divided: bool
) -> None:
    assert divides(fsdp, copy, share, 80, processes) is divided


def test_what_a_divided_network_cannot_have() -> None:
    with pytest.raises(UserError, match="--compile default: does not work on a divided network"):
        refuse_undivided(RunOptions(compile="default"), None, None)
    with pytest.raises(UserError, match="bare weights"):
        refuse_undivided(RunOptions(), Checkpoint({}, 0, {}), Path("bare.pt"))


def test_processes_with_different_code_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = dist_util.code_digest()
    for other, said in (
        (("00", own[1]), "another version of this package"),
        ((own[0], "1.0"), "torch 1.0"),
    ):
        monkeypatch.setattr(dist_util, "all_gather_object", lambda _, o=other: [own, own, o])
        with pytest.raises(UserError, match=f"process 2: .*{said}"):
            _refuse_mixed_code()
    monkeypatch.setattr(dist_util, "all_gather_object", lambda _: [own, own])
    _refuse_mixed_code()
