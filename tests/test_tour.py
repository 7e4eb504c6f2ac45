"""The tour: its notebook and pictures are those of the page, and the notebook runs.

That the code of the page runs is tested with all other pages, in test_docs.py.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import ModuleType

import pytest
from helpers import ROOT

PAGE = ROOT / "docs/tour.md"


@pytest.fixture(scope="module")
def tour() -> ModuleType:
    """The script that makes notebook and pictures."""
    spec = importlib.util.spec_from_file_location("tour", ROOT / "docs/tour.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_that_of_the_page(tour: ModuleType) -> None:
    made = tour.notebook(PAGE.read_text("utf-8"))
    assert PAGE.with_suffix(".ipynb").read_text("utf-8") == made, "run python docs/tour.py"


def test_cells_are_code_and_text_without_pictures(tour: ModuleType) -> None:
    page = "# T\n\n```python\na = 1\n```\n\n![x](tour/x.png)\n\nEnd.\n\n```bash\nls\n```\n"
    assert tour.cells(page) == [
        ("markdown", "# T"),
        ("code", "a = 1"),
        ("markdown", "End.\n\n```bash\nls\n```"),
    ]


def test_pictures_are_small_and_each_is_shown(tour: ModuleType) -> None:
    named = tour.PICTURE.findall(PAGE.read_text("utf-8"))
    there = sorted((ROOT / "docs/tour").iterdir())
    assert sorted(named) == [f"tour/{path.name}" for path in there]
    assert sum(path.stat().st_size for path in there) < 400_000


@pytest.mark.long
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom in a kernel of its own, in three minutes; every figure is shown."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more are slower beside other tests
    notebook = nbformat.read(PAGE.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    started = time.monotonic()
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=180, resources=resources).execute()
    assert time.monotonic() - started < 180
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == PAGE.read_text("utf-8").count("](tour/")
    printed = "".join(output.get("text", "") for output in outputs)
    assert "order of convergence 2.0" in printed and "Warning" not in printed
