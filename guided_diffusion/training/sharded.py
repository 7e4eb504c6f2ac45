"""Networks that are divided among processes: each holds a part of every parameter.

``torch.distributed.fsdp.fully_shard`` gathers the parameters of a block before it is computed, and
frees them afterwards. What belongs to a parameter (gradient, moments, averages) is divided alike,
so that what is done element by element needs no communication.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from guided_diffusion import logger
from guided_diffusion.checkpoint import (
    Checkpoint,
    Weights,
    fitting_weights,
    read_content,
    without_values,
)
from guided_diffusion.checkpoint.sharded import (
    damage,
    is_sharded,
    own_part,
    read_shards,
    refuse_damaged,
)
from guided_diffusion.checkpoint.weights import map_named
from guided_diffusion.dist_util import (
    all_gather,
    all_gather_object,
    any_rank,
    rank,
    world_size,
    wrap_ddp,
)
from guided_diffusion.errors import UserError
from guided_diffusion.networks.highway import Level
from guided_diffusion.networks.medsegdiff_v2 import ConvBlock
from guided_diffusion.networks.ss_former import SSFormerBlock
from guided_diffusion.nn import AttentionBlock, Downsample, ResBlock, Upsample
from guided_diffusion.training.ema import ExponentialAverage

BLOCKS = (ResBlock, AttentionBlock, Downsample, Upsample, ConvBlock, SSFormerBlock, Level)
"""The modules whose parameters are gathered together; the rest is gathered once a step."""
_WEIGHT = re.compile(r"(?:model|ema/[^/]*)/(.*)")
_MOMENT = re.compile(r"training/optimizer/state/(\d+)/exp_avg(?:_sq)?")


def blocks(net: nn.Module) -> Iterator[nn.Module]:
    """Find the blocks of a network, none within another."""
    for child in net.children():
        if isinstance(child, BLOCKS):
            yield child
        else:
            yield from blocks(child)


def gathered_parameters(net: nn.Module) -> int:
    """Count the parameters that a process holds whole at most, during a step.

    Those outside of blocks, and two blocks, since the next one is gathered in advance.
    """
    sizes = sorted(_count(block) for block in blocks(net))
    return _count(net) - sum(sizes) + sum(sizes[-2:])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shard_network(make: Callable[[], nn.Module], device: torch.device, *, new: bool) -> nn.Module:
    """Build a network of whose blocks each process holds a part; :func:`replicate` does the rest.

    The first process alone draws the weights of a ``new`` one, in main memory, so that they are
    those of a single process with the same seed; otherwise they are left to be filled.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        net = make()
    for block in blocks(net):
        fully_shard(block)
    net.to_empty(device=device)
    if new:
        weights = make().state_dict() if rank() == 0 else {}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(net, weights, options=options)
    return net


def replicate(module: nn.Module) -> nn.Module:
    """Let processes train one network, what is called in a step: in parts, or each a copy of it."""
    if not is_sharded([*module.parameters()]):
        return wrap_ddp(module)
    from torch.distributed.fsdp import fully_shard  # takes a second, and few need it

    fully_shard(module)
    return module


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The parts of tensors that this process has; those that are not sharded are whole."""
    return [own_part(tensor) for tensor in tensors]


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all elements of tensors, sharded or not; all processes get the same."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(own_parts(tensors))))
    return torch.linalg.vector_norm(all_gather(norm[None])) if is_sharded([*tensors]) else norm


def share_buffers(net: nn.Module) -> None:
    """Give all processes the first one's buffers of a sharded network, as DDP does by itself."""
    if is_sharded([*net.parameters()]):
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def whole_average(average: ExponentialAverage, *, wanted: bool) -> Weights:
    """Gather averaged weights in the processes that want them; the others get none.

    All processes call this. What was sharded arrives in main memory, one tensor at a time.
    """
    if not is_sharded(average.values):
        return average.state_dict() if wanted else {}
    whole: Weights = {}
    if any_rank(wanted):
        for name, value in average.state_dict().items():
            full = cast(Any, value).full_tensor() if is_sharded(value) else value
            if wanted:
                whole[name] = full.cpu()
    return whole


# ---------------------------------------------------------------------------------- checkpoints


def distribute(checkpoint: Checkpoint, net: nn.Module, path: Path) -> Checkpoint:
    """Fill a sharded network from a checkpoint, and divide the rest of it in the same way.

    Args:
        checkpoint: opened on disk, with whole tensors or in shards, of any number of processes.
        net: that is trained.
        path: of the checkpoint.

    Raises:
        UserError: it is not one of this network, or is damaged.
    """
    for weights in (checkpoint.model, *checkpoint.ema.values()):
        fitting_weights(net, weights, path)
    parameters = dict(net.named_parameters())
    names = [*parameters]
    targets: dict[str, Tensor] = {}

    def target(name: str, value: Tensor) -> Tensor:
        owner: Tensor | None = None
        moment = _MOMENT.fullmatch(name)
        if moment and int(moment[1]) < len(names):
            owner = parameters[names[int(moment[1])]]
        elif weight := _WEIGHT.fullmatch(name):
            owner = parameters.get(weight[1])
        if owner is None:
            return value
        if owner.shape != value.shape:
            raise _unfit(path)
        targets[name] = torch.empty_like(owner)
        return targets[name]

    divided = replace(checkpoint, **map_named(target, _tensors_of(checkpoint)))
    if without_values(_tensors_of(checkpoint)):
        _read(path, targets)
    else:
        map_named(lambda name, value: _take(targets.get(name), value), _tensors_of(checkpoint))
    finite = all(bool(own_part(value).isfinite().all()) for value in targets.values())
    if any_rank(not finite):
        raise UserError(path, "holds NaN or infinite values", "Use an earlier checkpoint.")
    net.load_state_dict(divided.model)
    return divided


def _tensors_of(checkpoint: Checkpoint) -> dict[str, Any]:
    parts = ("model", "ema", "training")
    return {name: getattr(checkpoint, name) for name in parts}


def _unfit(path: Path) -> UserError:
    hint = "Continue from another checkpoint."
    return UserError(path, "its training state is not one of this network", hint)


def _take(target: Tensor | None, value: Tensor) -> None:
    """Copy this process's rows of a whole tensor, divided as ``torch.chunk`` divides it."""
    if target is not None:
        rows = -(-len(value) // world_size())
        own_part(target).copy_(value[rows * rank() : rows * (rank() + 1)])


def _read(path: Path, targets: dict[str, Tensor]) -> None:
    content = read_content(path)
    found = all_gather_object(damage(content, path, (rank(), world_size())))
    refuse_damaged(content, path, next(filter(None, found), ""))
    processes = content["shards"]["processes"]
    if processes != world_size():
        logger.log(f"{path}: shards of {processes} processes, divided among {world_size()}")
    try:
        read_shards(content, path, targets)
    except Exception as error:  # files can fail in any way
        raise UserError(path, f"cannot be read ({error})", "Use an earlier checkpoint.") from error
