"""Presets: what they set, that given flags win, and where a run names them."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import NETWORK, ROOT, refused, script, succeeded

from guided_diffusion import Segmenter
from guided_diffusion.checkpoint import LATEST, load_checkpoint
from guided_diffusion.commands import COMMANDS
from guided_diffusion.errors import UserError
from guided_diffusion.inference.resolve import chosen_steps, resolve_sampling
from guided_diffusion.options.flags import Flags, unfit
from guided_diffusion.options.parser import parse
from guided_diffusion.options.presets import PRESETS, PresetOptions, with_preset
from guided_diffusion.options.segmentation import SAMPLE, SamplingOptions, TrainingOptions
from guided_diffusion.tools import phantom_folders
from guided_diffusion.training.resolve import training_options

MODEL_B = (
    "--image_size 256 --num_channels 128 --class_cond False --num_res_blocks 2 --num_heads 1 "
    "--learn_sigma True --use_scale_shift_norm False --attention_resolutions 16"
)
MODEL_PLUSPLUS = (
    "--image_size 256 --num_channels 512 --class_cond False --num_res_blocks 12 --num_heads 8 "
    "--learn_sigma True --use_scale_shift_norm True --attention_resolutions 24"
)
DIFFUSION = (
    "--noise_schedule linear --rescale_learned_sigmas False --rescale_timesteps False "
    "--diffusion_steps"
)
NEW = "--version new"  # which the published scripts of MedSegDiff have without a flag
SOLVER = "--dpm_solver True"
PUBLISHED = {
    ("wolleb", "train"): f"--lr 1e-4 --batch_size 10 {MODEL_B} {DIFFUSION} 1000",
    ("wolleb", "sample"): f"--num_ensemble=5 {MODEL_B} {DIFFUSION} 1000",
    ("medsegdiff", "train"): f"{NEW} {MODEL_B} {DIFFUSION} 1000 --lr 1e-4 --batch_size 8",
    ("medsegdiff", "sample"): f"{NEW} {MODEL_B} {DIFFUSION} 1000 --num_ensemble 5",
    ("medsegdiff++", "train"): (
        f"{NEW} {MODEL_PLUSPLUS} {DIFFUSION} 1000 --lr 1e-4 --batch_size 64"
    ),
    ("medsegdiff++", "sample"): f"{NEW} {MODEL_PLUSPLUS} {DIFFUSION} 1000 --num_ensemble 25",
    ("fast-brats", "train"): f"--lr 1e-4 --batch_size 10 {MODEL_B} {DIFFUSION} 1000",
    ("fast-brats", "sample"): f"--num_ensemble=5 {MODEL_B} {SOLVER} {DIFFUSION} 50",
    ("fast-isic", "train"): f"{NEW} {MODEL_B} {DIFFUSION} 1000 --lr 1e-4 --batch_size 8",
    ("fast-isic", "sample"): f"{NEW} {MODEL_B} {SOLVER} {DIFFUSION} 50 --num_ensemble 5",
    ("weak-brats", "weak-train"): (
        "--img_size 224 --num_channels 128 --num_res_blocks 3 --learn_sigma True "
        "--class_cond True --diffusion_steps 4000 --noise_schedule linear --lr 1e-4 --batch_size 8"
    ),
    ("weak-brats", "weak-classifier"): (
        "--img_size 224 --model_type resnet50 --diffusion_steps 1000 --noise_schedule linear "
        "--lr 3e-4 --batch_size 4 --iterations 150000"
    ),
    ("weak-brats", "weak-segment"): (
        "--guided --method cg-cdm --classifier_scale 10 --level 400 --steps 10 --tau 0.95 "
        "--batch_size 4"
    ),
}
SMALL = {
    "image_size": 64,
    "num_channels": 32,
    "channel_mult": "1,2,3,4",
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "num_heads": 1,
    "mask_loss": "dice_ce",
    "input_scale": 0.2,
    "mask_dropout": 0.7,
    "batch_size": 8,
    "lr": 1e-3,
    "lr_anneal_steps": 1200,
    "warmup_steps": 50,
    "grad_clip": 1.0,
    "ema_rate": "0.99",
    "augment": True,
    "precision": "auto",
}
TINY = [*NETWORK, "--batch_size", "2", "--max_steps", "2"]


def preset(command: str, *argv: str) -> Flags:
    """The flags of a command line."""
    return with_preset(parse(COMMANDS[command].groups, argv), command)


def options(flags: Flags, command: str) -> dict[str, Any]:
    """Every option of a command, but for how many evaluations a mask takes in which words."""
    groups = [group for group in COMMANDS[command].groups if group is not PresetOptions]
    values = {name: v for group in groups for name, v in vars(flags.group(group)).items()}
    if command == "sample":
        values["steps"] = chosen_steps(flags, values["steps"]) % 1000  # 0: all 1000
        values.pop("diffusion_steps")
    if command == "weak-segment":
        values.pop("guided")  # --method cg-cdm says the same
    return values


# ------------------------------------------------------------------------------ the table


@pytest.mark.parametrize(("name", "command"), PUBLISHED)
def test_published_settings_are_those_of_the_published_command(name: str, command: str) -> None:
    published = parse(COMMANDS[command].groups, shlex.split(PUBLISHED[name, command]))
    assert options(preset(command, "--preset", name), command) == options(published, command)


def test_every_part_of_a_published_preset_is_compared() -> None:
    ours = {"small", "best", "weak-ours"}
    parts = {(name, part) for name, known in PRESETS.items() for part in known.parts}
    assert {part for part in parts if part[0] not in ours} == PUBLISHED.keys()


def test_weak_ours_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    weak = importlib.import_module("weak")
    parts = PRESETS["weak-ours"].parts
    rows = [json.loads(line) for line in (ROOT / "results/weak.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row["method"] == weak.PRESET]
    assert {row["task"] for row in measured} == {"halves", "phantoms"}
    for row in measured:
        assert row["settings"] == parts["weak-segment"]
        assert (row["image_size"], row["steps"]) == (
            parts["weak-train"]["image_size"],
            parts["weak-train"]["max_steps"],
        )
    words = [str(word) for word in (*weak.NETWORK, *weak.FITTED)]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    for name, value in parts["weak-train"].items():
        if f"--{name}" in flags:
            assert type(value)(flags[f"--{name}"]) == value


def test_small_is_what_was_measured() -> None:
    assert PRESETS["small"].parts["train"] == SMALL
    drawn = preset("sample", "--preset", "small").group(SamplingOptions)
    assert (drawn.sampler, drawn.steps, drawn.num_ensemble, drawn.fusion) == (
        *("dpm_solver++", 5, 8, "direct"),
    )


def test_best_has_the_objective_and_the_sampling_of_small() -> None:
    small, best = PRESETS["small"].parts, PRESETS["best"].parts
    for name in ("mask_loss", "input_scale", "mask_dropout", "augment", "grad_clip"):
        assert best["train"][name] == small["train"][name]
    assert best["sample"] == small["sample"]
    assert best["train"]["image_size"] == 256 and "not measured yet" in PRESETS["best"].purpose


@pytest.mark.parametrize(
    ("name", "command"), [(name, part) for name, known in PRESETS.items() for part in known.parts]
)
def test_every_value_is_one_that_its_flag_takes(name: str, command: str) -> None:
    groups = COMMANDS[command].groups
    values = PRESETS[name].parts[command]
    assert Flags.of(groups, **values).given == values
    entries = {n: e for group in groups for n, e in group.__dataclass_fields__.items()}
    assert not any(unfit(entries[n], value) for n, value in values.items())
    assert not any(entries[n].metadata["dead"] for n in values)


def test_the_page_shows_the_table() -> None:
    made = runpy.run_path(str(ROOT / "docs/cli.py"))["recipes"]
    page = (ROOT / "docs/recipes.md").read_text("utf-8")
    assert page == made(page), "python docs/cli.py writes it anew"
    assert re.findall(r"^\| `([\w+-]+)` \|", page, re.MULTILINE)[: len(PRESETS)] == [*PRESETS]


# ------------------------------------------------------------------------------ which value wins


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        ("", "lr", 1e-3),
        ("--lr 0.5", "lr", 0.5),
        ("--num_channels 64", "num_channels", 64),
        ("--augment False", "augment", False),
        ("", "max_steps", 1200),
        ("--max_steps 5000", "max_steps", 5000),
        ("--max_steps 5000", "lr_anneal_steps", 5000),
        ("--max_steps 0", "lr_anneal_steps", 0),
        ("--lr_anneal_steps 300", "max_steps", 300),
        ("--max_steps 300 --lr_anneal_steps 200", "lr_anneal_steps", 200),
    ],
)
def test_given_flags_win_in_training(argv: str, name: str, value: Any) -> None:
    flags = preset("train", "--preset", "small", *argv.split())
    loop = training_options(flags, TrainingOptions)
    assert getattr(loop, name, flags.get(name)) == value


@pytest.mark.parametrize(
    ("name", "argv", "values"),
    [
        ("small", "--steps 3", {"sampler": "dpm_solver++", "steps": 3}),
        ("small", "--use_ddim True", {"sampler": "", "use_ddim": True, "steps": 5}),
        ("small", "--sampler ddim --num_ensemble 2", {"sampler": "ddim", "num_ensemble": 2}),
        ("small", "--diffusion_steps 20", {"sampler": "dpm_solver++", "steps": 0}),
        ("small", "--timestep_respacing 20", {"steps": 0, "fusion": "direct"}),
        ("small", "--sampler direct", {"sampler": "direct", "steps": 0, "fusion": "direct"}),
        ("small", "--fusion mean", {"fusion": "mean", "num_ensemble": 8}),
        ("fast-isic", "--use_ddim True", {"dpm_solver": False, "use_ddim": True, "steps": 50}),
        ("fast-isic", "--steps 10", {"dpm_solver": True, "steps": 10}),
    ],
)
def test_given_flags_win_in_sampling(name: str, argv: str, values: dict[str, Any]) -> None:
    drawn = preset("sample", "--preset", name, *argv.split()).group(SamplingOptions)
    assert {key: getattr(drawn, key) for key in values} == values


def test_another_method_of_weak_supervision_wins() -> None:
    flags = preset("weak-segment", "--preset", "weak-brats", "--method", "otsu")
    assert flags.get("method") == "otsu" and flags.get("level") == 400


def test_a_resolved_value_wins_over_a_preset() -> None:
    flags = preset("sample", "--preset", "wolleb").with_resolved(image_size=64)
    assert flags.get("image_size") == 64 and flags.get("num_channels") == 128


@pytest.mark.parametrize(
    ("command", "name", "message"),
    [
        ("train", "smal", "--preset smal: there is no such preset. Did you mean small? train has "),
        ("sample", "medsegdif", "Did you mean medsegdiff? sample has the presets small, best, "),
        ("train", "xyz", "--preset xyz: there is no such preset. train has the presets small, "),
        ("train", "weak-brats", "--preset weak-brats: is for weak-train, weak-classifier, "),
        (
            "weak-train",
            "small",
            "is for train, sample. weak-train has the presets weak-ours, weak-brats.",
        ),
    ],
)
def test_an_unknown_preset_suggests_the_nearest(command: str, name: str, message: str) -> None:
    error = refused(script(COMMANDS[command].scripts[0], "--preset", name))
    assert message in error and "Omit" not in error
    if name == "smal":
        assert all(known in error for known in PRESETS if "weak" not in known)


# ------------------------------------------------------------------------------ a run


@pytest.fixture(scope="module")
def run(brats: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A training with a preset, shrunk by given flags, and what it printed."""
    folder = tmp_path_factory.mktemp("preset") / "run"
    flags = ["--data_dir", brats / "training", "--out_dir", folder, "--preset", "small"]
    return folder, succeeded(script("segmentation_train", *flags, *TINY))


