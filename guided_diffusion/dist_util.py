"""Devices and processes: where this process works, and which share of the work is its own.

Under ``torchrun`` every process finds its place in the environment, on one node or many; without it
there is one process. Entered only by the verbs and the scripts: the mathematics below takes its
device from its tensors.
"""

from __future__ import annotations

import atexit
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from guided_diffusion.errors import UserError

Net = TypeVar("Net", bound=torch.nn.Module)


def place_model(net: Net, device: torch.device, *, compile: str = "") -> Net:
    """Move a network to its device, in the memory order that convolutions are fastest in.

    ``compile`` is a mode of ``torch.compile``; the network is compiled when it is first called.
    """
    net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile:
        net.compile(mode=compile)
    return net


@contextmanager
def compiling(active: object = True) -> Iterator[None]:
    """Run what makes ``torch.compile`` compile; memory that runs out is another matter.

    Raises:
        UserError: the compiler does not work here.
    """
    try:
        yield
    except RuntimeError as error:
        if not active or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise UserError(
            "--compile",
            found=(str(error).splitlines() or [repr(error)])[0],
            expected="a compiler that works: for C++ on a CPU, Triton on a CUDA device",
            hint="Leave --compile away.",
        ) from error


Value = TypeVar("Value")
_PATIENCE = timedelta(days=2)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def rank() -> int:
    """This process's number, 0 for the one that writes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched() -> bool:
    """Whether ``torchrun`` or another launcher started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "WORLD_SIZE" in os.environ


def setup_dist() -> None:
    """Join the other processes that ``torchrun`` started, if any: by gloo, CUDA tensors by nccl.

    One may wait long for another, which validates or has the larger volumes; of one that died
    ``torchrun`` tells the others by ending them. The process leaves them as it ends: an interpreter
    that ends with the group's threads still running is now and then aborted, its work done and its
    exit code lost.
    """
    if world_size() > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(dev())
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    any_rank(True)


def wrap_ddp(module: torch.nn.Module) -> torch.nn.Module:
    """Let the gradients of a module be averaged over all processes, if there are several."""
    if not dist.is_initialized():
        return module
    device = next(module.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(module, device_ids=ids)


def no_sync(module: torch.nn.Module, active: bool) -> AbstractContextManager[object]:
    """Hold the averaging back: more gradients are to be added before it pays."""
    if active and isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def all_gather(values: torch.Tensor) -> torch.Tensor:
    """Concatenate every process's values [B], in the order of their ranks."""
    if not dist.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def all_gather_object(value: Value) -> list[Value]:
    """Every process's value, in the order of their ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def any_rank(wish: bool) -> bool:
    """Whether any process wishes it; all get the same answer."""
    return bool(all_gather(torch.tensor([wish])).any()) if dist.is_initialized() else wish


def launch(multi_gpu: str, command: Sequence[str]) -> None:
    """Start a command once for each of the devices ``0,1,2``, then exit as those processes do.

    Does nothing without devices, or inside a process that was started so.

    Args:
        multi_gpu: indices of CUDA devices, separated by commas.
        command: name and arguments, as ``python -m guided_diffusion`` takes them.

    Raises:
        UserError: devices that this machine does not have.
    """
    if not multi_gpu or "LOCAL_RANK" in os.environ:
        return
    devices = [device.strip() for device in multi_gpu.split(",")]
    count = torch.cuda.device_count()
    if not all(device.isdecimal() and int(device) < count for device in devices):
        raise UserError(
            f"--multi_gpu {multi_gpu}",
            f"this machine has {count} CUDA devices, numbered from 0",
            "Name devices that nvidia-smi lists; without any, omit --multi_gpu.",
        )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    processes = [f"--nproc_per_node={len(devices)}", "-m", "guided_diffusion"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = [visible[int(device)] if any(visible) else device for device in devices]
    root = str(Path(__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": ",".join(chosen),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run([*torchrun, *processes, *command], env=environment, check=False)
    sys.exit(done.returncode)


def dev(gpu_dev: str = "0") -> torch.device:
    """Choose the device: this process's or the named CUDA device, else Apple's, else the CPU.

    Raises:
        UserError: no number, or there are CUDA devices, but not that one.
    """
    index = os.environ.get("LOCAL_RANK", gpu_dev)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not index.isdecimal() or (count and int(index) >= count):
        raise UserError(
            "--gpu_dev",
            found=repr(index),
            expected=f"an index from 0{f' to {count - 1}' if count else ''}",
            hint="Name one of the CUDA devices that nvidia-smi lists; without any, leave it away.",
        )
    if count:
        return torch.device("cuda", int(index))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Compute convolutions, products and attention in a precision: fp32, bf16 or fp16."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32")


def side_stream(device: torch.device) -> AbstractContextManager[object]:
    """A context for another thread, to read what this one has computed while it goes on."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def memory_gib(device: torch.device) -> float:
    """The most memory this process has held, in GiB: on its CUDA device, else in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform != "darwin" else peak / 2**30


def total_gib(device: torch.device) -> float:
    """The memory there is, in GiB: of the CUDA device, else of the machine; infinite if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def describe(device: torch.device) -> str:
    """Name the device for the log."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"
