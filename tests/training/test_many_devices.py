"""Two processes on one machine train as one process does with twice the batch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import environment, read_csv, refused, script, succeeded, torchrun, training
from loops import DISC_FLAGS, make_loop
from torch.distributed.launcher.api import LaunchConfig
from torch.testing import assert_close

from guided_diffusion import dist_util, logger, train_util
from guided_diffusion.checkpoint import LATEST, load_checkpoint
from guided_diffusion.dist_util import setup_dist
from guided_diffusion.errors import UserError
from guided_diffusion.inference import launching
from guided_diffusion.inference.launching import launch
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.segmentation import TrainingOptions
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.training.resolve import training_options

PROGRAM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from guided_diffusion import dist_util, logger, train_util
from guided_diffusion.dist_util import rank, setup_dist
from loops import DISC_FLAGS, make_loop
setup_dist()
out = Path(sys.argv[1])
logger.configure(None if rank() else out, quiet=True)
loop = make_loop(out, max_steps=4, batch_size=2, microbatch=1, diffusion_steps=2,
                 schedule_sampler="loss-second-moment", save_interval=2)
forward_backward, gradients = loop.forward_backward, []
def recording(batch):
    loss = forward_backward(batch)
    gradients.append([p.grad.clone() for p in loop.parameters])
    return loss
loop.forward_backward = recording
loop.run_loop()
torch.save({
    "sampler": loop.schedule_sampler.state_dict(),
    "model": dict(loop.net.state_dict()),
    "gradients": gradients,
}, out / f"rank{rank()}")
"""


