"""House rules: floors, quiet imports, no print, a docstring for everything public."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "guided_diffusion"

# A module imports from lower floors only, never from its own.
FLOORS = [
    {"errors"},
    {"classes"},
    # files, numbers and flags
    {"files", "readers", "intensity", "options", "phantoms"},
    # arithmetic on arrays
    {"metrics", "surface", "calibration", "intervals", "charts"},
    {"schedule", "nn", "losses", "phantom_folders", "background", "curves", "provenance"},
    {"weak_options"},
    # what a data set is, what a diffusion is
    {"datasets", "patients", "pictures", "checkpoint"},
    {"respace", "gaussian_diffusion", "resample", "ensemble", "averages", "lessons"},
    {"thumbnails", "highway", "ss_former"},
    # one layout each, one solver each
    {"volumes", "restack", "cache", "augment", "splits"},
    {"bratsloader", "isicloader", "custom_dataset_loader"},
    {"dpm_solver", "unipc", "unet", "classifier", "resnet", "guidance"},
    {"tumour_images"},
    {"layouts", "slicing", "sampling", "medsegdiff", "medsegdiff_v2"},
    # what is predicted, and what it is worth
    {"predictions"},
    {"case_scores"},
    {"summary"},
    # factories, verbs, and the root that knows all names
    {"script_util", "weak", "plan"},
    {"stream", "step_log", "stop_signal", "sinks"},
    {"train_util", "segmenter", "evaluate", "check", "report_figures"},
    {"class_results", "film"},
    {"predict", "validation", "report", "compare", "weak_models"},
    {"watching", "matching", "weak_predict"},
    {"runs"},
    {"weak_train"},
    {"weak_runs"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
GROUND, FACTORIES, VERBS = FLOOR["files"], FLOOR["script_util"], FLOOR["train_util"]

# The side room stands on the ground floor; only the verbs and what is above them enter it.
SIDE_ROOM = {"dist_util", "logger"}

MAY_PRINT = {"errors", "logger", "options", "runs"}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
TREES = {name: ast.parse((PACKAGE / f"{name}.py").read_text("utf-8")) for name in MODULES}


def imports(tree):
    """Every import anywhere in a module, as (module, name) pairs; name is "" for `import m`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package's modules are imported by their full names"
            yield from ((node.module, alias.name) for alias in node.names)


def siblings(name):
    """The package's modules that a module imports."""
    full = {f"{module}.{what}" for module, what in imports(TREES[name])}
    return {
        other
        for other in MODULES
        for path in full
        if f"{path}.".startswith(f"{PACKAGE.name}.{other}.")
    }


def test_every_module_has_its_floor():
    assert not set(FLOOR) & SIDE_ROOM
    assert set(MODULES) == set(FLOOR) | SIDE_ROOM


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    floor = GROUND + 1 if name in SIDE_ROOM else FLOOR[name]
    for other in siblings(name):
        if other in SIDE_ROOM:
            assert floor >= VERBS, f"{name} enters the side room of {other}"
        else:
            assert FLOOR[other] < floor, f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize("name", [name for name in MODULES if name not in MAY_PRINT])
def test_nothing_prints(name):
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if getattr(call.func, "id", "") == "print"]
    assert not lines


@pytest.mark.parametrize("name", [name for name in FLOOR if FLOOR[name] < FACTORIES])
def test_below_the_factories_nobody_reads_the_environment_or_shows_progress(name):
    forbidden = {"argparse", "tqdm", "logging"} - ({"argparse"} if name == "options" else set())
    assert not {module.partition(".")[0] for module, _ in imports(TREES[name])} & forbidden
    attributes = {node.attr for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
    assert not attributes & {"environ", "getenv"}
    assert not {what for _, what in imports(TREES[name])} & {"environ", "getenv"}


@pytest.mark.parametrize("name", ["__init__", *MODULES])
def test_everything_public_has_a_docstring(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text("utf-8"))
    assert ast.get_docstring(tree), "every file opens with what lives here"
    assert not list(undocumented(tree))


def undocumented(tree):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node)


def run(code):
    """Run a line of Python in a fresh process, warnings being errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "module",
    ["guided_diffusion", "guided_diffusion.options", "guided_diffusion.weak_options"],
)
def test_the_package_and_its_flags_import_quietly_and_without_torch(module):
    heavy = "{'torch', 'numpy', 'nibabel', 'skimage', 'scipy', 'PIL', 'socket'}"
    result = run(f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))")
    assert (result.stdout, result.stderr, result.returncode) == ("[]\n", "", 0)


def test_all_modules_import_quietly_and_touch_no_network():
    loads = "; ".join(f"import guided_diffusion.{name}" for name in MODULES)
    guard = "import socket; socket.socket.connect = socket.socket.bind = None"
    result = run(f"{guard}; {loads}")
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


@pytest.mark.parametrize(("typed", "asked"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_huge_pages_are_asked_for_unless_the_user_says_no(typed, asked, monkeypatch):
    """torch reads the variable when it makes its first tensor; whether it gets them is chance."""
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    for name, value in typed.items():
        monkeypatch.setenv(name, value)
    said = run("import os, guided_diffusion; print(os.environ['THP_MEM_ALLOC_ENABLE'])")
    assert (said.stdout, said.stderr) == (f"{asked}\n", "")
