"""The former place of :class:`Segmenter`: import it from ``guided_diffusion`` instead.

This name is kept for one release.
"""

from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.inference.segmenter import Segmenter

__all__ = ["Segmentation", "Segmenter"]