def two_processes(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = torchrun(2, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    two_processes(folder / "program.py", folder)
    return folder


@pytest.mark.slow
def test_gradients_and_weights_are_those_of_twice_the_batch(
    shared: Path, quiet: None, tmp_path: Path
) -> None:
    loop = make_loop(
        tmp_path,
        max_steps=4,
        batch_size=4,
        diffusion_steps=2,
        schedule_sampler="loss-second-moment",
    )
    logger.configure(tmp_path, quiet=True)
    run_step, alone = loop.forward_backward, []

    def recording(batch: Any) -> Any:
        loss = run_step(batch)
        alone.append([p.grad.clone() for p in loop.parameters if p.grad is not None])
        return loss

    loop.forward_backward = recording  # type: ignore[method-assign]
    loop.run_loop()
    ranks = [torch.load(shared / f"rank{rank}") for rank in (0, 1)]
    for rank in ranks:
        assert len(rank["gradients"]) == len(alone) == 4
        for step, single in zip(rank["gradients"], alone, strict=True):
            largest = max(float(part.abs().max()) for part in single)
            for one, other in zip(step, single, strict=True):
                assert_close(one, other, rtol=1e-2, atol=1e-3 * largest)
    for name in ("loss", "mse", "grad_norm"):
        both, one = (float(read_csv(at / "progress.csv")[0][name]) for at in (shared, tmp_path))
        assert both == pytest.approx(one, rel=1e-4), f"{name} is that of the whole batch"
    first = zip(ranks[0]["gradients"][0], alone[0], strict=True)
    for one, other in first:
        assert_close(one, other, rtol=1e-4, atol=1e-5)

    own = load_checkpoint(tmp_path / LATEST)
    both = load_checkpoint(shared / LATEST)
    apart = [(both.model[name] - value).abs().flatten() for name, value in own.model.items()]
    assert float(torch.cat(apart).mean()) < 2e-6
    assert_close(
        both.training["schedule_sampler"], own.training["schedule_sampler"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.slow
def test_all_processes_hold_the_same_weights(shared: Path) -> None:
    one, other = (torch.load(shared / f"rank{rank}") for rank in (0, 1))
    assert_close(one["model"], other["model"], rtol=0, atol=0)
    assert_close(one["sampler"], other["sampler"], rtol=0, atol=0)
    assert int(one["sampler"]["seen"].sum()) == 16


@pytest.mark.slow
def test_one_process_writes_checkpoints_and_log(shared: Path) -> None:
    names = {path.name for path in shared.iterdir()} - {"program.py", "rank0", "rank1"}
    assert names == {
        *("savedmodel000002.pt", "savedmodel000004.pt", LATEST),
        *("log.txt", "progress.csv", "progress.json", "curves.png"),
    }
    table = read_csv(shared / "progress.csv")
    assert [row["step"] for row in table] == ["1", "2", "3", "4"]
    assert [row["samples"] for row in table] == ["4", "8", "12", "16"]
    assert (shared / "log.txt").read_text("utf-8").count("saved ") == 2


@pytest.mark.slow
def test_the_script_under_torchrun(brats: Path, tmp_path: Path) -> None:
    """The first process validates; all processes stop early."""
    command = [*training(brats, tmp_path), "--max_steps", 40, "--lr", 0, "--patience", 2]
    done = two_processes(
        "scripts/segmentation_train.py", *command, "--val_dir", brats / "testing", "--val_steps", 1
    )
    assert done.stdout.count("4 BRATS cases") == 1
    assert "stopped at step 6: the last 2 validations" in done.stdout
    assert load_checkpoint(tmp_path / LATEST).step == 6


NOT_FINITE = """
import os
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from guided_diffusion import logger
from guided_diffusion.data.batches import collate
from guided_diffusion.dist_util import barrier, rank, setup_dist
from guided_diffusion.errors import UserError
from loops import Discs, make_loop, with_nan
setup_dist()
logger.configure(quiet=True)
out = Path(sys.argv[1])
loop = make_loop(out, max_bad_steps=1)
batch = collate([Discs()[2 * rank()], Discs()[2 * rank() + 1]])
try:
    loop.run_step(with_nan(batch) if rank() else batch)
except UserError as error:
    (out / f"rank{rank()}").write_text(str(error))
barrier()
os._exit(0)  # at the interpreter's exit torch's threads sometimes abort the process
"""


@pytest.mark.slow
def test_every_process_names_the_cases_of_all(tmp_path: Path) -> None:
    """The gradient is shared, so no single process knows which case made it infinite."""
    (tmp_path / "program.py").write_text(NOT_FINITE, encoding="utf-8")
    two_processes(tmp_path / "program.py", tmp_path)
    one, other = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert "for the cases disc0, disc1, disc2, disc3." in one and one == other


VERSIONS = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from guided_diffusion import logger
from guided_diffusion.networks import highway, medsegdiff
from guided_diffusion.dist_util import rank, setup_dist
from guided_diffusion.data.batches import collate
from loops import Squares, make_coarse_loop
for module in (highway, medsegdiff):
    module.WIDTHS = (32, 64, 32, 32, 32, 32)
setup_dist()
logger.configure(quiet=True)
after = {}
for version in ("new", "1", "2"):
    loop = make_coarse_loop(version, Path(sys.argv[1]), microbatch=1)
    for _ in range(2):
        loop.run_step(collate([Squares()[2 * rank()], Squares()[2 * rank() + 1]]))
    after[version] = {k: v.detach().clone() for k, v in loop.net.named_parameters()}
torch.save(after, Path(sys.argv[1]) / f"rank{rank()}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_all_network_versions_average_their_gradients(tmp_path: Path) -> None:
    """Every parameter has a gradient at every timestep, so processes neither wait nor diverge."""
    (tmp_path / "program.py").write_text(VERSIONS, encoding="utf-8")
    two_processes(tmp_path / "program.py", tmp_path)
    one, other = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert one.keys() == {"new", "1", "2"}
    assert_close(one, other, rtol=0, atol=0)


def test_a_process_sets_its_device_before_it_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """nccl uses the current device, which would be the first one in all processes."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append((device,)))
    joined = lambda backend, **_: calls.append((backend,))  # noqa: E731
    monkeypatch.setattr(dist, "init_process_group", joined)
    monkeypatch.setattr("atexit.register", lambda _: None)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    setup_dist()
    assert calls == [(torch.device("cuda", 1),), ("cpu:gloo,cuda:nccl",)]


@pytest.mark.parametrize(
    ("visible", "chosen"), [(None, "1,0"), ("4,6", "6,4"), ("GPU-a,b", "b,GPU-a")]
)
def test_devices_are_counted_among_the_visible_ones(
    visible: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a shared node a job sees some devices only, and --multi_gpu counts those."""
    seen = []

    def elastic_launch(config: LaunchConfig, program: str) -> Callable[..., None]:
        return lambda *words: seen.append((os.environ["CUDA_VISIBLE_DEVICES"], words))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launching, "elastic_launch", elastic_launch)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    with pytest.raises(SystemExit) as left:
        launch("1, 0", ["train", "--lr", "1"])
    started = ("-m", "guided_diffusion", "train", "--lr", "1")
    assert left.value.code == 0 and seen == [(chosen, started)]


LISTENS = """
import os, sys, tempfile
from pathlib import Path
from torch.distributed.launcher.api import elastic_launch
from guided_diffusion import dist_util
from guided_diffusion.inference import launching

def listening():
    own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
           if os.path.exists(f"/proc/self/fd/{fd}")}
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in own:
                yield local.partition(":")[0]

def tell():  # in one piece, for several processes write
    os.write(1, (" ".join(["listens", *listening()]) + "\\n").encode())

if "RANK" in os.environ:
    dist_util.setup_dist()
    dist_util.barrier()
    tell()
    dist_util.barrier()
else:
    dist_util.torch.cuda.device_count = lambda: 2
    launching._run = lambda config, _: elastic_launch(config, sys.executable)(__file__)
    try:
        launching.launch("0,1", [])
    finally:
        tell()
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets are listed by Linux alone")
def test_processes_on_one_machine_listen_on_the_loopback_alone(tmp_path: Path) -> None:
    program = tmp_path / "listens.py"
    program.write_text(LISTENS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("listens")]
    assert done.returncode == 0 and len(lines) == 3, done.stderr[-3000:]
    addresses = [address for line in lines for address in line]
    assert addresses and {*addresses} == {"0100007F"}


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 .* RANK and MASTER_ADDR and MASTER_PORT are missing"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is missing"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many .* not a number"),
        ({"RANK": "-1"}, "RANK=-1 .* not a number"),
        ({"RANK": "1"}, "RANK=1 .* no such process where WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, ""),
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""}, ""),
    ],
)
def test_what_a_launcher_left_in_the_environment(
    variables: dict[str, str], named: str, brats: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = script("segmentation_train", *training(brats, tmp_path), "--max_steps", 1)
    if named:
        assert re.search(named, refused(done)) and "unset" in done.err
    else:
        succeeded(done)


def test_processes_that_start_at_different_steps_are_refused(
    quiet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If each node has a separate folder, only the first finds the checkpoint to resume from."""
    monkeypatch.setattr(train_util, "all_gather", lambda values: torch.cat([values, values + 7]))
    with pytest.raises(UserError, match=r"--out_dir.*\[0, 7\]"):
        make_loop(tmp_path, max_steps=1).run_loop()
    assert not list(tmp_path.glob("*.pt"))


def test_cuda_graphs_and_accumulated_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(mode: str) -> int:
        given = {"microbatch": 2, "compile": mode}
        return training_options(Flags(given=given), TrainingOptions).microbatch

    assert resolved("reduce-overhead") == 2, "without CUDA there are no graphs"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolved("default") == 2
    with pytest.raises(UserError, match="--microbatch 2"):
        resolved("reduce-overhead")


def test_processes_that_do_not_find_each_other_end_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    known = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    code = "from guided_diffusion import dist_util; dist_util._START = 1.0; dist_util.setup_dist()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment() | known,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert "process 1 of 2: has not found the others within 1 s (MASTER_ADDR=127.0.0.1, " in line
    assert port in line and "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in line


VIEWS = """
import sys
import torch
torch.set_num_threads(1)
from guided_diffusion import dist_util, logger
from guided_diffusion.data.batches import collate
from loops import Discs, make_loop
dist_util.setup_dist()
logger.configure(quiet=True)
wrapped = torch.nn.parallel.DistributedDataParallel
after = []
for views in (False, True):
    class Views(wrapped):
        def __init__(self, module, **named):
            assert named["gradient_as_bucket_view"]
            super().__init__(module, **{**named, "gradient_as_bucket_view": views})
    torch.nn.parallel.DistributedDataParallel = Views
    loop = make_loop(sys.argv[1], microbatch=1, grad_clip=1.0)
    for step in range(3):
        loop.run_step(collate([Discs()[2 * dist_util.rank()], Discs()[2 * step + 1]]))
    after.append({name: value.clone() for name, value in loop.net.state_dict().items()})
assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # else its threads may outlive the interpreter
"""


@pytest.mark.slow
def test_gradients_in_the_buckets_change_no_bit(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(VIEWS, encoding="utf-8")
    two_processes(tmp_path / "program.py", tmp_path)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_recomputed_activations_and_a_compiler_go_together(
    checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch 2.6 cannot divide a compiled graph into buckets in which something is recomputed."""
    import torch._dynamo

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda module, **_: module)
    net, _ = create_model_and_diffusion(**DISC_FLAGS, use_checkpoint=checkpointed)
    with torch._dynamo.config.patch(optimize_ddp=True):
        dist_util.wrap_ddp(net)
        assert torch._dynamo.config.optimize_ddp is not checkpointed


def test_gradients_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are views of the buckets, without a second copy of their size."""
    named: dict[str, Any] = {}
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.nn.parallel, "DistributedDataParallel", lambda module, **own: named.update(own)
    )
    dist_util.wrap_ddp(torch.nn.Linear(1, 1))
    assert named == {"device_ids": None, "gradient_as_bucket_view": True}
