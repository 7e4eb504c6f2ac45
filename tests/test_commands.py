"""The commands: one table for scripts, console command and documentation; help and mistakes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from guided_diffusion import Segmenter, create_model_and_diffusion
from guided_diffusion.commands import COMMANDS, main
from guided_diffusion.errors import UserError
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.segmentation import SAMPLE, SamplingOptions

ALL_FLAGS = {
    name: {entry for group in command.groups for entry in group.__dataclass_fields__}
    for name, command in COMMANDS.items()
}


def test_every_script_is_a_command() -> None:
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert scripts == {script for command in COMMANDS.values() for script in command.scripts}
    for path in (ROOT / "scripts").glob("*.py"):
        assert f'main("{path.stem}")' in path.read_text("utf-8")


def test_the_reference_lists_every_flag() -> None:
    made = runpy.run_path(str(ROOT / "docs/cli.py"))["page"]()
    page = (ROOT / "docs/cli.md").read_text("utf-8")
    assert page == made, "python docs/cli.py writes it anew"
    for name, flags in ALL_FLAGS.items():
        section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
        assert section is not None
        assert set(re.findall(r"^\| (?:\*\*)?`--(\w+)`", section[1], re.MULTILINE)) == flags


@pytest.mark.parametrize("name", COMMANDS)
def test_the_basic_help_fits_a_screen_and_shows_two_examples(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main(argv=[name, "-h"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count(f"guided-diffusion {name} --") == 2
    shown = set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) - {"help_all", "about"}
    assert shown == set(COMMANDS[name].basic) <= ALL_FLAGS[name]
    examples = set(re.findall(r"--(\w+)", text.split("examples:")[1]))
    assert examples <= set(re.findall(r"--(\w+)", text.split("examples:")[0]))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("spelling", ["--help_all", "--help-all"])
def test_the_full_help_shows_all_flags(
    name: str, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(argv=[name, spelling])
    text = capsys.readouterr().out
    assert (
        set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) - {"help_all", "about"}
        == ALL_FLAGS[name]
    )
    assert ".:" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["smaple"], "error: smaple: there is no such command. Did you mean sample?\n"),
        (["train", "--bach-size", "2"], "Did you mean --batch_size?"),
        (["slices", "--out", "x"], "error: --src: is missing. Name a folder with --src.\n"),
        (["phantoms"], "error: --out: is missing. Name a folder with --out.\n"),
        (["phantoms", "--out", "x", "--layout", "isic", "--slices", "3"], "Omit --slices."),
        ([""], "error: '': there is no such command."),
        (["train", "a b", ""], "error: unrecognized arguments: 'a b' ''. "),
        (["train", "--out_dir", "--about"], "--out_dir: expected one argument. Give a value.\n"),
        (["train", "--lr", "x"], "error: --lr: invalid float value: 'x'. Give a number.\n"),
        (["train", "--lr", "--about"], "--lr: expected one argument. Give a number.\n"),
        (["train", "--batch_size", "x"], "invalid int value: 'x'. Give a whole number.\n"),
        (["sample", "--use_ddim", "2"], "expected, found '2'. Give True or False.\n"),
        (["sample", "--weights", "RAW"], "--weights: 'RAW' is not a choice. Use 'ema', 'raw'.\n"),
        (["sample", "--weights"], "--weights: expected one argument. Use 'ema', 'raw'.\n"),
        (["score", "--compare", "a"], "--compare: expected 2 arguments. Give 2 values.\n"),
        (["train", "--l", "1"], " could match --lr, "),
        (["train", "--lr", "1", "2"], "unrecognized arguments: 2. Put every value behind its flag"),
        (["sample", "--eta", "-1e-3"], "error: --eta -0.001: must be between 0 and 1. "),
        (["sample", "--model_path", "a\nb"], "there is no file a b. "),
        (["sample", "--model_path", 3000 * "a"], "aaa: File name too long. "),
    ],
)
def test_common_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv=argv)
    said = capsys.readouterr()
    assert message in said.err and said.out == "" and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["train", "--data_dir", "data/trainning"], "data/training"),
        (["train", "--data_dir", "dta/training/below"], "data"),
        (["train", "--data_dir", "data/training", "--val_dir", "data/test"], "data/testing"),
        (["train", "--data_dir", "data/training", "--split", "splits.txt"], "split.txt"),
        (["sample", "--model_path", "runs/fisrt"], "runs/first"),
        (["score", "--inp_pth", "run", "--out_pth", "data/testing"], "runs"),
        (["check", "--data_dir", "xyz"], ""),
        (["sample", "--model_path", "runs/first"], ""),
        (["sample", "--model_path", "runs/dangling.pt"], ""),
    ],
)
def test_a_mistyped_path_suggests_one_that_is_there(
    argv: list[str],
    near: str,
    brats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "data").symlink_to(brats)
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "split.txt").touch()
    (tmp_path / "runs/dangling.pt").symlink_to("nothing")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(argv=argv)
    said = capsys.readouterr()
    hint = re.search(r"Did you mean (.*)\?\n", said.out + said.err)
    assert (hint[1] if hint else "") == near


def test_the_overview_and_about(capsys: pytest.CaptureFixture[str]) -> None:
    main(argv=[])
    text = capsys.readouterr().out
    main(argv=["--help"])
    assert capsys.readouterr().out == text
    assert all(re.search(rf"^  {name} +\S", text, re.MULTILINE) for name in COMMANDS)
    main(argv=["--about"])
    about = capsys.readouterr().out
    assert re.fullmatch(r"guided-diffusion \S+, torch \S+, \S+ \(.*\)\n", about)
    for argv in (["train", "--about"], ["train", "--lr", "1", "--abou"], ["--about", "train"]):
        main(argv=argv)
        assert capsys.readouterr().out == about


def test_a_shortened_help_all_shows_all_flags(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for spelling in ("--help_all", "--help_a"):
        with pytest.raises(SystemExit, match="0"):
            main(argv=["train", spelling])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_flags_at_their_default_are_no_slip(tmp_path: Path) -> None:
    flags = ["--layout", "weak", "--raters", "0", "--patients", "2", "--size", "32"]
    main(argv=["phantoms", "--out", str(tmp_path), *flags])
    assert (tmp_path / "training").is_dir()


# ------------------------------------------------------------------------------ from Python


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_ensamble": 25}, "num_ensamble: no such flag. Did you mean num_ensemble?"),
        ({"foo": 1}, "foo: no such flag. docs/cli.md lists all flags."),
        ({"sampler": "dmp"}, "sampler: 'dmp' is not a choice. Use '', 'ddpm', 'ddim', "),
        ({"fusion": "median"}, "fusion: 'median' is not a choice. Use 'mean', 'vote', "),
        ({"steps": "many"}, "steps: 'many' is not a whole number. Give a whole number."),
        ({"steps": 1001}, "steps 1001: the network was trained at 100 times."),
        ({"num_ensemble": 0}, "num_ensemble 0: must be 1 or more."),
        ({"dpm_solver": 1}, "dpm_solver: 1 is not True or False."),
        ({"steps": True}, "steps: True is not a whole number."),
        ({"eta": "0.5"}, "eta: '0.5' is not a number."),
        ({"eta": 10**400}, "eta: 1000"),
        ({"sampler": None}, "sampler: None is not a text."),
        ({"mask_labels": (1, 2)}, "mask_labels: (1, 2) is not a text."),
        ({"version": "3"}, "version 3: contradicts plain, which "),
        ({"num_channels": 64}, "num_channels 64: contradicts 32, which "),
        ({"data_dir": "x"}, "data_dir: no such flag."),
        ({"out_dir": "x"}, "out_dir: no such flag."),
    ],
)
def test_loading_refuses_unknown_flags_and_values(
    flags: dict[str, object], message: str, trained: Path
) -> None:
    with pytest.raises(UserError) as error:
        Segmenter.load(trained, **flags)
    assert str(error.value).startswith(message)
    assert "--" not in str(error.value)


@pytest.mark.parametrize("path", [Path("nowhere"), "", None, 3])
def test_loading_names_its_own_parameter(path: object) -> None:
    with pytest.raises(UserError) as error:
        Segmenter.load(path)  # type: ignore[arg-type]
    assert str(error.value).startswith("path: ")


def test_an_image_that_cannot_be_segmented(trained: Path) -> None:
    segmenter = Segmenter.load(trained, steps=1, num_ensemble=1)
    with pytest.raises(UserError, match=r"image: its shape is \(4, 0, 0\)"):
        segmenter(np.zeros((4, 0, 0)))
    with pytest.raises(UserError, match=r"Use precision fp32; scripts/check_data\.py looks"):
        segmenter(np.full((4, 16, 16), np.nan))


def test_flags_from_python_are_those_of_a_command_line() -> None:
    flags = Flags.of(SAMPLE, steps=5, eta=1, gpu_dev=1, sampler="ddim")
    assert flags.group(SamplingOptions) == SamplingOptions(steps=5, eta=1.0, sampler="ddim")
    assert flags.given["gpu_dev"] == "1"
    given = {"steps": np.int64(5), "eta": np.float32(0.5), "use_ddim": np.bool_(True)}
    assert Flags.of(SAMPLE, **given).given == {"steps": 5, "eta": 0.5, "use_ddim": True}
    assert Flags.of(SAMPLE, normalise=np.str_("none"), gpu_dev=np.int64(1)).given["gpu_dev"] == "1"


def test_the_root_exports_what_people_use() -> None:
    from guided_diffusion.inference.segmenter import Segmenter as own
    from guided_diffusion.script_util import create_model_and_diffusion as factory
    from guided_diffusion.segmenter import Segmenter as old

    assert Segmenter is own is old
    assert create_model_and_diffusion is factory
