"""Devices and processes: which device this process uses, and how processes exchange results.

Under ``torchrun`` each process reads its rank from the environment, on one node or many; otherwise
there is one process. Only commands and training loops need this module: networks, losses and
samplers take device and dtype from their tensors.
"""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from guided_diffusion.errors import UserError, memory_problem

Net = TypeVar("Net", bound=torch.nn.Module)
Value = TypeVar("Value")
_TIMEOUT = timedelta(days=2)
_START = 300.0
"""Seconds in which all processes have to find each other."""
LOOPBACK = "127.0.0.1"
_UNSET_HINT = "Start several processes with torchrun; for one, unset WORLD_SIZE and RANK."
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def rank() -> int:
    """Return the number of this process; process 0 writes the files."""
    return _number("RANK", 0)


def world_size() -> int:
    """Return the number of processes that work together."""
    return _number("WORLD_SIZE", 1)


def local_world_size() -> int:
    """Return the number of these processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", world_size())


def _number(variable: str, otherwise: int) -> int:
    """Read a launcher's variable; unset and empty are the same.

    Raises:
        UserError: it is not a whole number.
    """
    value = os.environ.get(variable, "") or str(otherwise)
    if not value.isdecimal():
        raise UserError(f"{variable}={value} in the environment", "is not a number", _UNSET_HINT)
    return int(value)


def launched() -> bool:
    """Say whether ``torchrun`` or another launcher started this process."""
    return bool(os.environ.get("TORCHELASTIC_RUN_ID")) or world_size() > 1


def check_launcher() -> None:
    """Check the variables by which a launcher tells a process of the others.

    Raises:
        UserError: some are missing, as where one was left in the environment, or contradict others;
            ``torchrun`` is asked for restarts that cannot work.
    """
    count, needed = world_size(), ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)] if count > 1 else []
    if missing:
        raise UserError(
            f"WORLD_SIZE={count} in the environment",
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing, so the other "
            "processes cannot be found",
            _UNSET_HINT,
        )
    if rank() >= count:
        raise UserError(
            f"RANK={rank()} in the environment",
            f"there is no such process where WORLD_SIZE is {count}",
            _UNSET_HINT,
        )
    # Processes that are started again would read there where the former ones listened.
    restarts, stored = _number("TORCHELASTIC_MAX_RESTARTS", 0), "TORCHELASTIC_USE_AGENT_STORE"
    if restarts and count > 1 and os.environ.get(stored) == "True":
        raise UserError(
            f"--max_restarts {restarts} of torchrun",
            "would fail: its store keeps the addresses of processes that have ended",
            "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on all nodes.",
        )


def setup_dist() -> None:
    """Join the process group that ``torchrun`` started, if any: nccl for CUDA tensors, else gloo.

    The timeout is long, since a process may wait for another that validates or segments a large
    volume; if a process dies, ``torchrun`` ends the others. The group is left at exit: otherwise
    its threads sometimes abort the interpreter after the work is done, and the exit code is lost.

    Raises:
        UserError: the environment describes no group, or its processes run different code.
    """
    check_launcher()
    if world_size() > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(dev())
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        with _found_in_time():
            dist.init_process_group(backend, timeout=_TIMEOUT, **_on_loopback())
            if cuda and dist.is_initialized():
                dist.all_reduce(torch.zeros(1, device=dev()))  # nccl connects at its first use
        atexit.register(_leave)
        _refuse_mixed_code()


def _refuse_mixed_code() -> None:
    """Raise a UserError where processes differ in the code of this package or in torch."""
    first, *rest = all_gather_object(code_digest())
    for number, (code, version) in enumerate(rest, 1):
        problem = f"has torch {version}, process 0 has {first[1]}"
        if code != first[0]:
            problem = "runs another version of this package's code than process 0"
        if (code, version) != first:
            raise UserError(f"process {number}", problem, "Use one installation on all nodes.")


def code_digest() -> tuple[str, str]:
    """Digest the code of this package; and the version of torch."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest(), torch.__version__


@contextmanager
def _found_in_time() -> Iterator[None]:
    """End this process, with a message, where the others are not found inside this context.

    No exception could: the main thread waits in a call of the system.
    """
    timer = threading.Timer(_START, _give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up() -> None:
    error = UserError(
        f"process {rank()} of {world_size()}",
        f"has not found the others within {_START:.0f} s (MASTER_ADDR="
        f"{os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')})",
        "Check that all nodes were started and reach that address; name the network between them "
        "in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, as in ib0 or eth0.",
    )
    sys.stderr.write(f"error: {error}\n")
    sys.stderr.flush()
    os._exit(2)


def _on_loopback() -> dict[str, Any]:
    """How processes that are all on this machine find each other: no other machine can reach them.

    A launcher's own store is used where it has one; where that listens is the launcher's business.
    """
    if _number("LOCAL_WORLD_SIZE", 0) != world_size():
        return {}
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name else ():
        os.environ.setdefault(variable, name)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return {}
    if os.environ["MASTER_ADDR"] not in (LOOPBACK, "localhost"):
        return {}
    port, first = _number("MASTER_PORT", 0), rank() == 0
    # By itself the store would listen on all addresses of the machine, whatever its own is.
    listening = socket.create_server((LOOPBACK, port)).detach() if first else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        *(LOOPBACK, port, world_size(), first, _TIMEOUT), master_listen_fd=listening
    )
    return {"store": store, "rank": rank(), "world_size": world_size()}


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
    if any(getattr(part, "use_checkpoint", False) for part in module.modules()):
        # Torch 2.6 refuses to divide a compiled graph at the buckets if it recomputes activations.
        torch._dynamo.config.optimize_ddp = False
    device = next(module.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(
        module, device_ids=ids, gradient_as_bucket_view=True
    )


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


def dev(gpu_dev: str = "0") -> torch.device:
    """Choose a CUDA device, else Apple's GPU, else the CPU.

    Args:
        gpu_dev: index of the CUDA device; ``LOCAL_RANK``, which launchers set, wins over it.

    Raises:
        UserError: the index is not a number, or there are CUDA devices, but not that one.
    """
    index = os.environ.get("LOCAL_RANK") or gpu_dev
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


def place_model(
    net: Net, device: torch.device, *, compile: str = "", training: bool = False
) -> Net:
    """Move a network to a device, in the memory order of :func:`memory_order`.

    ``compile`` is a mode of ``torch.compile``, or empty; compilation happens at the first call.
    """
    order = memory_order(device, training=training)
    net.to(device).to(memory_format=order)  # type: ignore[call-overload]
    if compile:
        net.compile(mode=compile)
    return net


def memory_order(device: torch.device, *, training: bool) -> torch.memory_format:
    """Choose the memory order of feature maps by what is fastest.

    That is channels-last, except for training on a processor without AVX-512, whose backward pass
    is faster in contiguous memory. By rule, not by a trial: the order changes how sums are rounded,
    so a trial that ends otherwise would keep a resumed run from repeating the uninterrupted one.
    """
    return torch.contiguous_format if training and _is_old_cpu(device) else torch.channels_last


def memory_order_note(device: torch.device) -> str:
    """Say in which memory order a network is trained."""
    if _is_old_cpu(device):
        return "feature maps are contiguous in memory, as is best for training without AVX-512"
    return "feature maps are in channels-last order in memory"


def _is_old_cpu(device: torch.device) -> bool:
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


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
