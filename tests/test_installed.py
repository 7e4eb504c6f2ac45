"""The wheel: it holds the whole package, and its console command works from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import DIFFUSION, NETWORK, ROOT
from PIL import Image

from guided_diffusion.tools.phantom_skin import make_skin


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what it is made of."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "guided_diffusion", source / "guided_diffusion", ignore=ignored)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [sys.executable, "-m", "pip", *build, "--wheel-dir", source / "dist", source], check=True
    )
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console command in a fresh environment that borrows the tested dependencies."""
    home = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    borrowed = Path(found.stdout.strip()) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return scripts / "guided-diffusion"


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    package = ROOT / "guided_diffusion"
    files = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == files
    pages = {f"guided_diffusion/report/report.{kind}" for kind in ("html", "css", "js")}
    weights = {f"guided_diffusion/weights/isic-small.{kind}" for kind in ("safetensors", "md")}
    assert {"guided_diffusion/py.typed", *pages, *weights} <= packed


@pytest.mark.slow
def test_the_installed_command_trains_samples_and_scores(
    program: Path, brats: Path, tmp_path: Path
) -> None:
    """From another folder, and without the sources: the package is the installed one."""

    def run(*words: object) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        ended = subprocess.run(
            [program, *map(str, words)],
            cwd=tmp_path,
            env={**environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert run("--about").startswith("guided-diffusion 0.1.0, torch ")
    Image.fromarray(make_skin(0, 1).picture).save(tmp_path / "mole.jpg")
    said = run("sample", "--model_path", "isic-small", "--data_dir", "mole.jpg", "--steps", 1)
    assert "isic-small is used with --preset small" in said
    assert (tmp_path / "results/report.html").stat().st_size > 10_000
    run(
        *("train", "--data_dir", brats / "training", "--out_dir", "run", *NETWORK, *DIFFUSION),
        *("--batch_size", 2, "--max_steps", 2),
    )
    run(
        *("sample", "--model-path", "run", "--data-dir", brats / "testing", "--out-dir", "run"),
        *("--dpm-solver", True, "--steps", 2, "--num-ensemble", 2),
    )
    said = run("score", "--inp_pth", "run", "--out_pth", brats / "testing")
    assert "dice is " in said and (tmp_path / "run/report.html").stat().st_size > 10_000
