"""Respacing: the choice of a subset of timesteps, to train on or to sample with.

Nichol & Dhariwal (2021), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from guided_diffusion.errors import UserError


def space_timesteps(steps: int, spec: str | Sequence[int]) -> set[int]:
    """Choose timesteps out of ``range(steps)``.

    Args:
        steps: length T of the trained schedule.
        spec: ``"ddimN"`` for N timesteps at a constant integer stride (Song et al., 2020);
            otherwise counts, as a list or a comma-separated string: the schedule is split into as
            many equal sections, and from each section its count of evenly spaced timesteps is
            taken. An empty string keeps all.

    Raises:
        UserError: the schedule cannot be split like this.
    """
    if isinstance(spec, str):
        if spec.startswith("ddim"):
            return _constant_stride(steps, _count(spec.removeprefix("ddim"), spec))
        spec = [_count(part, spec) for part in spec.split(",")] if spec else [steps]

    size, longer = divmod(steps, len(spec))
    chosen: set[int] = set()
    start = 0
    for section, count in enumerate(spec):
        length = size + (section < longer)
        chosen |= {start + offset for offset in _evenly(length, count)}
        start += length
    return chosen


def _evenly(length: int, count: int) -> list[int]:
    """Return ``count`` integers from 0 to ``length - 1``, evenly spaced (only 0 for one).

    The stride is added up, not multiplied: where a position is a half, the floating-point error
    decides how it rounds, and published models were respaced by adding.
    """
    if not 1 <= count <= length:
        raise UserError(
            "--timestep_respacing",
            f"a section of {length} trained steps cannot give {count}, but 1 to {length} steps",
            "Ask for fewer steps, or for fewer sections.",
        )
    stride = (length - 1) / (count - 1) if count > 1 else 1.0
    return [round(at) for at in accumulate([stride] * (count - 1), initial=0.0)]


def _constant_stride(steps: int, count: int) -> set[int]:
    for stride in range(1, steps + 1):
        if len(range(0, steps, stride)) == count:
            return set(range(0, steps, stride))
    raise UserError(
        f"--timestep_respacing ddim{count}",
        f"no constant stride through {steps} steps gives {count} of them",
        f"Use --timestep_respacing {count} for uneven strides.",
    )


def _count(text: str, spec: str) -> int:
    if not text.strip().isdecimal():
        raise UserError(
            "--timestep_respacing",
            f"{spec!r} is not a list of counts",
            "Write whole numbers separated by commas, such as 50 or 10,20,30, or ddim50.",
        )
    return int(text)
