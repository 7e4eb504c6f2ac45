"""Averaged weights, and copies of weights that stay as they are while training goes on.

Called by ``train_util``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def copied(value: Any) -> Any:
    """Copy every tensor of a nested state, on its device; the rest is handed on."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, list) else value


def on_cpu(value: Any) -> Any:
    """Bring every tensor of a nested state to the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    return [on_cpu(part) for part in value] if isinstance(value, list) else value


def fitted_moments(
    moments: dict[int, dict[str, Any]], parameters: Sequence[Tensor], known: Sequence[int]
) -> dict[int, dict[str, Any]]:
    """Bring an optimiser's moments into the memory order of the parameters they belong to.

    The optimiser's i-th parameter is our ``known[i]``-th. Moments are cut as the parents'
    two-channel head was cut, if it was. Steps are plain numbers where an old torch wrote them.
    """

    def fitted(value: Tensor | float, parameter: Tensor) -> Tensor:
        value = torch.as_tensor(value, dtype=torch.float32)
        return torch.empty_like(parameter).copy_(value[: len(parameter)]) if value.ndim else value

    return {
        own: {name: fitted(value, parameters[own]) for name, value in moments[index].items()}
        for index, own in enumerate(known)
        if index in moments
    }
