"""Augmentation: small random changes of a training case, the same for image and mask.

Flips, rotation and scaling are one affine grid on which image and mask are sampled alike; intensity
changes (gamma, noise) touch the image only. The result depends on the generator alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from guided_diffusion.data.datasets import Case


@dataclass(frozen=True)
class Augmentation:
    """How strongly cases are changed; all zero is the identity.

    Attributes:
        flip: probability of a flip, for each of the two axes.
        degrees: largest rotation about the centre, in either direction.
        scale: largest change of size, 0.1 for 1/1.1 to 1.1.
        gamma: largest absolute logarithm of the gamma exponent, 0.2 for exp(-0.2) to exp(0.2).
        noise: largest standard deviation of Gaussian noise, as a fraction of the channel's range.
    """

    flip: float = 0.5
    degrees: float = 15.0
    scale: float = 0.1
    gamma: float = 0.2
    noise: float = 0.03

    def __call__(self, case: Case, generator: Generator) -> Case:
        """Change ``case`` (image float32 [C, h, w], mask float32 [K, h, w] in {0, 1}) at random.

        Sizes stay the same. The mask is thresholded once, at one half, and every channel keeps its
        own range. Where the rotated grid leaves the picture, image and mask are mirrored.
        """
        height, width = case.image.shape[-2:]
        theta = self._theta(height / width, generator)
        planes = [case.image] if case.mask is None else [case.image, case.mask]
        moved = _sampled(torch.cat(planes), theta)
        image, mask = moved[: len(case.image)], moved[len(case.image) :]
        return case._replace(
            image=self._intensities(image, generator),
            mask=None if case.mask is None else (mask >= 0.5).to(case.mask.dtype),
        )

    def _theta(self, aspect: float, generator: Generator) -> Tensor:
        """Draw the affine map, float32 [2, 3] for ``affine_grid``; ``aspect`` is h / w."""
        flip_x, flip_y, turn, size = torch.rand(4, generator=generator).tolist()
        mirror_x = -1.0 if flip_x < self.flip else 1.0
        mirror_y = -1.0 if flip_y < self.flip else 1.0
        angle = math.radians(self.degrees) * (2 * turn - 1)
        zoom = (1 + self.scale) ** (2 * size - 1)

        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        rows = (
            (cos * mirror_x, -sin * aspect * mirror_y, 0.0),
            (sin / aspect * mirror_x, cos * mirror_y, 0.0),
        )
        return torch.tensor(rows)

    def _intensities(self, image: Tensor, generator: Generator) -> Tensor:
        """Apply gamma and noise, drawn per channel; the lowest value, the background, is kept."""
        low, high = image.amin((-2, -1), keepdim=True), image.amax((-2, -1), keepdim=True)
        span = (high - low).clamp_min(torch.finfo(image.dtype).tiny)
        level = (image - low).div_(span)
        lit = level > 1e-3

        draws = torch.rand(2, len(image), 1, 1, generator=generator)
        gamma = torch.exp(self.gamma * (2 * draws[0] - 1))
        noise = torch.randn(image.shape, generator=generator).mul_(self.noise * draws[1])
        changed = level.pow_(gamma).add_(noise.mul_(lit)).clamp_(0, 1)
        return changed.mul_(span).add_(low)


def _sampled(planes: Tensor, theta: Tensor) -> Tensor:
    """Sample [C, h, w] bilinearly on the affine grid of ``theta``, mirrored beyond the border."""
    grid = functional.affine_grid(theta[None], [1, *planes.shape], align_corners=False)
    sampled = functional.grid_sample(
        planes[None], grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return sampled[0]