def test_a_run_says_in_one_line_what_the_preset_sets(run: tuple[Path, str]) -> None:
    lines = [line for line in run[1].splitlines() if "--preset" in line]
    assert lines[1].startswith("next: ") and lines[1].endswith(" --preset small")
    assert lines[:1] == [
        "--preset small sets --mask_loss dice_ce --input_scale 0.2 --mask_dropout 0.7 --lr 0.001 "
        "--lr_anneal_steps 2 --warmup_steps 50 --grad_clip 1.0 --ema_rate 0.99 --augment True "
        "--precision auto"
    ]
    assert lines[0] in (run[0] / "log.txt").read_text("utf-8")


def test_the_settings_act_and_the_checkpoint_names_the_preset(run: tuple[Path, str]) -> None:
    saved = load_checkpoint(run[0] / LATEST)
    assert saved.run["given"]["preset"] == "small"
    assert {n: saved.options[n] for n in ("mask_loss", "input_scale", "mask_dropout")} == {
        **{"mask_loss": "dice_ce", "input_scale": 0.2, "mask_dropout": 0.7}
    }
    assert [*saved.ema] == ["0.99"]
    own = yaml.safe_load((run[0] / "config.yaml").read_text("utf-8"))["train"]
    assert own["given"]["preset"] == "small" and "lr" not in own["given"]
    assert own["other"]["lr"] == 1e-3 and own["other"]["lr_anneal_steps"] == 2
    assert own["other"]["augment"] is True and own["other"]["predict_xstart"] is True


