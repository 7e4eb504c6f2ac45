"""The architecture: layers, no cycles, quiet imports, no print, a docstring for what is public."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "guided_diffusion"

# Modules and subpackages, lowest first. Each imports from lower lines only, never from its own;
# within a subpackage, modules may import one another, but not in a cycle.
LAYERS = """
errors
files options
schedule nn losses resample respace ensemble data
gaussian_diffusion unet bratsloader isicloader custom_dataset_loader
dpm_solver networks layouts checkpoint
sampling script_util
scoring dist_util logger
report
inference
training
train_util
weak tools
commands
__main__ segmenter __init__
"""
LAYER = {name: layer for layer, line in enumerate(LAYERS.split("\n")) for name in line.split()}

MAY_PRINT = {"errors", "logger", "options.parser", "commands"}
MAY_READ_THE_ENVIRONMENT = {"layouts", "__init__"}  # XDG_CACHE_HOME, THP_MEM_ALLOC_ENABLE
MOST_LINES = 400


def module_name(path):
    """The name below the package; that of a subpackage's __init__.py is the subpackage's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in PATHS.items()}
BELOW_THE_FACTORIES = [
    name
    for name in PATHS
    if LAYER[name.partition(".")[0]] < LAYER["script_util"] and not name.startswith("options")
]


def imports(tree):
    """Every import anywhere in a module, as (module, name) pairs; name is "" for `import m`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the package's modules are imported by their full names"
            yield from ((node.module, alias.name) for alias in node.names)


def imported(name):
    """The package's modules that a module imports, anywhere in its text."""
    for module, what in imports(TREES[name]):
        root, _, inner = f"{module}.{what}".partition(".")
        while inner and inner not in PATHS:
            inner = inner.rpartition(".")[0]  # its last part is no module, but what one defines
        if root == PACKAGE.name and inner and inner != name:
            yield inner


def test_everything_at_the_top_has_its_layer():
    assert {name.partition(".")[0] for name in PATHS} == set(LAYER)


@pytest.mark.parametrize("name", PATHS)
def test_imports_point_down(name):
    own = name.partition(".")[0]
    for other in imported(name):
        top = other.partition(".")[0]
        assert top == own or LAYER[top] < LAYER[own], f"{name} imports {other}"


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter({name: set(imported(name)) for name in PATHS}).prepare()


@pytest.mark.parametrize("name", PATHS)
def test_no_module_is_long(name):
    assert len(PATHS[name].read_text("utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("name", [name for name in PATHS if name not in MAY_PRINT])
def test_nothing_prints(name):
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if getattr(call.func, "id", "") == "print"]
    assert not lines


@pytest.mark.parametrize("name", BELOW_THE_FACTORIES)
def test_below_the_factories_nobody_parses_flags_or_shows_progress(name):
    used = {module.partition(".")[0] for module, _ in imports(TREES[name])}
    assert not used & {"argparse", "tqdm", "logging"}


@pytest.mark.parametrize("name", sorted({*BELOW_THE_FACTORIES} - MAY_READ_THE_ENVIRONMENT))
def test_below_the_factories_nobody_reads_the_environment(name):
    attributes = {node.attr for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
    names = {what for _, what in imports(TREES[name])}
    assert not (attributes | names) & {"environ", "getenv"}


@pytest.mark.parametrize("name", PATHS)
def test_everything_public_has_a_docstring(name):
    assert ast.get_docstring(TREES[name]), "every file opens with what it is for"
    assert not list(undocumented(TREES[name]))


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
    ["guided_diffusion", "guided_diffusion.options", "guided_diffusion.options.weak"],
)
def test_the_package_and_its_flags_import_quietly_and_without_torch(module):
    heavy = "{'torch', 'numpy', 'nibabel', 'skimage', 'scipy', 'PIL', 'socket'}"
    result = run(f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))")
    assert (result.stdout, result.stderr, result.returncode) == ("[]\n", "", 0)


def test_all_modules_import_quietly_and_touch_no_network():
    loads = "; ".join(f"import guided_diffusion.{name}" for name in PATHS)
    guard = "import socket; socket.socket.connect = socket.socket.bind = None"
    result = run(f"{guard}; {loads}")
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


@pytest.mark.parametrize(("given", "asked"), [({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")])
def test_huge_pages_are_asked_for_unless_the_user_says_no(given, asked, monkeypatch):
    """torch reads the variable when it makes its first tensor; whether it gets them is chance."""
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    said = run("import os, guided_diffusion; print(os.environ['THP_MEM_ALLOC_ENABLE'])")
    assert (said.stdout, said.stderr) == (f"{asked}\n", "")
