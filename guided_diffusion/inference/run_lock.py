"""One run of a kind at a time in a folder: a file there names the run that holds it.

The file is left behind where a run is killed, so that the next one judges from host, process and
the process's start whether its holder is still there. A training and a sampling may share a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from guided_diffusion.data.jobs import Job
from guided_diffusion.dist_util import all_gather_object, local_world_size, rank, world_size
from guided_diffusion.errors import UserError
from guided_diffusion.files import make_folder, require_file, writing

TRAINING, SAMPLING, SLICING = "training", "sampling", "slicing"

SETTLED = 60.0
"""Seconds after which a file without a holder is left over, and not just being written."""
VISIBLE = 60.0
"""Seconds after which all nodes see a file that one has written."""


@dataclass(frozen=True)
class Holder:
    """The run that holds a folder.

    Attributes:
        host: name of its machine.
        pid: its process there.
        machine: what the process numbers belong to, from one start of the machine to the next;
            empty if unknown.
        process: when the process started, in whatever unit the system has; empty if unknown.
        job: its SLURM job, if any.
        restarts: how often that job was queued again.
        launch: the id of its launch by ``torchrun``, if it has one of its own.
        started: when the run started, in ISO 8601.
        command: its command line.
    """

    host: str
    pid: int
    machine: str
    process: str
    job: str
    restarts: int
    launch: str
    started: str
    command: str

    @classmethod
    def this(cls) -> Holder:
        """Describe this process."""
        restarts = os.environ.get("SLURM_RESTART_COUNT", "")
        launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            process=_process_start(os.getpid()) or "",
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=int(restarts) if restarts.isdecimal() else 0,
            launch="" if launch == "none" else launch,
            started=datetime.now().astimezone().isoformat(timespec="seconds"),
            command=" ".join(sys.argv),
        )

    @classmethod
    def read(cls, text: bytes) -> Holder | None:
        """Read what a lock file says; None for anything else."""
        try:
            values = {"launch": "", **json.loads(text)}  # which earlier versions did not write
            holder = cls(**{entry.name: values[entry.name] for entry in fields(cls)})
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        numbers = (holder.pid, holder.restarts)
        return holder if all(type(number) is int for number in numbers) else None

    def is_gone(self) -> bool | None:
        """Say whether the run has ended; None where that cannot be known from here."""
        own = Holder.this()
        if self.job and self.job == own.job and self.restarts < own.restarts:
            return True
        if self.host != own.host:  # torchrun starts the others again where a node is lost
            return True if self.launch and self.launch == own.launch else None
        if self.machine != own.machine:
            rebooted = self.machine.split()[:1] != own.machine.split()[:1]
            return True if rebooted and self.machine else None  # None: another container
        started = _process_start(self.pid)
        if started is None or (started and not self.process):
            return None
        return started != self.process


class Found(NamedTuple):
    """What a lock file holds, and when it was written, in nanoseconds."""

    text: bytes
    written: int


@contextmanager
def only_run(
    folder: Path, kind: str, *, job: Job | None = None, flag: str = "--out_dir"
) -> Iterator[None]:
    """Hold a folder, which is made if needed, as its only run of a kind.

    Jobs of the same number share a folder, each of them once.

    The first process takes the lock; all processes of the run raise where it is refused.

    Args:
        folder: of the run.
        kind: what runs, as in :data:`TRAINING`; part of the file's name.
        job: which of several that share the work; None for a run that does all of it.
        flag: that names the folder in messages.

    Raises:
        UserError: another run of that kind holds it, it cannot be written, or a node has another
            folder of that name.
    """
    own = json.dumps(asdict(Holder.this())).encode()
    path = folder / (f".lock-{kind}-{job.name}" if job else f".lock-{kind}")
    taken = False
    try:
        with _by_the_first_process():
            if rank() == 0:
                make_folder(folder, flag=flag)
                with writing(path):
                    _take(path, own, f"{flag} {folder}", f"{kind} of job {job}" if job else kind)
                taken = True
                _refuse_others(folder, kind, job, f"{flag} {folder}")
        if local_world_size() < world_size():
            _require_shared(path, all_gather_object(own)[0], f"{flag} {folder}")
        yield
    finally:
        if taken:
            with suppress(OSError):
                if path.read_bytes() == own:
                    path.unlink()


def _require_shared(path: Path, lock: bytes, what: str) -> None:
    """Raise a UserError in every process where one does not see the lock of the first.

    A network file system may show a new file some time later.
    """
    limit = time.monotonic() + VISIBLE
    while not (seen := path.exists() and path.read_bytes() == lock) and time.monotonic() < limit:
        time.sleep(0.1)
    for host in filter(None, all_gather_object("" if seen else socket.gethostname())):
        problem = f"{host} does not see what the first process writes there"
        raise UserError(what, problem, "Use a folder on a file system that all nodes share.")


def _refuse_others(folder: Path, kind: str, job: Job | None, what: str) -> None:
    """Raise a UserError for a job beside a run of all cases, or of another number of jobs."""
    named = re.compile(rf"\.lock-{re.escape(kind)}(-(?P<number>\d+)-of-(?P<of>\d+))?")
    for name in os.listdir(folder):  # noqa: PTH208 - text: folders of results hold 1,000,000 names
        match = named.fullmatch(name)
        other = Job(int(match["number"]), int(match["of"])) if match and match["of"] else None
        alike = other.of == job.of if other and job else other == job
        if match and not alike and (found := _read(folder / name)):
            text = f"{kind} of job {other}" if other else kind
            _refuse_unless_gone(folder / name, found, what, text)


def refuse_second_run(folder: Path, kind: str, *, flag: str = "--out_dir") -> None:
    """Raise what :func:`only_run` would, before data and networks are loaded; takes nothing."""
    path = folder / f".lock-{kind}"
    with _by_the_first_process():
        if rank() == 0 and (found := _read(path)):
            _refuse_unless_gone(path, found, f"{flag} {folder}", kind)


@contextmanager
def _by_the_first_process() -> Iterator[None]:
    """Raise in every process what the first one raises."""
    error: UserError | None = None
    try:
        yield
    except UserError as raised:
        error = raised
    if first := all_gather_object(error)[0]:
        raise first


def _take(path: Path, own: bytes, what: str, kind: str) -> None:
    """Write a lock file, or replace one that is left over.

    Of several that find the same file left over one writes the claim to it, a file of its own name,
    and that one alone renames the claim to the lock. A claim that is left over is taken likewise.
    """
    for _ in range(100):
        if _create(path, own):
            return
        if (found := _read(path)) is None:
            continue  # its run has just ended
        _refuse_unless_gone(path, found, what, kind)
        digest = hashlib.sha256(found.text + str(found.written).encode()).hexdigest()[:12]
        claim = path.with_name(f"{path.name}-{digest}")
        _take(claim, own, what, kind)
        if _read(path) == found:
            claim.replace(path)
            return
        claim.unlink()
    raise UserError(path, "can neither be read nor made", "Delete it.")


def _create(path: Path, text: bytes) -> bool:
    """Write a file unless there is one; exclusive on network file systems too."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
    except OSError:
        path.unlink()
        raise
    return True


