"""Checks of a training state that a run continues from, before anything is taken from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from guided_diffusion.checkpoint import is_whole
from guided_diffusion.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def refuse_unfit(
    state: Mapping[str, Any],
    parameters: Sequence[Tensor],
    history: Mapping[str, Tensor],
    path: object,
) -> None:
    """Check the training state of a checkpoint; an empty one has nothing wrong.

    Args:
        state: of the optimiser, the loss scale, the schedule sampler and the best validation.
        parameters: that the optimiser had.
        history: that of the run's own schedule sampler.
        path: of the checkpoint.

    Raises:
        UserError: a part of it is not that of such a run.
    """
    if not state:
        return
    checks: dict[str, Callable[[dict[str, Any]], bool]] = {
        "optimizer": lambda part: _has_moments(part, parameters),
        "scaler": _is_scaler,
        "schedule_sampler": lambda part: _is_history(part, history),
        "best": _is_best,
    }
    for name in [*checks, *state]:
        part = state.get(name, {})
        if name in checks and isinstance(part, dict) and checks[name](part):
            continue
        raise UserError(
            path,
            f"its training state is not one of this network ({name})",
            "Continue from another checkpoint, or from its weights alone, as "
            "guided-diffusion export writes them.",
        )


def _has_moments(optimizer: Mapping[str, Any], parameters: Sequence[Tensor]) -> bool:
    moments = optimizer.get("state")
    if not isinstance(moments, dict):
        return False
    return all(
        type(index) is int
        and 0 <= index < len(parameters)
        and isinstance(own, dict)
        and own.keys() >= {"step", *MOMENTS}
        and all(_is_moment(name, own[name], parameters[index]) for name in own)
        for index, own in moments.items()
    )


def _is_moment(name: str, value: Any, parameter: Tensor) -> bool:
    """Whether a value is a moment of a parameter, whose head may have been cut, or a step."""
    if name == "step":
        return _is_number(value.item() if _is_floating(value) and value.numel() == 1 else value)
    if not (_is_floating(value) and value.shape[1:] == parameter.shape[1:]):
        return False
    if value.ndim != parameter.ndim or (value.ndim and len(value) < len(parameter)):
        return False
    return bool(value.isfinite().all()) and not (name == MOMENTS[1] and bool((value < 0).any()))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and is_whole(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_scaler(state: Mapping[str, Any]) -> bool:
    return not state or (state.keys() == {*SCALER} and all(map(_is_number, state.values())))


def _is_history(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> bool:
    """Whether a history is that of the same schedule sampler, or of another one."""
    if state.keys() != own.keys():
        return all(isinstance(name, str) for name in state)
    return all(
        isinstance(value, Tensor)
        and (value.dtype, value.shape) == (own[name].dtype, own[name].shape)
        and is_whole(value)
        and bool(value.isfinite().all())
        for name, value in state.items()
    )


def _is_best(state: Mapping[str, Any]) -> bool:
    """Whether a best validation has its score first, and when it was."""
    rest = {name: value for name, value in state.items() if name != "owed"}
    fitted = rest.pop("mask_temperature", 1.0)
    if type(fitted) is not float or not 0 < fitted < math.inf:
        return False
    if not rest:
        return True
    name, score = next(iter(rest.items()))
    return (
        isinstance(name, str)
        and rest.keys() == {name, "step", "since"}
        and type(score) in (int, float)
        and math.isfinite(score)
        and all(type(rest[key]) is int and rest[key] >= 0 for key in ("step", "since"))
    )
