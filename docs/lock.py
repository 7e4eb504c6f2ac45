"""Write requirements-dev.lock.txt, what tests need, with hashes: python docs/lock.py [WHEEL ...]

It needs uv (python -m pip install uv). Versions already in the file are kept while
requirements-dev.txt admits them. Of torch only CPU builds are listed: the given wheels, and those
already in the file while its version stays. What only the CUDA build needs is left out.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements-dev.lock.txt"
HEAD = """\
# What make test LOCKED=1 installs, for Python 3.11 to 3.14; make lock writes this list anew.
# The hashes of torch are those of CPU builds; one that is installed already is not replaced.
"""
CUDA = re.compile(r"(nvidia-|cuda-|triton==)")


def compiled(kept: str) -> str:
    """What uv chooses for all platforms, as one block of lines a package."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, LOCK.name)
        output.write_text(kept, encoding="utf-8")
        options = ["--universal", "--python-version", "3.11", "--generate-hashes"]
        quiet = ["--no-emit-index-url", "--no-annotate", "--no-header", "--no-config", "--quiet"]
        command = ["pip", "compile", "requirements-dev.txt", *options, *quiet, "--output-file"]
        subprocess.run([sys.executable, "-m", "uv", *command, output], cwd=ROOT, check=True)
        return output.read_text(encoding="utf-8")


def blocks(text: str) -> dict[str, set[str]]:
    """The hashes of each requirement, by its line."""
    found: dict[str, set[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("    --hash="):
            found[name].add(line.strip(" \\").removeprefix("--hash="))
        elif line and not line.startswith("#"):
            name = line.removesuffix(" \\")
            found[name] = set()
    return found


def main(wheels: list[str]) -> None:
    """Write the file."""
    former = LOCK.read_text(encoding="utf-8") if LOCK.exists() else ""
    known = blocks(former)
    given = {f"sha256:{hashlib.sha256(Path(wheel).read_bytes()).hexdigest()}" for wheel in wheels}
    text = HEAD
    for name, hashes in blocks(compiled(former)).items():
        if name.startswith("torch=="):
            hashes = known.get(name, set()) | given
            if not hashes:
                sys.exit(f"{name}: give the wheels of its CPU builds")
        if not CUDA.match(name):
            text += " \\\n    --hash=".join([name, *sorted(hashes)]) + "\n"
    LOCK.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
