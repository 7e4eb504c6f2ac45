"""What tests of several folders share: the scripts to run, and what they left behind."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from guided_diffusion import logger
from guided_diffusion.data.classes import Classes
from guided_diffusion.data.masks import MaskSet

ROOT = Path(__file__).resolve().parents[1]

# A network that takes milliseconds, at 16 pixels; its diffusion is that of the quick recipes.
NETWORK = [
    *("--image_size", "16", "--num_channels", "32", "--channel_mult", "1,2"),
    *("--num_res_blocks", "1", "--attention_resolutions", "8", "--num_heads", "1"),
]
DIFFUSION = [
    *("--diffusion_steps", "100", "--noise_schedule", "cosine"),
    *("--predict_xstart", "True", "--mask_range", "-1,1"),
]


class Run(NamedTuple):
    """The exit code of a script and its output."""

    code: int
    out: str
    err: str


def script(name: str, *arguments: object) -> Run:
    """Run a script as a program, but in this process, since importing torch takes seconds.

    Exceptions that a script should not let through are not caught here either.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    file = ROOT / (name if name.endswith(".py") else f"scripts/{name}.py")
    argv = [str(file.relative_to(ROOT)), *map(str, arguments)]
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.object(sys, "path", [str(file.parent), *sys.path]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            runpy.run_path(str(file), run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        logger.configure()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Run(code, out.getvalue(), err.getvalue())


def environment() -> dict[str, str]:
    """The environment of a separate process, which can import the package and these helpers."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def process(name: str, *arguments: object, group: bool = False) -> subprocess.Popen[str]:
    """Start a file of scripts/ in a process, or a group of them, from the repository's root."""
    return subprocess.Popen(
        [sys.executable, f"scripts/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        start_new_session=group,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(
    count: int, *arguments: object, timeout: float = 100, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a file in several processes, as torchrun does, from the repository's root."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.run(
        [sys.executable, "-W", "ignore", *launcher, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def two_nodes(count: int, *arguments: object, timeout: float = 200) -> list[str]:
    """Run a file as two nodes do, each with several processes; return what each node says."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={count}"]
    launcher += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *launcher, "--local_addr=127.0.0.1"]
            + [str(argument) for argument in arguments],
            cwd=ROOT,
            env=environment() | {"GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [node.communicate(timeout=timeout)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    return said


def succeeded(run: Run) -> str:
    """Return a script's output, after checking that it succeeded and wrote nothing to stderr."""
    assert (run.code, run.err) == (0, ""), run
    return run.out


def refused(run: Run) -> str:
    """Return a script's error, after checking that it is one line and the exit code is 2."""
    assert run.code == 2, run
    assert run.err.startswith("error: "), run
    assert run.err.count("\n") == 1 and run.err.endswith("\n"), run
    return run.err


def read_alone(path: Path, classes: Classes | None = None) -> Tensor:
    """Read a mask by what the values of this one file say, float32 [K, H, W]."""
    return MaskSet([path], classes).read(path)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, hidden ones too, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def training(brats: Path, out_dir: Path) -> list[Any]:
    """Return the flags of the fixture ``trained``, except for the number of steps."""
    return [
        *("--data_dir", brats / "training", "--out_dir", out_dir, *NETWORK, *DIFFUSION),
        *("--batch_size", 2, "--lr", 3e-3, "--ema_rate", "0.9", "--dropout", 0.1),
        *("--save_interval", 2, "--log_interval", 2, "--fp16_scale_growth", 1e-3),
    ]
