"""``config.yaml``: what a run writes to be repeated, and what ``--config`` reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import DIFFUSION, NETWORK, contents, refused, script, succeeded, training
from loops import equal

from guided_diffusion.checkpoint import LATEST, load_checkpoint
from guided_diffusion.errors import UserError
from guided_diffusion.inference.provenance import (
    code_version,
    listing_of,
    note_run,
    other_settings,
    run_record,
)
from guided_diffusion.options.config import read_config
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.segmentation import SAMPLE, SCORE, TRAIN
from guided_diffusion.options.weak import TRAIN_IMAGES
from guided_diffusion.tools import phantom_folders

COMMANDS = ("train", "sample", "score")


def written(text: str, tmp_path: Path) -> str:
    path = tmp_path / "flags.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(text: str, tmp_path: Path, groups: Any = TRAIN) -> dict[str, Any]:
    return read_config(written(text, tmp_path), "train", groups, commands=COMMANDS)


def sections(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "config.yaml").read_text("utf-8")))


# ------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lr: 1e-4", {"lr": 1e-4}),
        ("lr: 1.0e-05\nbatch_size: 3", {"lr": 1e-5, "batch_size": 3}),
        ("augment: yes\nuse_kl: 'False'\nlearn_sigma: 1", {"augment": True, "use_kl": False}),
        ("slices: 80:59", {"slices": "80:59"}),
        ("version: 2\nmask_labels: 010", {"version": "2", "mask_labels": "010"}),
        ("channel_mult: [1, 2, 3]\nmask_range: [-1, 1]", {"channel_mult": "1,2,3"}),
        ("channel_mult: ''\nval_dir:", {"channel_mult": "", "val_dir": ""}),
        ("image-size: 32\n--num_heads: 2", {"image_size": 32, "num_heads": 2}),
        ("train: {lr: 0.5}\nsample: {steps: 3}", {"lr": 0.5}),
        ("train: {command: x, given: {lr: 0.5}, other: {keep: 9}}", {"lr": 0.5}),
        ("train: {given: {}}", {}),
        ("", {}),
    ],
)
def test_values_are_read_as_on_the_command_line(
    text: str, values: dict[str, Any], tmp_path: Path
) -> None:
    found = read(text, tmp_path)
    assert values.items() <= found.items()
    assert {name: type(found[name]) for name in values} == {n: type(v) for n, v in values.items()}


def test_names_of_the_published_scripts_are_known(tmp_path: Path) -> None:
    assert read("img_size: 32", tmp_path, TRAIN_IMAGES) == {"image_size": 32}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "learning_rte is no flag of train. Did you mean"),
        ("ema_rat: 0.9", "ema_rat is no flag of train. Did you mean ema_rate?"),
        ("lr: fast", ", lr: 'fast' is not a number. Give a number."),
        ("batch_size: 2.0", ", batch_size: '2.0' is not a whole number."),
        ("batch_size: [2]", ", batch_size: a list is not a whole number."),
        ("augment: maybe", ", augment: 'maybe' is not True or False."),
        ("augment: {a: 1}", ", augment: a group of names is not True or False."),
        ("lr:", ", lr: has no value. Omit it for the default."),
        ("val_dir: null", ", val_dir: has no value."),
        ("noise_schedule: sine", ", noise_schedule: 'sine' is not a choice. Use 'linear'"),
        ("batch_size: 0", ", batch_size: 0 must be 1 or more. The default is 1."),
        ("lr: nan", ", lr: nan must be a finite number."),
        ("sample: {steps: 3}", "has no section train. It has those of sample."),
        ("train: 3\nsample: {}", "section train does not hold flags"),
        ("a: [", "is not YAML (while parsing"),
        ("- lr", "does not hold flags with values"),
        ("!!python/object/apply:os.getcwd []", "does not hold flags with values"),
        ("lr: \0", "is not YAML"),
        ("[" * 900_000, "is too deep"),
        ("[" * 900, "is not YAML"),
        ("#" * 2**21, "is too large"),
    ],
    ids=lambda value: value[:24],
)
def test_a_mistake_is_one_message_with_file_and_key(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        read(text, tmp_path)
    assert str(raised.value).startswith(str(tmp_path / "flags.yaml"))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_aliases_that_would_grow_without_end_are_refused(tmp_path: Path) -> None:
    lines = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 20)]
    with pytest.raises(UserError, match="l0 is no flag"):
        read("l0: &l0 [x]\n" + "\n".join(lines), tmp_path)


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / "pipe", "~nobody-of-this-name/a"):
        with pytest.raises(UserError, match=r"no file|is not YAML"):
            read_config(str(path), "train", TRAIN)


# ------------------------------------------------------------------------------------ writing


@pytest.fixture(scope="module")
def both(brats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was trained, sampled and scored into."""
    folder = tmp_path_factory.mktemp("both") / "run"
    data = brats / "testing"
    succeeded(script("segmentation_train", *training(brats, folder), "--max_steps", 2))
    flags = ["--model_path", folder, "--out_dir", folder, "--steps", 2, "--num_ensemble", 2]
    succeeded(script("segmentation_sample", "--data_dir", data, *flags, "--dpm_solver", True))
    succeeded(script("segmentation_env", "--inp_pth", folder, "--out_pth", data))
    return folder


