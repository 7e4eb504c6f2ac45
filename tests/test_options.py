"""The command line: the parents' flags with their types and defaults, and messages on mistakes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from helpers import ROOT, refused, script

from guided_diffusion.errors import UserError
from guided_diffusion.options.flags import Flags, numbers, recorded
from guided_diffusion.options.network import DiffusionOptions, NetworkOptions
from guided_diffusion.options.parser import parse
from guided_diffusion.options.scoring import SCORE
from guided_diffusion.options.segmentation import SAMPLE, TRAIN, TrainingOptions, dead_flags

PARENTS: dict[str, dict[str, list[Any]]] = json.loads(
    (Path(__file__).parent / "golden" / "flags.json").read_text("utf-8")
)
GROUPS = {"train": TRAIN, "sample": SAMPLE, "env": SCORE}
FILES = {name: f"segmentation_{name}" for name in GROUPS}

TRAINING_FOLDER = ["str", "./data/training"]
TESTING_FOLDER = ["str", "./data/testing"]
NOTHING = ["str", ""]  # a parent's None

# Where a default differs from the parent's, and what it is; the changelog gives the reasons.
DEVIATIONS: dict[str, dict[str, list[Any]]] = {
    "wolleb_train": {},
    "msd23_train": {
        "data_name": NOTHING,
        "data_dir": TRAINING_FOLDER,
        "multi_gpu": NOTHING,
    },
    "msd25_train": {
        "data_name": NOTHING,
        "data_dir": TRAINING_FOLDER,
        "multi_gpu": NOTHING,
        "resume_checkpoint": NOTHING,
        "version": ["str", "plain"],
    },
    "wolleb_sample": {"num_samples": ["int", 0], "batch_size": ["int", 0]},
    "msd23_sample": {
        "data_name": NOTHING,
        "data_dir": TESTING_FOLDER,
        "multi_gpu": NOTHING,
        "num_samples": ["int", 0],
        "batch_size": ["int", 0],
    },
    "msd25_sample": {
        "data_name": NOTHING,
        "data_dir": TESTING_FOLDER,
        "multi_gpu": NOTHING,
        "num_samples": ["int", 0],
        "batch_size": ["int", 0],
        "version": ["str", "plain"],
    },
    "msd25_env": {"inp_pth": NOTHING},
}


def kind(parent: str) -> str:
    return parent.split("_")[1]


def flags_of(name: str) -> dict[str, list[Any]]:
    """Type and default of every flag of one of our scripts, as the golden file writes them."""
    return {
        entry.name: [get_type_hints(group)[entry.name].__name__, entry.default]
        for group in GROUPS[name]
        for entry in fields(group)
    }


def error_of(capsys: pytest.CaptureFixture[str], *argv: str, groups: Any = TRAIN) -> str:
    """Parse a wrong command line and return its one-line error."""
    with pytest.raises(SystemExit) as stopped:
        parse(groups, argv)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


# ------------------------------------------------------------------------- the parents' flags


@pytest.mark.parametrize("parent", PARENTS)
def test_types_and_defaults_are_the_parents(parent: str) -> None:
    ours = flags_of(kind(parent))
    assert PARENTS[parent].keys() - ours.keys() == set()
    differing = {name: ours[name] for name, was in PARENTS[parent].items() if ours[name] != was}
    assert differing == DEVIATIONS[parent]


@pytest.mark.parametrize("parent", PARENTS)
def test_every_flag_of_the_parents_is_accepted(parent: str) -> None:
    groups = GROUPS[kind(parent)]
    values = {"int": ("7", 7), "float": ("0.5", 0.5), "str": ("text", "text"), "bool": ("t", True)}
    choices = {e.name: e.metadata["choices"] for group in groups for e in fields(group)}
    for name, (type_name, _) in PARENTS[parent].items():
        text, value = values[type_name]
        if choices[name]:
            text = value = choices[name][-1]
        parsed = parse(groups, [f"--{name}", text]).given
        assert parsed == {name: value}
        assert type(parsed[name]).__name__ == type_name


def test_additional_flags_exist() -> None:
    both = {"seed", "mask_range", "precision", "crop"}
    assert both | {"max_steps", "resume", "num_workers"} <= flags_of("train").keys()
    assert both | {"steps", "num_samples", "sampler", "trained_steps"} <= flags_of("sample").keys()
    assert flags_of("train")["max_steps"] == ["int", 100_000]


def test_bools_take_the_parents_words() -> None:
    for word in ("yes", "true", "t", "y", "1", "Yes", "TRUE", "T", "Y"):
        assert parse(TRAIN, ["--learn_sigma", word]).given == {"learn_sigma": True}
    for word in ("no", "false", "f", "n", "0", "No", "FALSE", "F", "N"):
        assert parse(TRAIN, ["--learn_sigma", word]).given == {"learn_sigma": False}


@pytest.mark.parametrize(
    ("argv", "parsed"),
    [
        (["--lr=0.5"], {"lr": 0.5}),
        (["--channel_mult="], {"channel_mult": ""}),
        (["--num_ens", "3"], {"num_ensemble": 3}),
        (["--num_ens=3"], {"num_ensemble": 3}),
        (["--multi-gpu", "0,1"], {"multi_gpu": "0,1"}),
        (
            ["--num-ensemble=3", "--timestep-respacing", "5-5"],
            {"num_ensemble": 3, "timestep_respacing": "5-5"},
        ),
        (["--multi_gpu", "0,1"], {"multi_gpu": "0,1"}),
        (["--mask_range", "-1,1"], {"mask_range": "-1,1"}),
        (["--mask_range=-1,1"], {"mask_range": "-1,1"}),
        (["--mask_r", "-1,1", "--eta", "1"], {"mask_range": "-1,1", "eta": 1.0}),
        (["--mask_range", "-1,1", "--seed", "-1"], {"mask_range": "-1,1", "seed": -1}),
        (["--num_head_channels", "-1"], {"num_head_channels": -1}),
        (["--eta", "-.5"], {"eta": -0.5}),
        (["--eta", "-1e-3"], {"eta": -0.001}),
        (["--slices", "-26:-3", "--seed", "2"], {"slices": "-26:-3", "seed": 2}),
        ([], {}),
    ],
)
def test_spellings(argv: list[str], parsed: dict[str, Any]) -> None:
    groups = TRAIN if "--lr=0.5" in argv else SAMPLE
    assert parse(groups, argv).given == parsed


def test_the_last_of_two_equal_flags_counts() -> None:
    assert parse(TRAIN, ["--lr", "1", "--lr", "2"]).given == {"lr": 2.0}


# ------------------------------------------------------------------------------ mistakes


def test_a_missing_blank_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "--learn_sigma", "True--noise_schedule", "linear")
    assert "--learn_sigma" in error
    assert "a blank is missing between 'True' and '--noise_schedule'" in error


@pytest.mark.parametrize("value", ["2", "", "yes!", "None"])
def test_other_words_are_refused_as_bools(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "--learn_sigma", value)
    assert "--learn_sigma" in error and "boolean value expected" in error and repr(value) in error
    assert "blank" not in error


def test_a_bool_needs_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--learn_sigma" in error_of(capsys, "--learn_sigma")


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("--diffusion_step_s", "--diffusion_steps"),
        ("--lerning_sigma", "--learn_sigma"),
        ("--bach_size", "--batch_size"),
    ],
)
def test_an_unknown_flag_suggests_a_near_one(
    word: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, word, "2")
    assert word in error and f"Did you mean {near}?" in error


def test_a_flag_without_a_near_one_suggests_none(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "--xyzzy", "2")
    assert "Did you mean" not in error and "--help" in error


def test_an_ambiguous_prefix_lists_what_it_may_mean(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "--num_res", "2", "--num_head", "2")
    assert "--num_heads" in error and "--num_head_channels" in error


@pytest.mark.parametrize(
    "argv", [["--batch_size", "2.5"], ["--lr", "fast"], ["--noise_schedule", "sine"]]
)
def test_values_of_the_wrong_kind(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, *argv)
    assert argv[0] in error and argv[1] in error


def test_scripts_exit_with_code_2_on_a_mistake() -> None:
    for name in FILES.values():
        assert "--batchsize" in refused(script(name, "--batchsize", 3))


# ------------------------------------------------------------------------------ help


@pytest.mark.parametrize("name", GROUPS)
def test_every_flag_has_a_help_line(name: str) -> None:
    run = script(FILES[name], "--help_all")
    assert (run.code, run.err) == (0, "")
    text = " ".join(run.out.split())
    for group in GROUPS[name]:
        for entry in fields(group):
            line = entry.metadata["help"]
            assert len(line.split()) >= 2, entry.name
            assert f"--{entry.name} " in text
            assert "".join(line.split()) in "".join(run.out.split()), entry.name


@pytest.mark.parametrize(
    ("name", "folder"), [("train", "./data/training"), ("sample", "./data/testing")]
)
def test_help_shows_the_default(name: str, folder: str) -> None:
    text = " ".join(script(FILES[name], "--help_all").out.split())
    assert re.search(rf"--data_dir STR folder with the data set[\w ,]* \(default: {folder}\)", text)


def test_flags_without_effect_are_named() -> None:
    for name in ("train", "sample"):
        for group in GROUPS[name]:
            for entry in fields(group):
                notes = dead_flags(Flags(GROUPS[name], {entry.name: entry.default}))
                dead = entry.metadata["dead"]
                assert notes == ([f"--{entry.name} has no effect: {dead}"] if dead else [])
    assert dead_flags(Flags(TRAIN, {})) == []
    assert dead_flags(Flags(TRAIN, {"dpm_solver": True})) != []
    assert dead_flags(Flags(SAMPLE, {"dpm_solver": True})) == []


@pytest.mark.parametrize(
    ("given", "outcome", "idle"),
    [
        ({"ss_blocks": 2}, {"version": "new"}, "--ss_blocks has no effect with --version new"),
        ({"ss_blocks": 2}, {"version": "2"}, ""),
        ({"eta": 0.0}, {"sampler": "ddpm"}, "--eta has no effect with --sampler ddpm"),
        ({"eta": 1.0}, {"sampler": "ddim"}, ""),
        ({"order": 2}, {"sampler": "ddim"}, "--order has no effect with --sampler ddim"),
        ({"order": 2, "skip_type": "logSNR"}, {"sampler": "unipc"}, ""),
        ({"skip_type": "logSNR"}, {"sampler": "ddpm"}, "--skip_type has no effect with"),
        ({"method": "singlestep"}, {"sampler": "unipc"}, "--method has no effect with"),
        ({"method": "singlestep"}, {"sampler": "sde_dpm_solver++"}, "--method has no effect with"),
        ({"method": "singlestep"}, {"sampler": "dpm_solver"}, ""),
        ({"use_ddim": True}, {"sampler": "dpm_solver++"}, "--use_ddim has no effect with"),
        ({"use_ddim": False}, {"sampler": "dpm_solver++"}, ""),
        ({"dpm_solver": True}, {"sampler": "ddim"}, "--dpm_solver has no effect with"),
        ({"dpm_solver": True}, {"sampler": "sde_dpm_solver++"}, ""),
        ({"timestep_respacing": "5"}, {"steps": 7}, "--timestep_respacing has no effect with"),
        ({"timestep_respacing": "5"}, {"steps": 0}, ""),
    ],
)
def test_flags_that_another_one_overrides_are_named(
    given: dict[str, Any], outcome: dict[str, Any], idle: str
) -> None:
    notes = dead_flags(Flags(SAMPLE, given), outcome)
    assert len(notes) == bool(idle) and "".join(notes).startswith(idle)


def test_help_does_not_import_torch() -> None:
    for file in (*FILES.values(), "make_phantoms"):
        program = (
            "import runpy, sys\n"
            "try: runpy.run_path(sys.argv[1], run_name='__main__')\n"
            "except SystemExit as end: assert not end.code\n"
            "print(*({'torch', 'numpy'} & set(sys.modules)), file=sys.stderr)\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", program, f"scripts/{file}.py", "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "usage:" in run.stdout
        assert run.stderr.strip() == ""


# ------------------------------------------------------------------------ groups of options


def test_a_group_takes_its_own_flags_only() -> None:
    options = Flags(given={"lr": 0.5, "image_size": 32}).group(TrainingOptions)
    assert options == TrainingOptions(lr=0.5)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_must_be_finite(value: float) -> None:
    for group in dict.fromkeys([*TRAIN, *SAMPLE, *SCORE]):
        for name in (e.name for e in fields(group) if get_type_hints(group)[e.name] is float):
            with pytest.raises(UserError, match=f"--{name} {value}: must be a finite number"):
                Flags(given={name: value}).group(group)
    assert Flags(given={"max_steps": 10**400}).group(TrainingOptions).max_steps == 10**400


def test_a_checkpoint_does_not_record_flags_of_a_run() -> None:
    network = NetworkOptions(num_channels=64, use_checkpoint=True)
    kept = recorded(network, DiffusionOptions(mask_range="-1,1"))
    assert kept["num_channels"] == 64 and kept["mask_range"] == "-1,1"
    described = {e.name for group in (NetworkOptions, DiffusionOptions) for e in fields(group)}
    assert kept.keys() == described - {"use_checkpoint", "checkpoint_levels"}


def test_a_contradiction_names_both_values() -> None:
    trained = {"num_channels": 64, "learn_sigma": False}
    Flags(given={"num_channels": 64, "batch_size": 3}).refuse_contradictions(trained, "a.pt")
    with pytest.raises(UserError, match=r"--num_channels 32: contradicts 64, .*a\.pt"):
        Flags(given={"batch_size": 3, "num_channels": 32}).refuse_contradictions(trained, "a.pt")
    with pytest.raises(UserError, match="--learn_sigma True: contradicts False"):
        Flags(given={"learn_sigma": True}).refuse_contradictions(trained, "a.pt")


def test_lists_of_numbers() -> None:
    assert numbers("channel_mult", "1,2,4") == [1, 2, 4]
    assert numbers("channel_mult", "0.5, 1", float) == [0.5, 1.0]
    assert numbers("channel_mult", "") == []
    with pytest.raises(UserError, match="--channel_mult '1;2': is not a list"):
        numbers("channel_mult", "1;2")
