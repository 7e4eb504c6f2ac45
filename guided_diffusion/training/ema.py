"""Exponential moving averages of the weights, with a warm-up of the decay."""

from __future__ import annotations

import torch

from guided_diffusion.checkpoint import Weights
from guided_diffusion.checkpoint.sharded import own_part


class ExponentialAverage:
    """A running average of a network's parameters; buffers are taken as they are.

    The decay warms up as min(rate, (1 + n) / (10 + n)), so that a short run does not sample from
    its own random start.
    """

    def __init__(self, net: torch.nn.Module, rate: float) -> None:
        self.net = net
        self.rate = rate
        self.values = [parameter.detach().clone() for parameter in net.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after step ``step`` (counted from 0)."""
        rate = min(self.rate, (1 + step) / (10 + step))
        values, parameters = (
            [own_part(tensor) for tensor in tensors]
            for tensors in (self.values, self.net.parameters())
        )
        torch._foreach_lerp_(values, parameters, 1 - rate)

    def state_dict(self) -> Weights:
        """Return a copy of the network's state dict, the averages in place of the parameters."""
        names = [name for name, _ in self.net.named_parameters()]
        return plain({**self.net.state_dict(), **dict(zip(names, self.values, strict=True))})

    def load(self, weights: Weights) -> None:
        """Continue from :meth:`state_dict`; the parents' two-channel head is cut."""
        for (name, _), value in zip(self.net.named_parameters(), self.values, strict=True):
            own = own_part(value)
            own.copy_(own_part(weights[name])[: len(own)])


def plain(weights: Weights) -> Weights:
    """Copy weights, on their device, as plain contiguous tensors."""
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
