"""What two processes run in tests of sharded training, and the single one it is compared with."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from loops import COARSE_FLAGS, Squares, with_nan
from torch import Tensor

from guided_diffusion import commands, logger
from guided_diffusion.checkpoint import saving
from guided_diffusion.checkpoint.sharded import own_part
from guided_diffusion.data.batches import collate
from guided_diffusion.dist_util import barrier, rank, setup_dist, world_size
from guided_diffusion.networks import highway, medsegdiff
from guided_diffusion.options.segmentation import RunOptions, TrainingOptions
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.resolve import TrainSetup
from guided_diffusion.training.sharded import shard_network

VERSIONS = ("plain", "unet", "new", "1", "2")
NARROW = (32, 64, 32, 32, 32, 32)
STEPS = 3


def make_version_loop(version: str, folder: Path, *, sharded: bool, **options: Any) -> TrainLoop:
    """A loop over squares whose weights are all random; without dropout or statistics of batches,
    which differ from process to process."""
    use_checkpoint, made = options.pop("use_checkpoint", False), options.pop("made", [])

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        made.append(str(torch.empty(0).device))
        flags = {**COARSE_FLAGS, "version": version, "use_checkpoint": use_checkpoint}
        net, _ = create_model_and_diffusion(**flags)
        for parameter in net.parameters():
            if not parameter.is_meta and not parameter.any():
                parameter.data.normal_(std=0.02)
        return net.eval()

    _, diffusion = create_model_and_diffusion(**COARSE_FLAGS, version=version)
    net = shard_network(make, torch.device("cpu"), new=True) if sharded else make()
    own = {"batch_size": 4 // world_size(), "lr": 1e-3, "ema_rate": "0.9", "grad_clip": 0.1}
    settings = TrainingOptions(**{**own, **options})
    return TrainLoop(TrainSetup(net, diffusion, Squares(), settings, RunOptions(str(folder))))


def own_batch() -> Any:
    """This process's share of the four squares."""
    count = 4 // world_size()
    return collate([Squares()[index] for index in range(rank() * count, (rank() + 1) * count)])


def whole(value: Any) -> Tensor:
    """A copy of a tensor, gathered if it is sharded."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().clone()


def three_steps(loop: TrainLoop) -> dict[str, Any]:
    """Gradients of three steps, and what they have led to, by parameter."""
    names = [name for name, _ in loop.net.named_parameters()]
    forward_backward, gradients = loop.forward_backward, list[dict[str, Tensor]]()

    def recording(batch: Any) -> Tensor:
        loss = forward_backward(batch)
        grads = [whole(parameter.grad) for parameter in loop.parameters]
        gradients.append(dict(zip(names, grads, strict=True)))
        return loss

    loop.forward_backward = recording  # type: ignore[method-assign]
    for _ in range(STEPS):
        loop.run_step(own_batch())
    (average,) = loop.averages.values()
    return {
        "gradients": gradients,
        "norms": torch.stack(loop.log.grad_norms),
        "model": {name: whole(value) for name, value in loop.net.state_dict().items()},
        "average": {name: whole(value) for name, value in average.state_dict().items()},
    }


def compare_versions(folder: Path) -> None:
    """Take three steps with every version, then one that is not finite in one process alone."""
    for module in (highway, medsegdiff):
        module.WIDTHS = NARROW
    found: dict[str, Any] = {}
    for version in VERSIONS:
        loop = make_version_loop(version, folder, sharded=True, microbatch=1)
        found[version] = three_steps(loop)
    found["made"] = list[str]()
    loop = make_version_loop("2", folder, sharded=True, use_checkpoint=True, made=found["made"])
    found["2 recomputed"] = three_steps(loop)

    loop = make_version_loop("new", folder, sharded=True)
    loop.net.train()
    loop.run_step(own_batch())
    found["buffers"] = {name: value.clone() for name, value in loop.net.named_buffers()}
    before = [own_part(parameter).clone() for parameter in loop.parameters]
    loop.run_step(with_nan(own_batch()) if rank() else own_batch())
    after = [own_part(parameter) for parameter in loop.parameters]
    found["unchanged"] = all(map(torch.equal, before, after)) and loop.log.skipped == 1
    found["buffers after"] = {name: value.clone() for name, value in loop.net.named_buffers()}
    found["share"] = sum(value.numel() for value in after)
    found["all"] = sum(parameter.numel() for parameter in loop.parameters)
    torch.save(found, folder / f"rank{rank()}")


def run(name: str, *arguments: object, to: Path) -> None:
    """Run a command in all processes; each writes what it says, and its code, into ``to``."""
    code = 0
    with (to / f"{rank()}.txt").open("a") as said:
        with contextlib.redirect_stderr(said):
            try:
                commands.main(name, [str(argument) for argument in arguments])
            except SystemExit as end:
                code = int(end.code or 0)
        said.write(f"code {code}\n")
    logger.configure()
    barrier()


def killed_while_writing(folder: Path, command: list[str]) -> None:
    """Train, and kill the second process when it has written half of its second shards."""
    write, calls = saving.write_shards, []

    def dying(run: Path, content: Any, shards: Any) -> Any:
        calls.append(shards)
        if len(calls) == 2 and rank():
            partial = run / f"savedmodel000004-{shards.name}.shards"
            partial.mkdir(exist_ok=True)
            (partial / "__1_0.distcp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(run, content, shards)

    saving.write_shards = dying
    run("train", *command, to=folder)


def main() -> None:
    """Do what the first argument says, in every process."""
    torch.set_num_threads(1)
    task, folder, *command = sys.argv[1:]
    setup_dist()
    logger.configure(quiet=True)
    if task == "versions":
        compare_versions(Path(folder))
    elif task == "kill":
        killed_while_writing(Path(folder), command)
    else:  # runs, separated by a plus
        for words in " ".join(command).split(" + "):
            run("train", *words.split(), to=Path(folder))
    barrier()


if __name__ == "__main__":
    main()