def test_a_folder_holds_what_would_repeat_each_command(both: Path, brats: Path) -> None:
    found = sections(both)
    assert list(found) == ["train", "sample", "score"]
    own = found["train"]
    assert own["command"].startswith("python scripts/segmentation_train.py --data_dir ")
    assert own["given"]["lr"] == 3e-3 and own["given"]["batch_size"] == 2
    assert own["other"]["seed"] == 10 and own["other"]["in_ch"] == 5  # the data decided it
    assert not own["given"].keys() & own["other"].keys()
    assert own["data"] == listing_of(str(brats / "training"))
    assert own["code"] == code_version() and own["code"]["version"]
    assert own["versions"]["torch"] == torch.__version__
    assert own["host"] and own["device"].startswith("cpu") and own["threads"] == 1

    saved = load_checkpoint(both / LATEST).run
    assert saved.pop("name") == "train"
    assert saved == own
    training_of_sampling = found["sample"]["training"]
    assert training_of_sampling.pop("name") == "train" and training_of_sampling == own
    assert found["sample"]["given"]["steps"] == 2
    assert found["sample"]["other"]["predict_xstart"] is True  # the checkpoint decided it
    assert found["score"]["given"]["inp_pth"] == str(both)


def test_the_report_shows_training_and_sampling(both: Path) -> None:
    page = (both / "report.html").read_text("utf-8")
    for label, text in (
        ("Training command", "python scripts/segmentation_train.py"),
        ("Training flags", "<span>lr</span> 0.003"),
        ("Other flags of training", "<span>weight_decay</span> 0.0"),
        ("Training data", "<span>listing</span> "),
        ("Sampling flags", "<span>num_ensemble</span> 2"),
    ):
        shown = page.split(f"<dt>{label}</dt><dd>")[1].split("</dd>")[0]
        assert text in shown


def test_a_config_repeats_the_run_bit_for_bit(both: Path, tmp_path: Path) -> None:
    config = ["--config", both / "config.yaml"]
    succeeded(script("segmentation_train", *config, "--out_dir", tmp_path / "again"))
    one, other = load_checkpoint(both / LATEST), load_checkpoint(tmp_path / "again" / LATEST)
    assert equal(one.model, other.model) and equal(one.ema, other.ema)
    given = sections(tmp_path / "again")["train"]["given"]
    assert given == {**sections(both)["train"]["given"], "out_dir": str(tmp_path / "again")}

    succeeded(script("segmentation_sample", *config, "--out_dir", tmp_path / "masks"))
    for path in both.glob("*_output_ens.png"):
        assert (tmp_path / "masks" / path.name).read_bytes() == path.read_bytes()


def test_a_command_that_is_repeated_changes_nothing(both: Path, brats: Path) -> None:
    before = contents(both)
    flags = ["--model_path", both, "--out_dir", both, "--steps", 2, "--num_ensemble", 2]
    run = ["--data_dir", brats / "testing", *flags, "--dpm_solver", True]
    succeeded(script("segmentation_sample", *run))
    assert contents(both) == before


