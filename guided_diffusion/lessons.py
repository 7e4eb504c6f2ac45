"""What a batch of training teaches: which part is diffused, and under which condition.

Segmentation diffuses masks under the condition of images; generation and classification have images
alone. The training loop is given one of these functions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from guided_diffusion.datasets import Batch


class Lesson(NamedTuple):
    """What a batch teaches: ``x0`` [B, K, H, W] in [0, 1] under a ``condition`` [B, C, H, W].

    ``y``: class labels int64 [B] of what is class-conditional.
    """

    x0: Tensor
    condition: Tensor
    y: Tensor | None = None


def masks_of_images(batch: Batch) -> Lesson:
    """Segmentation: masks are diffused, and images are their condition."""
    if batch.mask is None:
        raise ValueError("a training batch needs masks")
    return Lesson(batch.mask, batch.image)


def images_alone(batch: Batch) -> Lesson:
    """Generation: images are diffused, and nothing is their condition."""
    return Lesson(batch.image, batch.image[:, :0])


def labelled_images(batch: Batch) -> Lesson:
    """Generation by class, and classification."""
    return Lesson(batch.image, batch.image[:, :0], batch.label)
