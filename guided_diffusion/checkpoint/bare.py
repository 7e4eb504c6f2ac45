"""Bare weights: where other training loops keep them in a file, and what they call its tensors."""

from __future__ import annotations

from torch import Tensor

from guided_diffusion.checkpoint.weights import Weights

WRAPPERS = ("module", "_orig_mod")
"""Parts of tensor names that DataParallel, DistributedDataParallel and torch.compile add."""
RAW = ("model", "state_dict", "model_state_dict")
AVERAGED = ("ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict")
"""Where other training loops keep the last and the averaged weights."""


def bare_weights(content: object, depth: int = 3) -> tuple[Weights, Weights]:
    """Find the last and the averaged weights in nested dictionaries; empty where there are none.

    Tensor names lose what wrappers add to them.
    """
    if not isinstance(content, dict) or not content or not depth:
        return {}, {}
    if all(map(is_weight, content.items())):
        names = content.keys() - {"n_averaged"}  # a count that torch's AveragedModel adds
        return {_own_name(name): content[name].data for name in content if name in names}, {}
    raw: Weights = {}
    averaged: Weights = {}
    for name in RAW:
        if not raw:
            raw, averaged = bare_weights(content.get(name), depth - 1)
    for name in AVERAGED:
        averaged = averaged or next(filter(None, bare_weights(content.get(name), depth - 1)), {})
    return raw, averaged


def _own_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def is_weight(item: tuple[object, object]) -> bool:
    """Whether an entry of a dictionary is a named tensor."""
    return isinstance(item[0], str) and isinstance(item[1], Tensor)
