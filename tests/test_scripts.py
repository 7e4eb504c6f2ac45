"""The three scripts, from a folder of images to a table of scores, and messages on mistakes."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import (
    DIFFUSION,
    NETWORK,
    Run,
    contents,
    process,
    refused,
    script,
    succeeded,
    training,
)
from PIL import Image
from torch import Tensor, nn

from guided_diffusion.checkpoint import LATEST, Checkpoint, load_checkpoint, save_checkpoint
from guided_diffusion.inference.drawing import Draws
from guided_diffusion.inference.plan import SamplingPlan
from guided_diffusion.inference.segmenter import Segmenter

FEW = ("--steps", 2, "--num_ensemble", 2)
TEST_CASES = ("000005", "000006")


def sample(trained: Path, data: Path, out_dir: Path, *more: object) -> Run:
    """Sample with a checkpoint of our own."""
    return script(
        "segmentation_sample",
        *("--model_path", trained, "--data_dir", data, "--out_dir", out_dir, *more),
    )


def soft(out_dir: Path) -> dict[str, np.ndarray]:
    """The fused masks in a folder by case."""
    return {
        path.name.removesuffix("_output_ens.png"): np.asarray(Image.open(path))
        for path in sorted(out_dir.glob("*_output_ens.png"))
    }


def legacy(trained: Path, path: Path, *, learn_sigma: bool = False, prefix: str = "") -> Path:
    """Write the last weights of a run as the parents do: bare, always with a variance channel."""
    weights = load_checkpoint(trained / LATEST).model
    if not learn_sigma:
        for name in ("out.2.weight", "out.2.bias"):
            weights[name] = torch.cat([weights[name], torch.full_like(weights[name], 9.0)])
    torch.save(OrderedDict((prefix + k, nn.Parameter(v)) for k, v in weights.items()), path)
    return path


# ------------------------------------------------------------------------------ end to end


@pytest.fixture(scope="module")
def sampled(trained: Path, brats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result folder made of nothing but a checkpoint and images. Read only."""
    out_dir = tmp_path_factory.mktemp("sampled") / "masks"
    said = succeeded(sample(trained, brats / "testing", out_dir))
    assert "averaged weights (EMA 0.9) of step 4" in said
    assert "5 masks a case by ddpm, 100 evaluations each" in said
    return out_dir


def test_what_sampling_writes(sampled: Path) -> None:
    pictures = ("output_ens", "mask", "uncertainty", "overlay", *(f"output{i}" for i in range(5)))
    volumes = ("output_ens", "mask", "uncertainty")
    names = {f"{case}_{kind}.png" for case in TEST_CASES for kind in pictures}
    names |= {f"{case}_{kind}.nii.gz" for case in TEST_CASES for kind in volumes}
    records = {"predictions.csv", "sampling.json", "config.yaml", "report.html"}
    assert contents(sampled).keys() == names | records
    assert "Segmentation without scores" in (sampled / "report.html").read_text("utf-8")
    note = json.loads((sampled / "sampling.json").read_text("utf-8"))
    assert (note["seed"], note["options"]["image_size"]) == (10, 16)
    assert note["command"].startswith("python scripts/segmentation_sample.py --model_path ")
    assert torch.__version__.startswith(note["versions"]["torch"])
    masks = soft(sampled)
    assert all(mask.shape == (40, 40) and len(np.unique(mask)) > 20 for mask in masks.values())
    assert not np.array_equal(masks["000005"], masks["000006"])


def test_volumes_have_the_grid_of_their_input(sampled: Path, brats: Path) -> None:
    (image,) = (brats / "testing" / "000005").glob("*_t1_*.nii.gz")
    written = nib.load(sampled / "000005_mask.nii.gz")
    assert np.array_equal(written.affine, nib.load(image).affine)
    assert set(np.unique(np.asarray(written.dataobj))) <= {0, 1}
    picture = np.asarray(Image.open(sampled / "000005_mask.png"))
    assert np.array_equal(np.asarray(written.dataobj) == 1, picture == 255)


def test_scoring(sampled: Path, brats: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sampled, tmp_path / "masks")
    before = contents(folder)
    del before["config.yaml"]  # scoring adds its section
    assert b"guided-diffusion sampling" in before.pop("report.html"), "scoring replaces it"
    said = succeeded(
        script("segmentation_env", "--inp_pth", folder, "--out_pth", brats / "testing")
    )
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert f"iou is {summary['parent_iou']}\n" in said
    assert f"dice is {summary['parent_dice']}\n" in said
    assert {"dice", "dice_lesion", "iou", "cases", "empty_truth", "empty_prediction"} <= set(
        summary
    )
    assert summary["cases"] == 2

    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert tuple(rows) == TEST_CASES
    for case, row in rows.items():
        (path,) = (brats / "testing" / case).glob("*_seg_*")
        truth = np.asarray(nib.load(path).dataobj) > 0
        mask = np.asarray(Image.open(folder / f"{case}_mask.png")) == 255
        both, either = truth.sum() + mask.sum(), (truth & mask).sum()
        assert float(row["dice"]) == pytest.approx(2 * either / both if both else 1.0)
    assert summary["dice"] == pytest.approx(np.mean([float(r["dice"]) for r in rows.values()]))
    after = contents(folder)
    assert before.items() <= after.items()
    assert b"guided-diffusion scoring" in after["report.html"]


