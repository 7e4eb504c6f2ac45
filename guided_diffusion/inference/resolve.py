"""How masks are drawn: the plan that flags and a checkpoint settle, before anything is drawn.

A checkpoint says what was trained; the flags say which sampler walks how many levels, how many
masks a case has and how they are fused. ``segmenter`` draws by the plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guided_diffusion.checkpoint import Checkpoint, version_of
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import spelled
from guided_diffusion.options.flags import refuse_contradictions
from guided_diffusion.options.segmentation import LATER, NetworkOptions, SamplingOptions


def trained_flags(checkpoint: Checkpoint, typed: dict[str, Any], path: Path) -> dict[str, Any]:
    """What network, diffusion and data were trained with: the checkpoint's word, else the flags'.

    In sampling, ``--diffusion_steps`` and ``--timestep_respacing`` count evaluations and do not
    describe the training.
    """
    typed = spelled(typed)
    describing = {
        k: v for k, v in typed.items() if k not in ("diffusion_steps", "timestep_respacing")
    }
    steps = typed.get("trained_steps", 0)
    if checkpoint.options:
        trained = checkpoint.options["diffusion_steps"] if steps else 0
        options = {**LATER, **checkpoint.options}
        refuse_contradictions(describing, {**options, "trained_steps": trained}, path)
        return {**typed, **options}
    told = {"version": version_of(checkpoint.model)}
    refuse_contradictions(describing, told, path)
    return {"mask_labels": "", **describing, **told, "diffusion_steps": steps or 1000}


def refuse_coarse(options: SamplingOptions, network: NetworkOptions) -> None:
    """Raise a UserError where a coarse mask is asked for and there is none."""
    if options.coarse != "none" and network.version == "plain":
        raise UserError(
            "--coarse",
            found=options.coarse,
            expected="none, for the plain network has no coarse mask",
            hint="Leave --coarse away.",
        )
