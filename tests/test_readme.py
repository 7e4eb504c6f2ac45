"""Every command the README prints runs, shrunk by further flags only."""

import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script

from guided_diffusion.tools import phantom_folders

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = "--image_size 32 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1"
JUDGE = "--image_size 32 --classifier_width 32 --classifier_depth 1"
SHRINK = {
    "scripts/segmentation_train.py": f"{SMALL} --batch_size 2 --max_steps 2",
    "scripts/segmentation_sample.py": "--steps 2 --num_samples 2 --num_ensemble 2",
    "scripts/segmentation_env.py": "--partial True",
    "scripts/make_phantoms.py": "--patients 3 --size 32",
    "scripts/brats_slices.py": "--slices 80:83 --workers 1",
    "scripts/check_data.py": "",
    "benchmarks/versions.py": "--budget 0.1 --seeds 1 --methods plain 2 --cases 1 --steps 1",
    "scripts/train_tumor_ddfm.py": f"{SMALL} --batch_size 2 --max_steps 2",
    "scripts/train_2d_ddfm.py": f"{SMALL} --batch_size 2 --max_steps 2",
    "scripts/classifier_tumor_train.py": f"{JUDGE} --batch_size 2 --iterations 2",
    "scripts/classifier_train.py": f"{JUDGE} --batch_size 2 --iterations 2",
    "scripts/image_tumor_sample.py": "--num_samples 2 --steps 2",
    "scripts/classifier_tumor_sample.py": "--num_samples 2 --steps 2",
    "scripts/image_p_seg.py": "--num_samples 2 --steps 2 --noises 1",
    "benchmarks/steps.py": "--cases 2 --settings ddim:2 dpm_solver++:2",
}
RUN_BY_MAKE = ("-m venv", "-m pip", "-m ruff", "-m mypy", "-m pytest")
"""What ``make test`` itself does before it runs this test, and for the same files."""


def shell_lines() -> list[str]:
    """Return the lines of the README's shell blocks and its inline commands, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    inline = re.findall(r"`(python (?:scripts|benchmarks)/[^`]*)`", README)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in [*lines, *(" ".join(i.split()) for i in inline)] if line.strip()]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder that looks like a clone with the data that the README speaks of."""
    place = tmp_path_factory.mktemp("clone")
    for name in ("scripts", "guided_diffusion", "benchmarks", "Makefile", "requirements.txt"):
        (place / name).symlink_to(ROOT / name)
    for side in ("training", "testing"):
        (place / "data").mkdir(exist_ok=True)
        (place / "data" / side).symlink_to(ROOT / "data" / side)
    phantom_folders.write_isic(place / "data" / "ISIC", 0, patients=6, size=48)
    write_arrays(place / "data" / "synapse")
    return place


def write_arrays(folder: Path) -> None:
    """Write volumes of 2 slices, one of which has the label 1, and their split."""
    (folder / "preprocessed").mkdir(parents=True)
    names = [f"{number}.npy" for number in range(3)]
    for name in names:
        volume = np.zeros((2, 2, 32, 32), np.float32)
        volume[1, :, 8:16, 8:16] = 1
        np.save(folder / "preprocessed" / name, volume)
    split = {"train": names[:1], "val": names[1:2], "test": names[2:]}
    (folder / "splits.pkl").write_bytes(pickle.dumps([split]))


def run(command: str, variables: dict[str, str]) -> None:
    """Run one command, as a shell would after the README's variables."""
    for name, value in variables.items():
        command = command.replace(f"${name}", value)
    program, file, *words = shlex.split(command)
    assert program == "python"
    shrink = SHRINK[file]
    if "--image_size" in command and file.endswith("sample.py"):
        shrink += f" {SMALL}"  # the flags of the network have to be those of training
    ended = script(file, *words, *shlex.split(shrink))
    assert ended.code == 0, f"{command}\n{ended.err[-2000:]}"


def test_the_readme_s_commands_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    variables: dict[str, str] = {}
    ran = 0
    for line in shell_lines():
        assignment = re.fullmatch(r'(\w+)="(.*)"', line)
        if assignment:
            variables[assignment[1]] = assignment[2]
        elif line.startswith("python ") and not any(part in line for part in RUN_BY_MAKE):
            run(line, variables)
            ran += 1
    assert ran >= 20

    names: dict[str, object] = {"image": torch.rand(4, 80, 80)}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    assert names["result"].members.shape == (5, 80, 80)


def planned(target: str, workspace: Path) -> list[str]:
    """The commands that make would run for a target, as the README prints them."""
    ready = Path(sys.prefix) / "ready"
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", "-o", ready, target, f"VENV={sys.prefix}"],
        cwd=workspace,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        check=True,
    )
    made = re.sub(r"\\\n\s*", "", done.stdout).replace(f"{sys.prefix}/bin/", "")
    return [" ".join(line.split()) for line in made.splitlines()]


@pytest.mark.parametrize(("target", "count"), [("demo", 3), ("test", 4)])
def test_make_runs_the_readme_s_lines(target: str, count: int, workspace: Path) -> None:
    commands = planned(target, workspace)
    assert len(commands) == count
    assert set(commands) <= {" ".join(line.split()) for line in shell_lines()}


def test_nothing_else_is_printed_as_a_command() -> None:
    """Each line of a shell block is known to the tests above."""
    known = ("make demo", "make test", "python", "python3 -m venv", ". .venv/bin/activate")
    for line in shell_lines():
        assert line.startswith(known) or re.fullmatch(r'\w+="[^"]*"', line), line


def test_every_figure_has_been_filled_in() -> None:
    assert not re.findall(r"\b[A-Z]{10,}\b", README)


def test_pictures_and_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