def test_a_run_that_continues_says_which_settings_differ(both: Path, tmp_path: Path) -> None:
    flags = ["--config", both / "config.yaml", "--out_dir", tmp_path, "--resume_checkpoint", both]
    said = succeeded(script("segmentation_train", *flags, "--max_steps", 3, "--lr", 1e-4))
    assert "continued with other settings: lr 0.003 -> 0.0001, max_steps 2 -> 3\n" in said
    said = succeeded(script("segmentation_train", *flags, "--out_dir", tmp_path / "b"))
    assert "other settings" not in said


def test_unknown_keys_end_the_command(tmp_path: Path) -> None:
    path = written("data_dri: x", tmp_path)
    error = refused(script("segmentation_train", "--config", path))
    assert f"{path}: data_dri is no flag of train. Did you mean data_dir?" in error


def test_differences_between_records() -> None:
    one = {"given": {"lr": 1}, "other": {"seed": 1, "resume": ""}, "versions": {"torch": "2.4"}}
    other = {"given": {"seed": 2}, "other": {"lr": 1, "new": 5}, "versions": {"torch": "2.5"}}
    assert other_settings(one, other) == "seed 1 -> 2, torch 2.4 -> 2.5"
    assert other_settings({}, other) == ""
    assert other_settings(one, one) == ""


def test_names_and_sizes_make_the_digest_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes(b"123")
    (tmp_path / ".hidden").write_bytes(b"1")
    first = listing_of(str(tmp_path))
    assert (first["files"], first["bytes"], first["path"]) == (1, 3, str(tmp_path))
    (tmp_path / "a/x.png").write_bytes(b"321")
    assert listing_of(str(tmp_path)) == first
    (tmp_path / "a/x.png").write_bytes(b"3210")
    assert listing_of(str(tmp_path))["listing"] != first["listing"]
    assert listing_of(str(tmp_path / "a/x.png"))["files"] == 1
    assert listing_of(str(tmp_path / "none"))["files"] == 0


def test_a_file_that_no_run_has_written_is_kept(tmp_path: Path, quiet: None) -> None:
    flags = Flags(SCORE, {"inp_pth": "x"}, command=("score",))
    record = run_record(flags)
    for number, text in enumerate(("lr: 3", "a: [", "[1]"), 1):
        (tmp_path / "config.yaml").write_text(text)
        note_run(tmp_path, record)
        assert (tmp_path / f"config.yaml.old{number if number > 1 else ''}").read_text() == text
        assert sections(tmp_path).keys() == {"score"}
    note_run(tmp_path, run_record(Flags(SAMPLE, {}, command=("sample",))))
    assert sections(tmp_path).keys() == {"score", "sample"}


@pytest.mark.slow
def test_other_commands_write_theirs(tmp_path: Path) -> None:
    phantom_folders.write_brats_volumes(tmp_path / "volumes", 0, patients=3, size=24, slices=4)
    data = ["--src", tmp_path / "volumes", "--out", tmp_path / "slices", "--slices", "1:3"]
    succeeded(script("brats_slices", *data, "--workers", 1))
    assert sections(tmp_path / "slices")["slices"]["given"]["slices"] == "1:3"

    phantom_folders.write_weak(tmp_path / "weak", 0, patients=6, size=32)
    weak = ["--src_dir", tmp_path / "weak", "--save_dir", tmp_path / "out"]
    small = ["--image_size", 16, "--batch_size", 2, "--max_steps", 1]
    network = [*NETWORK[2:], *DIFFUSION[:2]]
    succeeded(script("train_tumor_ddfm", *weak, *small, *network, "--class_cond", True))
    succeeded(script("image_tumor_sample", *weak[2:], "--num_samples", 1, "--steps", 1))
    few = ["--num_samples", 1, "--steps", 2, "--noises", 1, "--level", 5]
    script("image_p_seg", *weak, *few)  # one image is too few to be scored
    assert sections(tmp_path / "out").keys() == {"weak-train", "weak-sample"}
    assert sections(tmp_path / "out")["weak-train"]["data"]["path"] == str(tmp_path / "weak")
    assert sections(tmp_path / "out" / "cdm").keys() == {"weak-segment"}
