"""The README and the pages of docs/: every command runs, every link leads somewhere.

Commands run as printed, shrunk by further flags only. Each page is a test of its own: what it needs
besides its own commands (data, a trained model) is made by the fixture ``workspace``.
"""

from __future__ import annotations

import os
import pickle
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import script
from PIL import Image

from guided_diffusion.layouts import LAYOUTS, open_dataset
from guided_diffusion.tools import phantom_folders
from guided_diffusion.tools.phantom_layouts import write_layout
from guided_diffusion.tools.phantom_skin import make_skin

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
CARD = ROOT / "guided_diffusion/weights/isic-small.md"
OTHER_PAGES = [
    ROOT / name
    for name in (
        *("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "data/README.md"),
        *("results/README.md", "results/versions.md", "results/weak.md"),
        "guided_diffusion/weights/isic-small.md",
    )
]
SCRIPTS = {  # what each subcommand of guided-diffusion runs
    "train": "segmentation_train.py",
    "sample": "segmentation_sample.py",
    "score": "segmentation_env.py",
    "check": "check_data.py",
    "slices": "brats_slices.py",
    "phantoms": "make_phantoms.py",
    "export": "export_weights.py",
    "weak-train": "train_tumor_ddfm.py",
    "weak-classifier": "classifier_tumor_train.py",
    "weak-sample": "image_tumor_sample.py",
    "weak-segment": "image_p_seg.py",
    "weak-arrays": "image_p_sample.py",
}
NETWORK = "--image_size 32 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1"
TRAINING = f"{NETWORK} --batch_size 2 --max_steps 2"
CLASSIFIER = "--image_size 32 --classifier_width 32 --classifier_depth 1"
SHRINK = {
    "segmentation_train.py": f"{TRAINING} --num_workers 0 --val_cases 2",
    "segmentation_sample.py": "--steps 2 --num_samples 2 --num_ensemble 2",
    "segmentation_env.py": "--partial True",
    "make_phantoms.py": "--patients 3 --size 32",
    "brats_slices.py": "--slices 80:83 --workers 1",
    "check_data.py": "",
    "export_weights.py": "",
    "train_tumor_ddfm.py": TRAINING,
    "train_2d_ddfm.py": TRAINING,
    "classifier_tumor_train.py": f"{CLASSIFIER} --batch_size 2 --iterations 2",
    "classifier_train.py": f"{CLASSIFIER} --batch_size 2 --iterations 2",
    "image_tumor_sample.py": "--num_samples 2 --steps 2",
    "classifier_tumor_sample.py": "--num_samples 2 --steps 2",
    "image_p_seg.py": "--num_samples 2 --steps 2 --noises 1",
    "image_p_sample.py": "--num_samples 2 --steps 2",
    "steps.py": "--cases 2 --settings ddim:2 dpm_solver++:2",
    "method.py": "--sets brats --stages screen --recipes unet --screen_steps 1 --size 32 --cases 2",
    "versions.py": "--budget 0.1 --seeds 1 --methods plain --cases 1 --steps 1",
}
PUBLIC = {  # data sets of docs/data.md, and the layouts of phantoms that stand for them
    "ISIC2018": "isic2018",
    "BraTS2021": "brats2021",
    "Kvasir-SEG": "custom",
    "LIDC": "custom",
    "Task01_BrainTumour": "msd",
    "Dataset_BUSI_with_GT": "busi",
    "DRIVE": "drive",
    "REFUGE": "refuge",
    "ACDC/database": "acdc",
}
TORCHRUN = r"(?:srun )?torchrun (?:--\S+ )+(?=scripts/)"
FRONT_END = r"guided-diffusion |python -m guided_diffusion "
RUN_ELSEWHERE = (  # by make, by the test of the installed wheel, or by a cluster
    r"make( demo| test| check| coverage| lock| clean|$)",
    r"python3 -m venv \.venv$",
    r"\. \.venv/bin/activate$",
    r"python -m (pip install|ruff|mypy|pytest)\b",
    r"export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1$",
)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The code blocks of a page, in order: language and text."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def shell_lines(text: str) -> list[str]:
    """The commands of a shell block, each on one line and without its comment."""
    joined = re.sub(r" \\\n\s*", " ", text)
    return [line for raw in joined.splitlines() if (line := re.sub(r"\s+# .*", "", raw).strip())]


def inline_commands(page: Path) -> list[str]:
    """The complete commands that stand in a page's sentences."""
    found = re.findall(
        rf"`((?:{FRONT_END}|python (?:scripts|benchmarks)/)[^`]* --[^`]*)`", prose(page)
    )
    return [" ".join(command.split()) for command in found]


def all_lines(page: Path) -> list[str]:
    """Every line of a page's shell blocks, and its inline commands."""
    shell = [text for language, text in blocks(page) if language == "bash" and not of_slurm(text)]
    return [line for text in shell for line in shell_lines(text)] + inline_commands(page)


def of_slurm(text: str) -> bool:
    """Whether a block is a script for SLURM, or submits one: test_slurm.py runs it."""
    return text.startswith("#!/bin/bash") or "sbatch " in text


def is_command(line: str) -> bool:
    """Whether a line runs one of the project's programs."""
    return bool(re.match(rf"{FRONT_END}|python (scripts|benchmarks)/|{TORCHRUN}", line))


def words_of(line: str) -> list[str]:
    """A command as a script's path and its flags, however it is started."""
    _, *words = shlex.split(re.sub(TORCHRUN, "python ", line).replace("python -m ", ""))
    if words[0] in SCRIPTS:
        words[0] = f"scripts/{SCRIPTS[words[0]]}"
    return words


def run(line: str) -> None:
    """Run one command in this process, shrunk."""
    file, *flags = words_of(line)
    small = SHRINK[Path(file).name]
    if "--image_size" in flags and "sample" in file:
        small += f" {NETWORK}"  # the flags of the network have to be those of training
    ended = script(file, *flags, *small.split())
    assert ended.code == 0, f"{line}\n{ended.err[-2000:]}"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder that looks like a clone, with the data and models that the pages speak of."""
    place = tmp_path_factory.mktemp("clone")
    folders = [ROOT / name for name in ("scripts", "guided_diffusion", "Makefile")]
    for path in (*folders, *ROOT.glob("requirements*.txt")):
        (place / path.name).symlink_to(path)
    (place / "benchmarks" / "splits").mkdir(parents=True)
    for path in (ROOT / "benchmarks").glob("*.py"):
        (place / "benchmarks" / path.name).symlink_to(path)
    (place / "data").mkdir()
    for side in ("training", "testing"):
        (place / "data" / side).symlink_to(ROOT / "data" / side)
    phantom_folders.write_isic(place / "data" / "ISIC", 0, patients=6, size=48)
    (place / "data" / "brats15_2d").symlink_to(ROOT / "data")
    volumes = {"patients": 3, "slices": 155, "size": 24, "training": 1.0}
    phantom_folders.write_brats_volumes(place / "data" / "BraTS20", 0, **volumes)
    phantom_folders.write_weak(place / "data" / "brats_flair", 0, patients=6, size=32, training=0.5)
    for folder in ("kvasir/train", "kvasir/val", "mine"):
        write_layout("custom", place / "data" / folder, 0, patients=5, slices=1, size=24)
    for name, layout in PUBLIC.items():
        write_layout(layout, place / name, 0, patients=4, slices=12, size=24, training=0.5)
    (place / "my_pictures").mkdir()
    for number in range(3):
        picture = Image.fromarray(make_skin(0, number).picture)
        picture.resize((90 + 10 * number, 70)).save(place / f"my_pictures/{number}.jpg")
    write_arrays(place / "data" / "synapse")
    write_split(place / "split.txt")
    write_recipe_splits(place)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for folder in ("results/demo", "results/mine"):
            run(f"guided-diffusion train --data_dir data/training --out_dir {folder}")
            masks = f"--out_dir {folder}/masks --dpm_solver True"
            run(f"guided-diffusion sample --data_dir data/testing --model_path {folder} {masks}")
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


def write_split(path: Path) -> None:
    """Divide the example's patients as the pages do."""
    parts = ["training"] * 17 + ["validation"] * 3 + ["testing"] * 5
    path.write_text("".join(f"{patient:03d} {part}\n" for patient, part in enumerate(parts, 1)))


def write_recipe_splits(place: Path) -> None:
    """Divide the phantoms as the recipes divide the data sets that they stand for."""
    for file, folder in (
        ("benchmarks/splits/isic.txt", "data/ISIC/Train"),
        ("benchmarks/splits/kvasir.txt", "data/kvasir/train"),
        ("data/BraTS20/split.txt", "data/BraTS20"),
    ):
        dataset = open_dataset(place / folder)
        names = sorted({entry.volume or entry.name for entry in dataset.entries})
        parts = ["training", "validation", "testing"]
        lines = [f"{name} {parts[number % 3]}\n" for number, name in enumerate(names)]
        (place / file).write_text("".join(lines))
    (place / "benchmarks/splits/brats.txt").symlink_to(ROOT / "benchmarks/splits/brats.txt")


@pytest.mark.parametrize("page", [*PAGES, CARD], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(
    page: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of Python run between the commands, in the order of the page."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr("guided_diffusion.layouts.LAYOUTS", LAYOUTS.copy())
    variables: dict[str, str] = {}
    names: dict[str, Any] = {"image": torch.rand(4, 80, 80)}
    inline = [("bash", command) for command in inline_commands(page)]
    for language, text in [*blocks(page), *inline]:
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
        for line in shell_lines(text) if language == "bash" and not of_slurm(text) else []:
            assignment = re.fullmatch(r'(\w+)="(.*)"', line)
            if assignment:
                variables[assignment[1]] = assignment[2]
            elif is_command(line):
                run(re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line))
    if "plt" in names:
        names["plt"].close("all")
    if page == README:
        assert names["result"].members.shape == (8, 80, 80)


def test_nothing_else_is_printed_as_a_command() -> None:
    """Each line of a shell block is run above, or known to run elsewhere."""
    lines = [line for page in PAGES for line in all_lines(page)]
    known = "|".join((*RUN_ELSEWHERE, r'\w+="[^"]*"$'))
    assert [line for line in lines if not is_command(line) and not re.match(known, line)] == []
    assert sum(map(is_command, lines)) >= 60


def planned(target: str, workspace: Path) -> list[str]:
    """The scripts and checks that make would run for a target."""
    done = subprocess.run(
        ["make", "-n", "--no-print-directory", target, f"VENV={sys.prefix}"],
        cwd=workspace,
        env={
            name: value
            for name, value in os.environ.items()
            if name != "OUT" and not name.startswith("MAKE")
        },
        capture_output=True,
        text=True,
        check=True,
    )
    made = re.sub(r"\\\n\s*", "", done.stdout).replace(f"{sys.prefix}/bin/", "")
    lines = [" ".join(line.split()) for line in made.splitlines()]
    return [line for line in lines if re.match(r"python (scripts/|-m (?!venv|pip))", line)]


@pytest.mark.parametrize(("target", "count"), [("demo", 3), ("test", 4)])
def test_make_runs_the_lines_of_the_docs(target: str, count: int, workspace: Path) -> None:
    commands = planned(target, workspace)
    assert len(commands) == count
    assert set(commands) <= {line for page in PAGES for line in all_lines(page)}


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = README.read_text("utf-8")
    assert len(text.encode()) <= 10_000 and len(text.split()) <= 1000
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", text))
    assert linked == {page.name for page in PAGES} - {README.name}


def test_a_figure_of_the_readme_is_also_where_its_details_are() -> None:
    rest = "".join(page.read_text("utf-8") for page in (*PAGES[1:], *OTHER_PAGES))
    assert [
        n for n in re.findall(r"\b0\.\d{3,}\b", README.read_text("utf-8")) if n not in rest
    ] == []


@pytest.mark.parametrize(
    "page", [*PAGES, *OTHER_PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_form_of_a_page(page: Path) -> None:
    assert not set(re.findall(r"\b[A-Z]{10,}\b", page.read_text("utf-8"))) - {"CONTRIBUTING"}
    long = [line for _, text in blocks(page) for line in text.splitlines() if len(line) > 100]
    assert long == []
    for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", prose(page)):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def test_pinned_versions_in_the_pages_are_those_of_the_requirements() -> None:
    pins = {line for path in ROOT.glob("requirements*.txt") for line in path.read_text().split()}
    named = {pin for page in PAGES for pin in re.findall(r"\w+==[\d.]+\d", page.read_text("utf-8"))}
    assert named and named <= pins


def test_the_reference_of_python_is_that_of_the_docstrings() -> None:
    page = ROOT / "docs/python.md"
    made = runpy.run_path(str(ROOT / "docs/api.py"))["refilled"](page.read_text("utf-8"))
    assert page.read_text("utf-8") == made, "run python docs/api.py"
    assert made.count("<!-- end -->") > 40


def test_modules_named_in_the_pages_exist() -> None:
    """A path such as `data/cache.py` is one of the package, or of the repository."""
    for page in PAGES:
        for path in re.findall(r"`([\w/]+\.py)`", prose(page)):
            places = (ROOT / path, ROOT / "guided_diffusion" / path, ROOT / "scripts" / path)
            assert any(place.exists() for place in places), f"{page.name}: {path}"