def _read(path: Path) -> Found | None:
    require_file(path)
    try:
        return Found(path.read_bytes(), path.stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _refuse_unless_gone(path: Path, found: Found, what: str, kind: str) -> None:
    holder = Holder.read(found.text)
    if holder is None:
        if time.time() - found.written / 1e9 > SETTLED:
            return
        raise UserError(what, f"another {kind} is just starting there", "Try again in a minute.")
    gone = holder.is_gone()
    if gone:
        return
    raise UserError(
        what,
        f"another {kind} writes there: process {holder.pid} on {holder.host}, since "
        f"{holder.started}",
        f"If that run is gone, delete {path}; else wait for it, or choose another folder."
        if gone is None
        else "Wait for it or stop it, or choose another folder.",
    )


def _text(path: str) -> str:
    return Path(path).read_text("utf-8", "replace")  # a process's name may be any bytes


def _machine() -> str:
    """Identify this start of the machine and the namespace of its processes; empty if unknown."""
    try:
        boot = _text("/proc/sys/kernel/random/boot_id").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """When a process of this machine started; empty if there is none, None if unknown."""
    if os.name != "posix":
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return ""
    except OSError:
        pass  # another user's
    try:
        if sys.platform == "linux":
            state, *rest = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
            return "" if state in "ZX" else rest[18]
        asked = ["ps", "-o", "lstart=", "-p", str(pid)]
        plain = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(asked, env=plain, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
