"""A process and then a whole node are lost, and torchrun starts the others again.

The line is that of docs/training.md, on two nodes of two processes, all on this machine.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from helpers import DIFFUSION, NETWORK, ROOT, torchrun
from loops import equal
from test_docs import blocks, of_slurm
from test_slurm import Cluster, free_port

from guided_diffusion.checkpoint import LATEST, load_checkpoint
from guided_diffusion.dist_util import check_launcher
from guided_diffusion.errors import UserError

SMALL = [*NETWORK, *DIFFUSION, "--batch_size", "1", "--num_workers", "0", "--precision", "fp32"]
SMALL += ["--max_steps", "40", "--save_interval", "5", "--log_interval", "100", "--dropout", "0.1"]

PROGRAM = """
import torch
from guided_diffusion.commands import main

class Unchanged(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module, **named):
        super().__init__(module, find_unused_parameters=True, **named)

torch.nn.parallel.DistributedDataParallel = Unchanged
main("segmentation_train")
"""
"""The script, but that gradients are added in one order from the first step on. Otherwise torch
arranges them anew after the first step, and the first one after a restart rounds differently."""


def printed() -> str:
    """The lines of the page for a run that outlives a node."""
    page = ROOT / "docs/training.md"
    (text,) = [t for _, t in blocks(page) if "--max_restarts" in t and not of_slurm(t)]
    return text


def family(pid: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(member for child in children for member in family(int(child)))]


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_a_run_that_loses_a_process_and_a_node_ends_with_the_same_weights(
    brats: Path, tmp_path: Path
) -> None:
    cluster = Cluster(tmp_path, brats)
    (cluster.place / "scripts").unlink()
    (cluster.place / "scripts").mkdir()
    (cluster.place / "scripts/segmentation_train.py").write_text(PROGRAM)
    cluster.environment |= {"GLOO_SOCKET_IFNAME": "lo", "SHRINK_TRAIN": " ".join(SMALL)}
    port = free_port()
    text = printed().replace("node01:29500", f"127.0.0.1:{port}")
    (named,) = re.findall(r"--out_dir (\S+)", text)
    folder, deadline = cluster.place / named, time.monotonic() + 240

    def wait_for(step: int) -> None:
        while not (folder / f"savedmodel{step:06d}.pt").exists():
            assert time.monotonic() < deadline and one.poll() is None and two.poll() is None
            time.sleep(0.02)

    one = cluster.start(text)  # the first to come holds the meeting point, and is not lost
    while not listening(port):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    two = cluster.start(text)

    wait_for(5)
    (worker,) = [pid for pid in family(two.pid) if b"\0LOCAL_RANK=1\0" in environment_of(pid)]
    os.kill(worker, signal.SIGKILL)
    wait_for(20)
    for pid in family(two.pid):
        os.kill(pid, signal.SIGKILL)
    two.communicate()
    two = cluster.start(text)
    said = [node.communicate(timeout=120)[0] for node in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), "\n".join(text[-3000:] for text in said)
    resumed = re.findall(r"resuming .* at step (\d+)", (folder / "log.txt").read_text("utf-8"))
    assert len(resumed) == 2 and 5 <= int(resumed[0]) < 20 <= int(resumed[1]) < 40

    words = shlex.split(text[text.index("scripts/") :].replace("\\\n", " "))
    words[words.index(named)] = "undisturbed"
    done = torchrun(4, *words, *SMALL, cwd=cluster.place)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = load_checkpoint(cluster.place / "undisturbed" / LATEST)
    both = load_checkpoint(folder / LATEST)
    assert both.step == whole.step == 40
    for part in ("model", "ema", "training"):
        assert equal(getattr(both, part), getattr(whole, part)), part


def test_restarts_with_the_store_of_former_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They would read the addresses of processes that have ended, and wait for minutes."""
    known = {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "node01", "MASTER_PORT": "29500"}
    for name, value in (known | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    check_launcher()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(UserError, match=r"--max_restarts 3 .*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        check_launcher()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_launcher()
