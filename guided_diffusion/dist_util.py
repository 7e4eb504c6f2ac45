"""Devices and processes: which device this process uses, and how processes exchange results.

Under ``torchrun`` each process reads its rank from the environment, on one node or many; otherwise
there is one process. Only commands and training loops need this module: networks, losses and
samplers take device and dtype from their tensors.
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

from guided_diffusion.errors import UserError, memory_problem

Net = TypeVar("Net", bound=torch.nn.Module)
Value = TypeVar("Value")
_TIMEOUT = timedelta(days=2)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def rank() -> int:
    """Return the number of this process; process 0 writes the files."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of processes that work together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launched() -> bool:
    """Say whether ``torchrun`` or another launcher started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "WORLD_SIZE" in os.environ


def setup_dist() -> None:
    """Join the process group that ``torchrun`` started, if any: nccl for CUDA tensors, else gloo.

    The timeout is long, since a process may wait for another that validates or segments a large
    volume; if a process dies, ``torchrun`` ends the others. The group is left at exit: otherwise
    its threads sometimes abort the interpreter after the work is done, and the exit code is lost.
    """
    if world_size() > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(dev())
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TIMEOUT)
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process has called this."""
    any_rank(True)


def wrap_ddp(module: torch.nn.Module) -> torch.nn.Module:
    """Wrap a module so that its gradients are averaged over all processes, if there are several."""
    if not dist.is_initialized():
        return module
    device = next(module.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(module, device_ids=ids)


def no_sync(module: torch.nn.Module, active: bool) -> AbstractContextManager[object]:
    """Suspend the averaging of gradients while ``active``, as more are accumulated first."""
    if active and isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


def all_gather(values: torch.Tensor) -> torch.Tensor:
    """Concatenate the values [B] of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def all_gather_object(value: Value) -> list[Value]:
    """Return the values of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def any_rank(value: bool) -> bool:
    """Say whether ``value`` is true in any process; all processes get the same answer."""
    return bool(all_gather(torch.tensor([value])).any()) if dist.is_initialized() else value


def launch(multi_gpu: str, command: Sequence[str]) -> None:
    """Run a command again in one process per CUDA device, then exit with its exit code.

    Does nothing if ``multi_gpu`` is empty, or in a process that was launched this way.

    Args:
        multi_gpu: indices of CUDA devices, such as ``0,1,2``.
        command: name and arguments, as ``python -m guided_diffusion`` takes them.

    Raises:
        UserError: this machine does not have those devices.
    """
    if not multi_gpu or "LOCAL_RANK" in os.environ:
        return
    devices = [device.strip() for device in multi_gpu.split(",")]
    count = torch.cuda.device_count()
    if not all(device.isdecimal() and int(device) < count for device in devices):
        raise UserError(
            f"--multi_gpu {multi_gpu}",
            f"indices must be below {count}, the number of CUDA devices of this machine",
            "Name devices that nvidia-smi lists; if there are none, omit --multi_gpu.",
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
    """Choose a CUDA device, else Apple's GPU, else the CPU.

    Args:
        gpu_dev: index of the CUDA device; ``LOCAL_RANK``, which launchers set, wins over it.

    Raises:
        UserError: the index is not a number, or there are CUDA devices, but not that one.
    """
    index = os.environ.get("LOCAL_RANK", gpu_dev)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not index.isdecimal() or (count and int(index) >= count):
        raise UserError(
            "--gpu_dev",
            f"{index!r} is not an index from 0{f' to {count - 1}' if count else ''}",
            "Name a CUDA device that nvidia-smi lists; if there is none, omit --gpu_dev.",
        )
    if count:
        return torch.device("cuda", int(index))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def place_model(net: Net, device: torch.device, *, compile: str = "") -> Net:
    """Move a network to a device, in the channels-last order that is fastest for convolutions.

    ``compile`` is a mode of ``torch.compile``, or empty; compilation happens at the first call.
    """
    net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile:
        net.compile(mode=compile)
    return net


@contextmanager
def compiling(active: object = True) -> Iterator[None]:
    """Report a failure of ``torch.compile`` inside this context; out-of-memory errors pass.

    Raises:
        UserError: a RuntimeError occurred while compilation is ``active``.
    """
    try:
        yield
    except RuntimeError as error:
        if not active or memory_problem(error):
            raise
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(
            "--compile",
            f"the compiler does not work ({reason})",
            "Install a compiler (C++ for a CPU, Triton for a CUDA device), or omit --compile.",
        ) from error


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Compute convolutions, matrix products and attention in fp32, bf16 or fp16."""
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32")


def side_stream(device: torch.device) -> AbstractContextManager[object]:
    """Let another thread read what is computed so far, while this thread continues."""
    if device.type != "cuda":
        return nullcontext()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


def memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: on its CUDA device, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return 0.0
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform != "darwin" else peak / 2**30


def total_gib(device: torch.device) -> float:
    """Return the memory of the CUDA device, else of the machine, in GiB; infinite if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def describe(device: torch.device) -> str:
    """Name the device for the log."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"{device} ({threads} thread{'s' * (threads != 1)})"
