"""Devices and processes: where this process works, and which share of the work is its own.

Under ``torchrun`` every process finds its place in the environment, on one node or many; without it
there is one process. Entered only by the verbs and the scripts: the mathematics below takes its
device from its tensors.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from guided_diffusion.errors import UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def rank() -> int:
    """This process's number, 0 for the one that writes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def setup_dist() -> None:
    """Join the other processes that ``torchrun`` started, if any: nccl with CUDA, else gloo."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def launch(multi_gpu: str) -> None:
    """Start one process for each of the devices ``0,1,2``, then exit as they do.

    Does nothing without devices, or inside a process that was started so.

    Raises:
        UserError: devices that this machine does not have.
    """
    if not multi_gpu or "LOCAL_RANK" in os.environ:
        return
    devices = multi_gpu.split(",")
    count = torch.cuda.device_count()
    if not all(device.strip().isdecimal() and int(device) < count for device in devices):
        raise UserError(
            "--multi_gpu",
            found=multi_gpu,
            expected=f"indices below {count}, the CUDA devices of this machine",
            mend="Name devices that nvidia-smi lists; without any, leave --multi_gpu away.",
        )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc_per_node={len(devices)}", *sys.argv]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": multi_gpu}
    sys.exit(subprocess.run(command, env=environment, check=False).returncode)


def dev(gpu_dev: str = "0") -> torch.device:
    """Choose the device: this process's or the named CUDA device, else Apple's, else the CPU.

    Raises:
        UserError: there are CUDA devices, but not that one.
    """
    if torch.cuda.is_available():
        index, count = os.environ.get("LOCAL_RANK", gpu_dev), torch.cuda.device_count()
        if not index.isdecimal() or int(index) >= count:
            raise UserError(
                "--gpu_dev",
                found=index,
                expected=f"an index from 0 to {count - 1}",
                mend="Name one of the CUDA devices that nvidia-smi lists.",
            )
        return torch.device("cuda", int(index))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Compute convolutions, products and attention in a precision: fp32, bf16 or fp16."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32")


def describe(device: torch.device) -> str:
    """Name the device for the log."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"
