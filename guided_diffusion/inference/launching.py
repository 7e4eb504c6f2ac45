"""Starting a command again in one process per CUDA device of this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from guided_diffusion.dist_util import LOOPBACK, launched
from guided_diffusion.errors import Stopped, UserError

_SHUTDOWN_TIMEOUT = 110
"""Seconds that a process has to save, once the launcher was told to end; SLURM waits for 120."""


def launch(multi_gpu: str, command: Sequence[str]) -> None:
    """Run a command again in one process per CUDA device, then exit with the exit code.

    Does nothing if ``multi_gpu`` is empty, or in a process that was launched. A signal is passed on
    to the processes, which save and end.

    Args:
        multi_gpu: indices of CUDA devices, such as ``0,1,2``.
        command: name and arguments, as ``python -m guided_diffusion`` takes them.

    Raises:
        UserError: this machine does not have those devices.
        Stopped: a signal was received, and all processes have ended.
        SystemExit: otherwise, with the exit code of the process that failed first.
    """
    if not multi_gpu or launched():
        return
    devices = [device.strip() for device in multi_gpu.split(",")]
    count = torch.cuda.device_count()
    if not all(device.isdecimal() and int(device) < count for device in devices):
        raise UserError(
            f"--multi_gpu {multi_gpu}",
            f"indices must be below {count}, the number of CUDA devices of this machine"
            if count
            else "this machine has no CUDA device",
            "Name devices that nvidia-smi lists; if there are none, omit --multi_gpu.",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = [visible[int(device)] if any(visible) else device for device in devices]
    root = str(Path(__file__).resolve().parents[2])
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN_TIMEOUT))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])  # the launcher heeds no nohup
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # it listens on all addresses
    with tempfile.NamedTemporaryFile(prefix="guided-diffusion-") as meeting:
        _run(_config(len(devices), meeting.name), command)


def _config(processes: int, meeting: str) -> LaunchConfig:
    """Processes on this machine, which meet in a file and listen on the loopback alone."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=meeting,
        rdzv_configs={"store_type": "file"},
        local_addr=LOOPBACK,
        max_restarts=0,
    )


def _run(config: LaunchConfig, command: Sequence[str]) -> None:
    try:
        elastic_launch(config, sys.executable)("-m", "guided_diffusion", *command)
    except SignalException as received:
        raise Stopped(received.sigval) from None
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    sys.exit(0)
