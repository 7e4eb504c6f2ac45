"""What a checkpoint holds, and which of its kinds it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from guided_diffusion.checkpoint.weights import Weights, version_of
from guided_diffusion.errors import UserError
from guided_diffusion.options.segmentation import LATER

SEGMENTATION = "a segmentation network, which scripts/segmentation_train.py trains"
IMAGES = "a diffusion of images, which scripts/train_tumor_ddfm.py trains"
CLASSIFIER = "a classifier of images, which scripts/classifier_tumor_train.py trains"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        options: the flags that describe network, diffusion and data, by name; empty for bare
            weights.
        step: training steps taken.
        model: the last weights, by tensor name.
        ema: averaged weights by their decay rate as text, which is empty where bare weights do not
            say it.
        training: what the training loop needs to resume; empty for bare weights.
        run: what would repeat the run that wrote it, as its ``config.yaml`` says; empty in older
            checkpoints and for bare weights.
    """

    options: dict[str, Any]
    step: int
    model: Weights
    ema: dict[str, Weights] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def choose(self, weights: str) -> tuple[Weights, str]:
        """Return the weights to sample with, and a phrase that names them.

        Args:
            weights: ``ema`` for the slowest average, or the last weights if there is none; or
                ``raw`` for the last weights, unless the file has an average alone.
        """
        alone = any(average is self.model for average in self.ema.values())
        if self.ema and (weights == "ema" or alone):
            rate = max(self.ema, key=lambda rate: float(rate or 0))
            if not self.options:
                return self.ema[rate], "bare averaged weights"
            return self.ema[rate], f"averaged weights (EMA {rate}) of step {self.step}"
        return self.model, f"last weights of step {self.step}" if self.options else "bare weights"


def recorded_flags(checkpoint: Checkpoint) -> dict[str, Any]:
    """The flags of training that a checkpoint records; bare weights show their version only."""
    if checkpoint.options:
        return {**LATER, **checkpoint.options}
    return {"version": version_of(checkpoint.model)}


def kind_of(checkpoint: Checkpoint) -> str:
    """Return the kind of a checkpoint; bare weights do not say theirs."""
    own = CLASSIFIER if "model_type" in checkpoint.options else SEGMENTATION
    return IMAGES if checkpoint.options.get("of_images") else own


def require_kind(checkpoint: Checkpoint, kind: str, path: object) -> None:
    """Raise a UserError for a checkpoint of another kind."""
    if checkpoint.options and kind != kind_of(checkpoint):
        raise UserError(path, f"is not {kind}", "Correct the path.")