def test_isic_from_pictures_to_scores(isic: Path, tmp_path: Path) -> None:
    run, masks = tmp_path / "run", tmp_path / "masks"
    command = ["--data_dir", isic, "--out_dir", run, *NETWORK, *DIFFUSION, "--data_name", "ISIC"]
    said = succeeded(script("segmentation_train", *command, "--batch_size", 4, "--max_steps", 2))
    assert "4 ISIC cases, 3 channels" in said
    assert load_checkpoint(run / LATEST).options["in_ch"] == 4

    said = succeeded(sample(run, isic, masks, *FEW))
    assert "2 ISIC cases, 3 channels" in said
    kinds = ("output_ens", "mask", "uncertainty", "overlay", "output0", "output1")
    assert contents(masks).keys() == {
        *("predictions.csv", "sampling.json", "config.yaml", "report.html"),
        *(f"{case}_{kind}.png" for case in ("0000004", "0000005") for kind in kinds),
    }
    said = succeeded(script("segmentation_env", "--inp_pth", masks, "--out_pth", isic))
    assert "iou is " in said and "dice is " in said
    assert json.loads((masks / "summary.json").read_text("utf-8"))["cases"] == 2


def test_a_dry_run_ends_before_the_first_step_and_writes_nothing(
    trained: Path, brats: Path, tmp_path: Path
) -> None:
    out, before = tmp_path / "run", contents(trained)
    command = ["--data_dir", brats / "training", *NETWORK, *DIFFUSION, "--dry_run", True]
    said = succeeded(script("segmentation_train", *command, "--out_dir", out, "--batch_size", 2))
    assert (
        "dry run: the first batch was read, images (2, 4, 16, 16) and masks (2, 1, 16, 16)" in said
    )
    said = succeeded(
        script("segmentation_train", *command, "--out_dir", trained, "--resume", "auto")
    )
    assert f"would resume {trained / LATEST} at step" in said
    said = succeeded(sample(trained, brats / "testing", out, *FEW, "--dry_run", True))
    assert f"dry run: 2 cases would be drawn; they would be written to {out}" in said
    assert not out.exists() and contents(trained) == before


def test_commands_say_what_to_do_next(trained: Path, brats: Path, tmp_path: Path) -> None:
    said = succeeded(sample(trained, brats / "testing", tmp_path, *FEW))
    scoring = f"python scripts/segmentation_env.py --inp_pth {tmp_path} --out_pth {brats}/testing"
    assert f"next: {scoring}\n  or open {tmp_path}/report.html" in said
    said = succeeded(script(*scoring.split()[1:]))
    assert "published code computes them" in said and "at their own size" in said
    assert f"next: open {tmp_path}/report.html or {tmp_path}/" in said.splitlines()[-1]


