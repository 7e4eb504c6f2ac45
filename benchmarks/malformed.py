"""Give every command malformed inputs, and count tracebacks, hangs and memory in one table.

    python benchmarks/malformed.py --count 10000

An input is files and a command, made of a family's name and a number (``tests/malformed_inputs.py``
holds the families). It may be read or refused; refused means exit code 2 and one line on standard
error. ``--only FAMILY:NUMBER`` repeats one input and shows what it says. The exit code is 1 if an
input was neither, took too long, or took more memory than the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SLOW = 10
"""Seconds after which a command hangs."""
MAKING = 60
"""Seconds that the making of an input may add."""
MOST_ADDRESSES = 24 * 2**30


class Outcome(NamedTuple):
    """What became of an input: 'read', 'refused', or what went wrong, and what it took."""

    verdict: str
    said: str = ""
    seconds: float = 0.0
    gib: float = 0.0


def attempt(family: str, number: int) -> Outcome:
    """Make one input in a folder of its own, and run its command in this process."""
    from malformed_inputs import FAMILIES

    with tempfile.TemporaryDirectory(prefix="malformed-") as home:
        run = FAMILIES[family](Random(f"{family} {number}"), Path(home) / "data")
        before, begun = _start_memory(), time.monotonic()
        out, code, trace = io.StringIO(), 0, ""
        with contextlib.redirect_stdout(out), _captured_errors() as err:
            try:
                run()
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                trace = traceback.format_exc()
        seconds, gib = time.monotonic() - begun, (_memory("VmHWM") - before) / 2**20
        for folder, _, _ in os.walk(home):
            Path(folder).chmod(0o700)
    said = trace or "".join(err) or out.getvalue()
    return Outcome(_verdict(code, trace, "".join(err)), said, seconds, gib)


@contextlib.contextmanager
def _captured_errors() -> Iterator[list[str]]:
    """Collect what is written to standard error, by libraries in C as well."""
    found: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield found
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            found.append(file.read().decode(errors="replace"))


def _verdict(code: int, trace: str, err: str) -> str:
    if trace or "Traceback" in err:
        return "traceback"
    if code == 0:
        return "read" if not err else "noise"
    lines = err.count("\n")
    listed = lines == 0  # by the check, on standard output
    return "refused" if code == 2 and (listed or (lines == 1 and "error: " in err)) else "noise"


def _memory(name: str) -> int:
    """A number of /proc/self/status, in KiB; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
    return 0


def _start_memory() -> int:
    """Measure the peak of memory from now on; return what is in use."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def serve(pipe: Connection) -> None:
    """Run the inputs that come through a pipe; addresses are bounded, for the machine's sake."""
    import resource
    import warnings

    import torch

    import guided_diffusion.scoring.compare
    import guided_diffusion.tools.commands
    import guided_diffusion.weak.commands  # noqa: F401

    torch.set_num_threads(1)
    warnings.simplefilter("default")
    warnings.simplefilter("ignore", ResourceWarning)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(attempt(*pipe.recv()))


class Worker:
    """A process that runs inputs one by one; one that hangs or dies is replaced."""

    def __init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None

    def __call__(self, family: str, number: int) -> Outcome:
        """Run an input, and give it up where it takes too long."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=serve, args=(other,), daemon=True)
            self.process.start()
            other.close()
        self.pipe.send((family, number))
        if not self.pipe.poll(SLOW + MAKING):
            self.close()
            return Outcome("hang", seconds=SLOW + MAKING)
        try:
            found = self.pipe.recv()
        except EOFError:
            self.process.join()
            code, self.process = self.process.exitcode, None
            return Outcome("crash", f"the process ended with {code}")
        return found._replace(verdict="hang") if found.seconds > SLOW else found

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def main() -> None:
    from malformed_inputs import FAMILIES, LIMIT

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="inputs, spread over families")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), help="these alone")
    parser.add_argument("--only", default="", help="FAMILY:NUMBER, one input")
    options = parser.parse_args()
    worker = Worker()
    if options.only:
        family, _, number = options.only.rpartition(":")
        outcome = worker(family, int(number))
        print(outcome.said, outcome._replace(said=""), sep="\n")
        worker.close()
        return

    counts = {family: Counter() for family in options.families}
    most = dict.fromkeys(options.families, (0.0, 0.0))
    bad = 0
    for index in range(options.count):
        family = options.families[index % len(options.families)]
        number = options.first + index // len(options.families)
        outcome = worker(family, number)
        verdict = outcome.verdict
        if verdict in ("read", "refused") and outcome.gib > LIMIT:
            verdict = "memory"
        counts[family][verdict] += 1
        seconds, gib = most[family]
        most[family] = max(seconds, outcome.seconds), max(gib, outcome.gib)
        if verdict not in ("read", "refused"):
            bad += 1
            print(f"{verdict}: --only '{family}:{number}' {outcome.said[-2000:]}", file=sys.stderr)
    worker.close()

    columns = ["read", "refused", "traceback", "crash", "hang", "memory", "noise"]
    print("| family | inputs |", " | ".join(columns), "| longest, s | most memory, GiB |")
    print("|---" * (len(columns) + 4) + "|")
    for family in options.families:
        _print_row(family, counts[family], most[family], columns)
    worst = [max(values) for values in zip(*most.values(), strict=True)]
    _print_row("all", sum(counts.values(), Counter()), (worst[0], worst[1]), columns)
    sys.exit(bad > 0)


def _print_row(
    name: str, counts: Counter[str], most: tuple[float, float], columns: list[str]
) -> None:
    cells = [name, counts.total(), *(counts[column] for column in columns)]
    print("|", " | ".join(map(str, cells)), f"| {most[0]:.1f} | {most[1]:.2f} |")


if __name__ == "__main__":
    main()
