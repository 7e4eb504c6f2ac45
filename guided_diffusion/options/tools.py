"""Every flag of every script, as frozen dataclasses: one per concern, field name = flag name.

A field carries its own default, help line and choices, so nothing is listed twice. Names, types,
bool rule and defaults are those of Diffusion-based-Segmentation and MedSegDiff, except for the
deviations in the changelog. No torch here: ``--help`` has to answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from guided_diffusion.options.flags import flag
from guided_diffusion.options.segmentation import DataOptions


@dataclass(frozen=True)
class CheckOptions:
    """How a folder is looked at."""

    out: str = flag("", "contact sheet to write, such as sheet.png; empty: none")
    cases: int = flag(24, "cases on the contact sheet", least=1, most=240)
    image_size: int = flag(256, "size of training, at which masks must not vanish", least=1)
    labelled: bool = flag(True, "False: look as sampling does, where masks may be absent")
    num_workers: int = flag(
        -1, "processes that read; 0: this one; -1: by cores and cases", least=-1
    )


CHECK = (DataOptions, CheckOptions)