def test_defaults_and_folders_of_the_readme(
    trained: Path, brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(brats)
    command = [*NETWORK, *DIFFUSION, "--batch_size", 2, "--max_steps", 1]
    succeeded(script("segmentation_train", *command))
    assert {"log.txt", "progress.csv", LATEST} <= contents(Path("results")).keys()
    log = Path("results/log.txt").read_text("utf-8")

    succeeded(script("segmentation_sample", "--model_path", "./results/savedmodel.pt", *FEW))
    assert (Path("results") / "000006_mask.png").exists()
    said = succeeded(script("segmentation_sample", "--model_path", "results", *FEW))
    assert "2 of 2 cases are finished and kept" in said
    assert Path("results/log.txt").read_text("utf-8").startswith(log)

    said = succeeded(
        script("segmentation_env", "--inp_pth", "results", "--out_pth", "data/testing")
    )
    assert "dice is " in said


def test_scripts_as_programs(trained: Path, brats: Path, tmp_path: Path) -> None:
    """Two real processes: what one says and its exit code are those of the other tests."""
    good = process(
        "segmentation_sample",
        *("--model_path", trained, "--data_dir", brats / "testing", "--out_dir", tmp_path, *FEW),
    )
    bad = process("segmentation_train", "--data_dir", tmp_path / "nowhere", "--out_dir", tmp_path)
    out, err = good.communicate(timeout=120)
    assert (good.returncode, err) == (0, ""), err
    assert "averaged weights" in out and len(soft(tmp_path)) == 2
    out, err = bad.communicate(timeout=120)
    assert "nowhere" in refused(Run(bad.returncode, out, err))


# ------------------------------------------------------------------------------ runs again


def test_a_second_run_keeps_and_other_settings_redraw(
    trained: Path, brats: Path, tmp_path: Path
) -> None:
    data = brats / "testing"
    one_by_one = (*FEW, "--batch_size", 2)
    first = succeeded(sample(trained, data, tmp_path, *one_by_one))
    assert "kept" not in first and "anew" not in first
    before = contents(tmp_path)
    said = succeeded(sample(trained, data, tmp_path, *FEW, "--batch_size", 1))
    assert "2 of 2 cases are finished and kept" in said
    assert contents(tmp_path) == before

    for change in (
        ("--seed", 11),
        ("--steps", 3),
        ("--num_ensemble", 3),
        ("--fusion", "vote"),
        ("--weights", "raw"),
        ("--use_ddim", True),
        ("--precision", "bf16"),
        ("--clip_denoised", False),
        ("--model_path", trained / "savedmodel000002.pt"),
    ):
        said = succeeded(sample(trained, data, tmp_path, *one_by_one, *change, "--num_samples", 1))
        assert "1 case of other settings" in said, change
        said = succeeded(sample(trained, data, tmp_path, *one_by_one, "--num_samples", 1))
        assert "1 case of other settings" in said, change
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    rewritten = {"predictions.csv", "sampling.json", "config.yaml", "report.html"}  # with dates
    assert all(after[name] == before[name] for name in after.keys() - rewritten)


def test_seeds_and_steps_change_masks(trained: Path, brats: Path, tmp_path: Path) -> None:
    data, masks = brats / "testing", {}
    for name, change in {"base": (), "seed": ("--seed", 11), "steps": ("--steps", 4)}.items():
        succeeded(sample(trained, data, tmp_path / name, *FEW, *change))
        masks[name] = soft(tmp_path / name)["000005"].astype(int)
    assert np.abs(masks["base"] - masks["seed"]).max() > 2
    assert np.abs(masks["base"] - masks["steps"]).max() > 2


# ------------------------------------------------------------------------------ samplers


def planned(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> SamplingPlan:
    """Run the sampling script with a network that is never asked, and return its plan."""
    plans = []

    def draw(self: Segmenter, images: Tensor, names: Sequence[str], note: object) -> Draws:
        plans.append(self.plan)
        members = torch.zeros(len(images), self.plan.num_ensemble, 1, *images.shape[-2:])
        return Draws(members, None)

    monkeypatch.setattr(Segmenter, "draw_with_coarse", draw)
    succeeded(script("segmentation_sample", *arguments, "--num_samples", 1))
    monkeypatch.undo()
    assert all(plan == plans[0] for plan in plans)
    return plans[0]


@pytest.mark.parametrize(
    ("flags", "sampler", "evaluations"),
    [
        ("", "ddpm", 100),
        ("--diffusion_steps 20", "ddpm", 20),
        ("--diffusion_steps 100", "ddpm", 100),
        ("--timestep_respacing 20", "ddpm", 20),
        ("--timestep_respacing 5,5,10", "ddpm", 20),
        ("--steps 7", "ddpm", 7),
        ("--steps 1", "ddpm", 1),
        ("--steps 7 --diffusion_steps 9 --timestep_respacing 11", "ddpm", 7),
        ("--use_ddim True", "ddim", 100),
        ("--use_ddim True --timestep_respacing ddim25", "ddim", 25),
        ("--use_ddim True --diffusion_steps 100 --timestep_respacing ddim10", "ddim", 10),
        ("--use_ddim True --eta 1 --steps 4", "ddim", 4),
        ("--dpm_solver True", "dpm_solver++", 50),
        ("--dpm_solver True --diffusion_steps 10", "dpm_solver++", 10),
        ("--dpm_solver True --timestep_respacing 12", "dpm_solver++", 12),
        ("--dpm_solver True --steps 1", "dpm_solver++", 1),
        ("--dpm_solver True --use_ddim True --steps 5", "dpm_solver++", 5),
        ("--dpm_solver True --steps 6 --order 3 --method singlestep", "dpm_solver++_singlestep", 6),
        ("--dpm_solver True --steps 7 --order 2 --method singlestep", "dpm_solver++_singlestep", 7),
        ("--dpm_solver True --steps 6 --order 3 --skip_type logSNR", "dpm_solver++", 6),
        ("--sampler dpm_solver --steps 5", "dpm_solver", 5),
        ("--sampler ddim --dpm_solver True --steps 5", "ddim", 5),
        ("--dpm_solver False --use_ddim no", "ddpm", 100),
    ],
)
def test_samplers_and_their_steps(
    flags: str,
    sampler: str,
    evaluations: int,
    trained: Path,
    brats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = ["--model_path", trained, "--data_dir", brats / "testing", "--out_dir", tmp_path / "out"]
    plan = planned(monkeypatch, *own, *flags.split())
    assert (plan.sampler, plan.evaluations) == (sampler, evaluations)
    first = 96 if "ddim25" in flags else 90 if "ddim10" in flags else 99  # that stride starts at 0
    assert plan.levels[0].t == pytest.approx(first) and plan.levels[-1].sigma == 0
    assert plan.clip == (-1.0, 1.0)
    if "--eta" in flags:
        assert plan.options["eta"] == 1.0
    if "--order 3" in flags:
        assert plan.options["order"] == 3


def test_flags_without_effect_are_named(trained: Path, brats: Path, tmp_path: Path) -> None:
    more = ["--steps", 2, "--timestep_respacing", 5, "--eta", 1, "--method", "singlestep"]
    more += ["--dpm_solver", True, "--use_ddim", True, "--sampler", "unipc", "--ss_blocks", 2]
    said = succeeded(sample(trained, brats / "testing", tmp_path / "out", *more))
    assert [line.split()[0] for line in said.splitlines() if " no effect with --" in line] == [
        *("--ss_blocks", "--use_ddim", "--dpm_solver", "--eta", "--method"),
        "--timestep_respacing",
    ]
    assert "--eta has no effect with --sampler unipc" in said
    said = succeeded(sample(trained, brats / "testing", tmp_path / "out", *FEW, "--order", 3))
    assert "--order has no effect with --sampler ddpm" in said
    command = [*training(brats, tmp_path / "run"), "--max_steps", 1, "--ss_blocks", 3]
    said = succeeded(script("segmentation_train", *command))
    assert "--ss_blocks has no effect with --version plain" in said


def test_the_range_of_clipping(
    trained: Path, brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--data_dir", brats / "testing", "--out_dir", tmp_path / "out", *FEW]
    own = load_checkpoint(trained / LATEST)
    own.options["mask_range"] = "0,1"
    path = save_checkpoint(tmp_path, Checkpoint(own.options, own.step, own.model))
    assert planned(monkeypatch, "--model_path", path, *data).clip == (0.0, 1.0)
    off = planned(monkeypatch, "--model_path", path, *data, "--clip_denoised", False)
    assert off.clip is None
    bare = legacy(trained, tmp_path / "bare.pt")
    assert planned(monkeypatch, "--model_path", bare, *data, *NETWORK).clip == (-1.0, 1.0)


# ------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("prefix", ["", "module."])
def test_bare_weights_give_the_same_masks(
    prefix: str, trained: Path, brats: Path, tmp_path: Path
) -> None:
    data = brats / "testing"
    succeeded(sample(trained, data, tmp_path / "own", *FEW, "--weights", "raw"))
    path = legacy(trained, tmp_path / "savedmodel005000.pt", prefix=prefix)
    flags = [flag for flag in DIFFUSION if flag not in ("--diffusion_steps", "100")]
    said = succeeded(
        sample(path, data, tmp_path / "bare", *FEW, *NETWORK, *flags, "--trained_steps", 100)
    )
    assert "bare weights" in said and "trained on 100 steps" in said
    own, bare = soft(tmp_path / "own"), soft(tmp_path / "bare")
    assert own.keys() == bare.keys() and len(own) == 2
    assert all(np.array_equal(own[name], bare[name]) for name in own)


def test_bare_weights_are_assumed_to_have_1000_steps(
    trained: Path, brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = legacy(trained, tmp_path / "bare.pt")
    command = ["--model_path", path, "--data_dir", brats / "testing", "--out_dir", tmp_path / "o"]
    plan = planned(monkeypatch, *command, *NETWORK, "--dpm_solver", True, "--diffusion_steps", 20)
    assert (plan.evaluations, plan.levels[0].t) == (20, 999)
    said = succeeded(script("segmentation_sample", *command, *NETWORK, *FEW))
    assert "trained on 1000 steps" in said and "--trained_steps" in said


def test_the_last_weights_on_request(trained: Path, brats: Path, tmp_path: Path) -> None:
    data = brats / "testing"
    assert "last weights of step 4" in succeeded(
        sample(trained, data, tmp_path / "raw", *FEW, "--weights", "raw")
    )
    succeeded(sample(trained, data, tmp_path / "ema", *FEW))
    one, other = soft(tmp_path / "raw"), soft(tmp_path / "ema")
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def test_a_named_checkpoint_is_the_one_taken(trained: Path, brats: Path, tmp_path: Path) -> None:
    path = trained / "savedmodel000002.pt"
    said = succeeded(sample(path, brats / "testing", tmp_path, *FEW))
    assert f"{path}: averaged weights (EMA 0.9) of step 2" in said


def test_flags_of_training_are_accepted_in_sampling(
    trained: Path, brats: Path, tmp_path: Path
) -> None:
    """The parents' READMEs repeat all of them in sampling."""
    command = [*FEW, *NETWORK, *DIFFUSION, "--class_cond", False, "--in_ch", 5, "--crop", "auto"]
    succeeded(sample(trained, brats / "testing", tmp_path / "long", *command))
    succeeded(sample(trained, brats / "testing", tmp_path / "short", *FEW))
    assert contents(tmp_path / "long").keys() == contents(tmp_path / "short").keys()
    one, other = soft(tmp_path / "long"), soft(tmp_path / "short")
    assert all(np.array_equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------ bad input

Mistake = tuple[Callable[[Path, Path, Path], Sequence[object]], tuple[str, ...]]


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def incomplete(brats: Path, tmp: Path, part: str) -> Path:
    folder = copy_of(brats / part, tmp / "data")
    (path,) = sorted(folder.iterdir())[1].glob("*_t1ce_*")
    path.unlink()
    return folder


def unreadable(brats: Path, tmp: Path, part: str) -> Path:
    folder = copy_of(brats / part, tmp / "data")
    (path,) = sorted(folder.iterdir())[0].glob("*_t2_*")
    path.write_bytes(path.read_bytes()[:200])
    return folder


def mismatched(brats: Path, tmp: Path, part: str) -> Path:
    folder = copy_of(brats / part, tmp / "data")
    for case in folder.iterdir():
        (path,) = case.glob("*_seg_*")
        nib.save(nib.Nifti1Image(np.zeros((38, 40), np.uint8), np.eye(4)), path)
    return folder


def unlabelled(brats: Path, tmp: Path, part: str) -> Path:
    folder = copy_of(brats / part, tmp / "data")
    for path in folder.rglob("*_seg_*"):
        path.unlink()
    return folder


def empty(tmp: Path) -> Path:
    (tmp / "empty").mkdir()
    return tmp / "empty"


def under_a_file(tmp: Path) -> Path:
    (tmp / "file").write_text("not a folder", "utf-8")
    return tmp / "file" / "out"


BAD_TRAINING: dict[str, Mistake] = {
    "no folder": (lambda b, r, t: ["--data_dir", t / "nowhere"], ("nowhere",)),
    "a file": (lambda b, r, t: ["--data_dir", r / LATEST], (LATEST, "a file")),
    "empty folder": (lambda b, r, t: ["--data_dir", empty(t)], ("empty", "holds nothing")),
    "empty, named": (
        lambda b, r, t: ["--data_dir", empty(t), "--data_name", "BRATS"],
        ("empty", "NIfTI"),
    ),
    "unknown layout": (lambda b, r, t: ["--data_name", "LIDC"], ("--data_name", "LIDC", "ISIC")),
    "incomplete slice": (
        lambda b, r, t: ["--data_dir", incomplete(b, t, "training")],
        ("t1ce", "000002"),
    ),
    "unreadable file": (
        lambda b, r, t: ["--data_dir", unreadable(b, t, "training")],
        ("_t2_", "000001"),
    ),
    "sizes differ": (
        lambda b, r, t: ["--data_dir", mismatched(b, t, "training")],
        ("_seg_", "38 x 40", "40 x 40"),
    ),
    "no masks": (lambda b, r, t: ["--data_dir", unlabelled(b, t, "training")], ("seg", "000001")),
    "odd size": (lambda b, r, t: ["--image_size", 17], ("--image_size", "17", "multiple of 2")),
    "deep network": (
        lambda b, r, t: ["--image_size", 20, "--channel_mult", "1,1,1,1"],
        ("--image_size", "20", "multiple of 8", "16"),
    ),
    "no size": (lambda b, r, t: ["--image_size", 0], ("--image_size", "0")),
    "odd width": (lambda b, r, t: ["--num_channels", 48], ("--num_channels", "48", "32")),
    "vast width": (lambda b, r, t: ["--channel_mult", "1,99999999999999"], ("up to 65536",)),
    "no width": (lambda b, r, t: ["--num_channels", 0], ("--num_channels", "0")),
    "bad list": (lambda b, r, t: ["--channel_mult", "1;2"], ("--channel_mult", "1;2")),
    "bad attention": (
        lambda b, r, t: ["--attention_resolutions", "0"],
        ("--attention_resolutions", "0"),
    ),
    "heads": (lambda b, r, t: ["--num_heads", 3], ("--num_heads", "3", "64")),
    "no heads": (lambda b, r, t: ["--num_heads", 0], ("--num_heads", "0")),
    "heads going up": (lambda b, r, t: ["--num_heads_upsample", 5], ("--num_heads_upsample", "5")),
    "head channels": (lambda b, r, t: ["--num_head_channels", 5], ("--num_head_channels", "5")),
    "no blocks": (lambda b, r, t: ["--num_res_blocks", 0], ("--num_res_blocks", "0")),
    "channels": (lambda b, r, t: ["--in_ch", 4], ("--in_ch", "4", "5")),
    "classes": (lambda b, r, t: ["--class_cond", True], ("--class_cond", "no class labels")),
    "short schedule": (
        lambda b, r, t: ["--diffusion_steps", 20, "--noise_schedule", "linear"],
        ("--diffusion_steps", "20", "21"),
    ),
    "no schedule": (lambda b, r, t: ["--diffusion_steps", 0], ("--diffusion_steps", "0")),
    "respacing": (lambda b, r, t: ["--timestep_respacing", 101], ("101", "100")),
    "falling range": (lambda b, r, t: ["--mask_range", "1,0"], ("--mask_range", "1,0")),
    "endless range": (lambda b, r, t: ["--mask_range", "nan,1"], ("--mask_range", "nan,1")),
    "no batch": (lambda b, r, t: ["--batch_size", 0], ("--batch_size", "0")),
    "negative limit": (lambda b, r, t: ["--max_steps", -5], ("--max_steps", "-5")),
    "no interval": (lambda b, r, t: ["--save_interval", 0], ("--save_interval", "0")),
    "negative rate": (lambda b, r, t: ["--lr", -1], ("--lr", "-1")),
    "no rate": (lambda b, r, t: ["--lr", "nan"], ("--lr", "nan", "finite")),
    "endless rate": (lambda b, r, t: ["--lr", "inf"], ("--lr", "inf", "finite")),
    "negative decay": (lambda b, r, t: ["--weight_decay", -1], ("--weight_decay", "-1")),
    "dropout": (lambda b, r, t: ["--dropout", 2], ("--dropout", "2")),
    "workers": (lambda b, r, t: ["--num_workers", -2], ("--num_workers", "-2")),
    "no device": (lambda b, r, t: ["--gpu_dev", "abc"], ("--gpu_dev", "'abc'", "an index from 0")),
    "two precisions": (
        lambda b, r, t: ["--precision", "bf16", "--use_fp16", True],
        ("--precision", "bf16", "--use_fp16 True"),
    ),
    "seed": (lambda b, r, t: ["--seed", 2**70], ("--seed", str(2**70))),
    "averages": (lambda b, r, t: ["--ema_rate", "fast"], ("--ema_rate", "fast")),
    "no averages": (lambda b, r, t: ["--ema_rate", ""], ("--ema_rate",)),
    "fast averages": (lambda b, r, t: ["--ema_rate", "0.9,1.5"], ("--ema_rate", "1.5")),
    "no checkpoint": (
        lambda b, r, t: ["--resume_checkpoint", t / "none.pt"],
        ("--resume_checkpoint", "none.pt"),
    ),
    "other network": (
        lambda b, r, t: ["--resume_checkpoint", r, "--num_channels", 64],
        ("--num_channels", "64", "32", LATEST),
    ),
    "other schedule": (
        lambda b, r, t: ["--resume_checkpoint", r, "--diffusion_steps", 50],
        ("--diffusion_steps", "50", "100"),
    ),
    "no folder to write": (lambda b, r, t: ["--out_dir", under_a_file(t)], ("--out_dir", "file")),
}

BAD_SAMPLING: dict[str, Mistake] = {
    "no model": (lambda b, r, t: ["--model_path", ""], ("--model_path", "no path given")),
    "no such model": (lambda b, r, t: ["--model_path", t / "a.pt"], ("--model_path", "a.pt")),
    "empty folder of models": (
        lambda b, r, t: ["--model_path", empty(t)],
        ("--model_path", "empty", LATEST),
    ),
    "a text": (lambda b, r, t: ["--model_path", r / "log.txt"], ("log.txt", "checkpoint")),
    "no folder": (lambda b, r, t: ["--data_dir", t / "nowhere"], ("nowhere",)),
    "empty data": (lambda b, r, t: ["--data_dir", empty(t)], ("empty", "holds nothing")),
    "incomplete slice": (
        lambda b, r, t: ["--data_dir", incomplete(b, t, "testing")],
        ("t1ce", "000006"),
    ),
    "unreadable file": (
        lambda b, r, t: ["--data_dir", unreadable(b, t, "testing")],
        ("_t2_", "000005"),
    ),
    "other width": (lambda b, r, t: ["--num_channels", 64], ("--num_channels", "64", "32", LATEST)),
    "other size": (lambda b, r, t: ["--image_size", 32], ("--image_size", "32", "16")),
    "other target": (
        lambda b, r, t: ["--predict_xstart", False],
        ("--predict_xstart", "False", "True"),
    ),
    "other range": (lambda b, r, t: ["--mask_range", "0,1"], ("--mask_range", "0,1", "-1,1")),
    "other variance": (lambda b, r, t: ["--learn_sigma", "y"], ("--learn_sigma", "True", "False")),
    "other noise": (
        lambda b, r, t: ["--noise_schedule", "linear"],
        ("--noise_schedule", "linear", "cosine"),
    ),
    "other crop": (lambda b, r, t: ["--crop", "wolleb"], ("--crop", "wolleb", "none")),
    "other schedule": (lambda b, r, t: ["--trained_steps", 50], ("--trained_steps", "50", "100")),
    "channels": (lambda b, r, t: ["--in_ch", 4], ("--in_ch", "4", "5")),
    "classes": (lambda b, r, t: ["--class_cond", True], ("--class_cond",)),
    "many steps": (lambda b, r, t: ["--steps", 101], ("--steps", "101", "100")),
    "many solver steps": (
        lambda b, r, t: ["--steps", 101, "--dpm_solver", True],
        ("--steps", "101", "100"),
    ),
    "many evaluations": (
        lambda b, r, t: ["--steps", 0, "--diffusion_steps", 1000],
        ("--diffusion_steps", "1000", "100"),
    ),
    "many respaced": (
        lambda b, r, t: ["--steps", 0, "--timestep_respacing", "ddim500"],
        ("--timestep_respacing", "500", "100"),
    ),
    "negative steps": (lambda b, r, t: ["--steps", -1], ("--steps", "-1")),
    "no members": (lambda b, r, t: ["--num_ensemble", 0], ("--num_ensemble", "0")),
    "negative batch": (lambda b, r, t: ["--batch_size", -1], ("--batch_size", "-1")),
    "negative count": (lambda b, r, t: ["--num_samples", -1], ("--num_samples", "-1")),
    "high order": (
        lambda b, r, t: ["--order", 4, "--dpm_solver", True],
        ("--order", "4", "between 1 and 3"),
    ),
    "endless noise": (lambda b, r, t: ["--temperature", "inf"], ("--temperature", "inf", "finite")),
    "much noise": (lambda b, r, t: ["--eta", 5, "--use_ddim", True], ("--eta", "5")),
    "two precisions": (
        lambda b, r, t: ["--precision", "fp32", "--use_fp16", True],
        ("--precision", "fp32", "--use_fp16 True"),
    ),
    "no folder to write": (lambda b, r, t: ["--out_dir", under_a_file(t)], ("--out_dir", "file")),
    "bare weights of another width": (
        lambda b, r, t: ["--model_path", legacy(r, t / "w.pt"), *NETWORK, "--num_channels", 64],
        ("w.pt", "time_embed.0.weight", "(128, 32)", "(256, 64)"),
    ),
    "bare weights of another depth": (
        lambda b, r, t: ["--model_path", legacy(r, t / "w.pt"), *NETWORK, "--channel_mult", "1"],
        ("w.pt", "middle_block.0.in_layers.0.weight", "(64,)", "(32,)"),
    ),
    "bare weights with classes": (
        lambda b, r, t: ["--model_path", legacy(r, t / "w.pt"), *NETWORK, "--class_cond", True],
        ("--class_cond", "no class labels"),
    ),
}


def tree(folder: Path) -> set[str]:
    """Everything below a folder, folders included."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused_without_output(
    name: str, command: Sequence[object], mistake: Mistake, *folders: Path
) -> None:
    """Check that a mistake ends with a one-line error that has these words, and writes nothing."""
    brats, trained, tmp = folders
    bad, words = mistake
    arguments = [*command, *bad(brats, trained, tmp)]
    before = tree(tmp)
    error = refused(script(name, *arguments))
    missing = [word for word in words if word not in error]
    assert not missing, f"{missing} not in {error}"
    assert re.fullmatch(r"error: [^\n]+: [^\n]+\. [A-Z0-9][^\n]*[.?]\n", error)
    assert tree(tmp) == before


@pytest.mark.parametrize("mistake", BAD_TRAINING)
def test_training_refuses(mistake: str, brats: Path, trained: Path, tmp_path: Path) -> None:
    command = [*training(brats, tmp_path / "out"), "--max_steps", 1]
    folders = (brats, trained, tmp_path)
    if mistake == "unreadable file":  # found when it is read: the log of the run may be there
        error = refused(script("segmentation_train", *command, *BAD_TRAINING[mistake][0](*folders)))
        assert all(word in error for word in BAD_TRAINING[mistake][1])
        assert not list((tmp_path / "out").glob("*.pt"))
    else:
        refused_without_output("segmentation_train", command, BAD_TRAINING[mistake], *folders)


@pytest.mark.parametrize("mistake", BAD_SAMPLING)
def test_sampling_refuses(mistake: str, brats: Path, trained: Path, tmp_path: Path) -> None:
    command = ["--model_path", trained, "--data_dir", brats / "testing", *FEW]
    command += ["--out_dir", tmp_path / "out"]
    folders = (brats, trained, tmp_path)
    if mistake == "unreadable file":  # the other cases are finished
        error = refused(
            script("segmentation_sample", *command, *BAD_SAMPLING[mistake][0](*folders))
        )
        assert all(word in error for word in BAD_SAMPLING[mistake][1])
        assert (tmp_path / "out" / "000006_mask.png").exists()
    else:
        refused_without_output("segmentation_sample", command, BAD_SAMPLING[mistake], *folders)


def test_images_with_other_channels_than_the_network(
    isic: Path, trained: Path, brats: Path, tmp_path: Path
) -> None:
    command = [*training(brats, tmp_path / "out"), "--resume_checkpoint", trained]
    for error in (
        refused(sample(trained, isic, tmp_path / "out", *FEW)),
        refused(script("segmentation_train", *command, "--data_dir", isic)),
    ):
        assert "t1,t1ce,t2,flair" in error

    own = load_checkpoint(trained / LATEST)
    options = {**own.options, "in_ch": 4, "modalities": ""}
    stem = "input_blocks.0.0.weight"
    model = {**own.model, stem: own.model[stem][:, 1:].contiguous()}
    path = save_checkpoint(tmp_path, Checkpoint(options, own.step, model))
    error = refused(sample(path, brats / "testing", tmp_path / "out", *FEW))
    assert "4 input channels" in error and "needs 5: 4 of the images" in error
    assert not (tmp_path / "out").exists()


def test_a_bad_case_does_not_affect_the_good_ones(
    trained: Path, brats: Path, tmp_path: Path
) -> None:
    data = copy_of(brats / "testing", tmp_path / "data")
    (path,) = (data / "000006").glob("*_flair_*")
    path.write_bytes(gzip.compress(b"no image"))
    error = refused(sample(trained, data, tmp_path / "out", *FEW, "--batch_size", 2))
    assert path.name in error
    written = contents(tmp_path / "out").keys() - {
        *("predictions.csv", "sampling.json", "config.yaml")
    }
    assert written and all(name.startswith("000005_") for name in written)
    assert not [name for name in written if "part" in name]


# ------------------------------------------------------------------------------ bad scoring


@pytest.fixture
def masks(sampled: Path, tmp_path: Path) -> Path:
    """A copy of a result folder, to damage."""
    return copy_of(sampled, tmp_path / "masks")


def test_missing_and_surplus_predictions_are_listed(masks: Path, brats: Path) -> None:
    command = ["--inp_pth", masks, "--out_pth", brats / "testing"]
    (masks / "000005_output_ens.png").rename(masks / "000009_output_ens.png")
    before = contents(masks)
    error = refused(script("segmentation_env", *command))
    assert "no prediction for 1 case (000005)" in error
    assert "no truth for 1 case (000009)" in error
    assert contents(masks) == before

    said = succeeded(script("segmentation_env", *command, "--partial", True))
    assert "dice is " in said
    assert json.loads((masks / "summary.json").read_text("utf-8"))["cases"] == 1


@pytest.mark.parametrize("flag", ["--inp_pth", "--out_pth"])
def test_scoring_refuses(flag: str, masks: Path, brats: Path, tmp_path: Path) -> None:
    good = ["--inp_pth", masks, "--out_pth", brats / "testing"]
    before = contents(masks)
    other = "--out_pth" if flag == "--inp_pth" else "--inp_pth"
    assert flag in refused(script("segmentation_env", other, tmp_path))
    assert "nowhere" in refused(script("segmentation_env", *good, flag, tmp_path / "nowhere"))
    assert "empty" in refused(script("segmentation_env", *good, flag, empty(tmp_path)))
    assert contents(masks) == before


def test_an_unreadable_prediction(masks: Path, brats: Path) -> None:
    path = masks / "000006_output_ens.png"
    path.write_bytes(path.read_bytes()[:50])
    before = contents(masks)
    error = refused(script("segmentation_env", "--inp_pth", masks, "--out_pth", brats / "testing"))
    assert path.name in error
    assert contents(masks) == before


# ------------------------------------------------------------------------------ real images

WOLLEB = (
    "--image_size 256 --num_channels 32 --class_cond False --num_res_blocks 1 --num_heads 1 "
    "--learn_sigma True --use_scale_shift_norm False --attention_resolutions 16 "
    "--channel_mult 1,1,1,1,1 --noise_schedule linear --rescale_learned_sigmas False "
    "--rescale_timesteps False"
)


@pytest.mark.parametrize("form", ["fields", "plain"])
def test_wolleb_s_commands_on_real_slices(form: str, real_data: Path, tmp_path: Path) -> None:
    """Both forms of file names give one and the same mask, at 240 x 240 through the crop."""
    source = real_data / "brats20_mini"
    if not source.is_dir():
        pytest.skip(f"{source} is not there")
    data = tmp_path / "data"
    for part, cases in (("training", ["000001", "000002"]), ("testing", ["000247"])):
        for case in cases:
            for path in (source / part / case).iterdir():
                name = path.name if form == "fields" else path.name.split("_")[3] + ".nii.gz"
                (data / part / case).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, data / part / case / name)

    command = ["--data_dir", data / "training", "--out_dir", tmp_path / "run", *WOLLEB.split()]
    command += ["--diffusion_steps", 1000, "--lr", "1e-4", "--batch_size", 1, "--max_steps", 2]
    said = succeeded(script("segmentation_train", *command))
    assert "2 BRATS cases, 4 channels" in said
    assert load_checkpoint(tmp_path / "run" / LATEST).options["crop"] == "wolleb"

    command = ["--model_path", tmp_path / "run" / LATEST, "--data_dir", data / "testing"]
    command += ["--out_dir", tmp_path / "out", *WOLLEB.split(), "--num_ensemble=1"]
    command += ["--dpm_solver", True, "--diffusion_steps", 2]
    assert "2 evaluations" in succeeded(script("segmentation_sample", *command))
    mask = soft(tmp_path / "out")["000247"]
    assert mask.shape == (240, 240)
    assert not mask[:8].any() and not mask[:, -8:].any() and mask[8:-8, 8:-8].any()

    scored = ["--inp_pth", tmp_path / "out", "--out_pth", data / "testing"]
    assert "dice is " in succeeded(script("segmentation_env", *scored))


def test_the_real_skin_set(real_data: Path, tmp_path: Path) -> None:
    data = real_data / "isbi2016_256"
    if not data.is_dir():
        pytest.skip(f"{data} is not there")
    command = ["--data_dir", data, "--out_dir", tmp_path / "run", *NETWORK, *DIFFUSION]
    said = succeeded(script("segmentation_train", *command, "--batch_size", 2, "--max_steps", 1))
    assert "749 ISIC cases, 3 channels" in said
    said = succeeded(
        sample(tmp_path / "run", data, tmp_path / "out", *FEW, "--num_samples", 2, "--crop", "auto")
    )
    assert "305 ISIC cases, 3 channels" in said
    masks = soft(tmp_path / "out")
    assert len(masks) == 2 and all(mask.shape == (256, 256) for mask in masks.values())
    assert all(name.isdecimal() and len(name) == 7 for name in masks)
    scored = ["--inp_pth", tmp_path / "out", "--out_pth", data / "Test", "--partial", "True"]
    succeeded(script("segmentation_env", *scored))


def test_real_unlabelled_slices_can_be_segmented(
    real_data: Path, trained: Path, tmp_path: Path
) -> None:
    data = real_data / "brats20_mini" / "testing_unlabelled"
    if not data.is_dir():
        pytest.skip(f"{data} is not there")
    succeeded(sample(trained, data, tmp_path, *FEW))
    assert {name: mask.shape for name, mask in soft(tmp_path).items()} == {
        "000246": (240, 240),
        "001919": (240, 240),
    }
