"""Devices and processes: where this process works, and which share of the work is its own.

Under ``torchrun`` every process finds its place in the environment; without it there is one
process. Entered only by the verbs and the scripts: the mathematics below takes its device from its
tensors.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

import torch

from guided_diffusion.errors import UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def rank() -> int:
    """This process's number, 0 for the one that writes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def dev(gpu_dev: str = "0") -> torch.device:
    """Choose the device: the CUDA device of that index, else Apple's, else the CPU.

    Raises:
        UserError: there are CUDA devices, but not that one.
    """
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if not gpu_dev.isdecimal() or int(gpu_dev) >= count:
            raise UserError(
                "--gpu_dev",
                found=gpu_dev,
                expected=f"an index from 0 to {count - 1}",
                mend="Name one of the CUDA devices that nvidia-smi lists.",
            )
        return torch.device("cuda", int(gpu_dev))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Compute convolutions, products and attention in a precision: fp32, bf16 or fp16."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32")


def describe(device: torch.device) -> str:
    """Name the device for the log."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"
