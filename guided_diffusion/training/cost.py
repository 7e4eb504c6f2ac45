"""What one image costs in training: operations and memory, found without computing anything.

The network is run forward and backward on torch's meta device, whose tensors have shapes but no
values, while its operations are counted and the tensors that are alive are added up.
"""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from guided_diffusion.errors import memory_problem
from guided_diffusion.unet import EncodeAndPredict, UNetModel

HALF = 0.55
"""Memory of an image in half precision relative to fp32, as measured on a CUDA device."""


class ImageCost(NamedTuple):
    """What one image costs.

    Attributes:
        flop: operations of one prediction; a multiply-add counts as two. A training step has three
            times as many, without what is recomputed.
        gib: most memory that is taken while the gradient is computed, in GiB of fp32, beside
            weights and gradients; infinite where it cannot be counted.
    """

    flop: float
    gib: float

    def gib_in(self, precision: str) -> float:
        """Return the memory in a precision."""
        return self.gib * (1 if precision == "fp32" else HALF)


def image_cost(net: UNetModel) -> ImageCost:
    """Find what an image of the network's size costs.

    Matrices between the pixels of a map are left out, as attention need not keep them. What a
    device's libraries take for themselves is not known here.
    """
    net = _on_meta(net)
    shape = (net.image_size, net.image_size)
    diffused, condition = net.mask_channels, net.in_channels - net.mask_channels
    for parameter in net.parameters():
        parameter.grad = torch.empty_like(parameter)
    own = [*net.parameters(), *net.buffers()]
    own += [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    labelled = net.num_classes is not None
    try:
        with torch.device("meta"), _Counting(own, largest=net.image_size) as counting:
            x, image = torch.empty(1, diffused, *shape), torch.empty(1, condition, *shape)
            y = torch.zeros(1, dtype=torch.int64) if labelled else None
            output = EncodeAndPredict(net)(x, torch.zeros(1), image, y)
            flop = counting.flop
            parts = [part.float().sum() for part in output if part is not None]
            torch.stack(parts).sum().backward()
    except RuntimeError as error:
        if memory_problem(error):
            return ImageCost(math.inf, math.inf)
        raise
    return ImageCost(float(flop), counting.most / 2**30)


def _on_meta(net: UNetModel) -> UNetModel:
    """Copy a network without its values."""
    empty = {
        id(value): nn.Parameter(torch.empty_like(value, device="meta"))
        if isinstance(value, nn.Parameter)
        else torch.empty_like(value, device="meta")
        for value in (*net.parameters(), *net.buffers())
    }
    return copy.deepcopy(net, cast("dict[int, Any]", empty)).train()


class _Counting(TorchDispatchMode):
    """Counts operations, and the bytes of tensors that are alive at the same time.

    Attributes:
        flop: operations until now.
        most: the most bytes until now, without those of ``own``.
    """

    def __init__(self, own: list[Tensor], *, largest: int) -> None:
        super().__init__()
        self.flop = self.alive = self.most = 0
        self.largest = largest
        self._counted = {value.untyped_storage()._cdata for value in own}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        if count := flop_registry.get(function._overloadpacket):
            self.flop += count(*args, **kwargs, out_val=results)
        for value in results if isinstance(results, tuple | list) else (results,):
            if isinstance(value, Tensor) and not self._is_between_pixels(value):
                self._note(value.untyped_storage())
        return results

    def _is_between_pixels(self, value: Tensor) -> bool:
        return value.ndim > 2 and min(value.shape[-2:]) > self.largest

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._counted:
            return
        self._counted.add(key)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.alive -= size