def test_a_config_repeats_a_run_with_a_preset(run: tuple[Path, str], tmp_path: Path) -> None:
    config = ["--config", run[0] / "config.yaml", "--out_dir", tmp_path]
    succeeded(script("segmentation_train", *config))
    first, again = load_checkpoint(run[0] / LATEST), load_checkpoint(tmp_path / LATEST)
    assert again.options == first.options
    assert all((value == again.model[name]).all() for name, value in first.model.items())
    assert all((v == again.ema["0.99"][n]).all() for n, v in first.ema["0.99"].items())
    assert again.run["given"] == {**first.run["given"], "out_dir": str(tmp_path)}


def test_a_preset_in_a_file_of_flags_yields_to_both(tmp_path: Path, brats: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("preset: small\nlr: 0.25\n")
    flags = ["--data_dir", brats / "training", "--out_dir", tmp_path, "--config", file]
    said = succeeded(script("segmentation_train", *flags, *TINY, "--grad_clip", 2))
    assert "--lr 0.001" not in said and "--grad_clip 1.0" not in said
    found = load_checkpoint(tmp_path / LATEST).run
    assert (found["given"]["lr"], found["given"]["grad_clip"]) == (0.25, 2.0)


def test_sampling_suggests_the_preset_of_training_and_takes_it(
    run: tuple[Path, str], brats: Path, tmp_path: Path
) -> None:
    data = ["--data_dir", brats / "testing", "--model_path", run[0], "--num_samples", 1]
    sampling = "--sampler dpm_solver++ --steps 5 --num_ensemble 8 --fusion direct"
    said = succeeded(
        script("segmentation_sample", *data, "--out_dir", tmp_path, "--preset", "small")
    )
    assert f"--preset small sets {sampling} --precision auto\n" in said
    assert "8 masks a case by dpm_solver++, 5 evaluations each, fused by direct" in said
    suggestion = f"trained with --preset small; in sampling, --preset small means {sampling}"
    for given, notes in (({}, (suggestion,)), ({"seed": 1}, (suggestion,)), ({"steps": 2}, ())):
        assert resolve_sampling(Flags.of(SAMPLE, **given), model=str(run[0])).notes == notes
    segmenter = Segmenter.load(run[0], preset="small")
    assert (segmenter.plan.fusion, segmenter.plan.num_ensemble) == ("direct", 8)
    with pytest.raises(UserError, match=r"preset smal: there is no such preset\. Did you mean"):
        Segmenter.load(run[0], preset="smal")


def test_a_preset_of_other_networks_is_refused_when_training_continues(
    run: tuple[Path, str], brats: Path
) -> None:
    flags = ["--data_dir", brats / "training", "--out_dir", run[0], "--resume", "auto"]
    error = refused(script("segmentation_train", *flags, "--preset", "best"))
    assert error.startswith("error: --preset best: sets --image_size 256, but ")
    assert "was trained with 16. Omit --preset, or train anew" in error
    given = [*TINY, "--max_steps", 3, "--preset", "small"]
    said = succeeded(script("segmentation_train", *flags, *given))
    assert "lr_anneal_steps 2 -> 3, max_steps 2 -> 3\n" in said


def test_an_error_about_a_value_of_a_preset_names_it(brats: Path, tmp_path: Path) -> None:
    flags = ["--data_dir", brats / "training", "--out_dir", tmp_path, "--preset", "wolleb"]
    error = refused(script("segmentation_train", *flags, "--mask_loss", "bce"))
    assert "--learn_sigma True: cannot be combined with --mask_loss bce. " in error
    assert error.endswith(" --preset wolleb sets --learn_sigma.\n")


def test_a_u_net_may_have_the_settings_of_a_preset(brats: Path, tmp_path: Path) -> None:
    flags = ["--data_dir", brats / "training", "--out_dir", tmp_path, "--preset", "small"]
    unet = [*TINY, "--version", "unet", "--resume", "auto"]
    succeeded(script("segmentation_train", *flags, *unet))
    succeeded(script("segmentation_train", *flags, *unet, "--max_steps", 3))
    drawing = ["--data_dir", brats / "testing", "--model_path", tmp_path, "--preset", "small"]
    said = succeeded(script("segmentation_sample", *drawing, "--out_dir", tmp_path / "masks"))
    assert "--preset has no effect: it concerns a diffusion, not a plain U-Net" in said
    assert "1 mask a case" in said


def test_a_preset_describes_bare_weights(brats: Path, tmp_path: Path) -> None:
    """Published weights name no flags: a preset does, and given ones win over it."""
    flags = ["--data_dir", brats / "training", "--out_dir", tmp_path, "--preset", "wolleb"]
    succeeded(script("segmentation_train", *flags, *TINY))
    own = load_checkpoint(tmp_path / LATEST)
    torch.save(own.ema["0.9999"], tmp_path / "bare.pt")
    names = ("image_size", "num_channels", "channel_mult", "num_res_blocks")
    network = {name: own.options[name] for name in (*names, "attention_resolutions")}
    with pytest.raises(UserError, match=r"shape|tensor"):
        Segmenter.load(tmp_path / "bare.pt", steps=2, **network)
    bare = Segmenter.load(tmp_path / "bare.pt", preset="wolleb", steps=2, **network)
    assert bare.plan.num_ensemble == 5 and bare.plan.evaluations == 2
    same = Segmenter.load(tmp_path, steps=2, clip_denoised=False)
    bare.plan = same.plan
    image = torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bare(image, "a").members, same(image, "a").members)


def test_weak_training_takes_its_preset(tmp_path: Path) -> None:
    phantom_folders.write_weak(tmp_path / "weak", 0, patients=6, size=32)
    weak = ["--src_dir", tmp_path / "weak", "--save_dir", tmp_path / "out"]
    small = ["--preset", "weak-brats", *NETWORK, "--batch_size", 2, "--max_steps", 1]
    said = succeeded(script("train_tumor_ddfm", *weak, *small))
    assert "--preset weak-brats sets --class_cond True --learn_sigma True " in said
    saved = load_checkpoint(tmp_path / "out" / LATEST)
    assert saved.options["class_cond"] and saved.options["diffusion_steps"] == 4000
    assert saved.run["given"]["preset"] == "weak-brats"
