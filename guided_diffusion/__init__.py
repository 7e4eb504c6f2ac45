"""Diffusion-based medical image segmentation: train, draw ensembles, fuse and score them.

Importing the package is quiet and takes no torch; :class:`Segmenter` is loaded when it is used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guided_diffusion.inference.segmentation import Segmentation
    from guided_diffusion.inference.segmenter import Segmenter
    from guided_diffusion.script_util import create_model_and_diffusion

# Fresh memory costs a fault every 4 KiB, on a CPU a tenth of a training step: take huge pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
__all__ = ["Segmentation", "Segmenter", "create_model_and_diffusion", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Segmentation", "Segmenter"):
        from guided_diffusion.inference import segmenter

        return getattr(segmenter, name)
    if name == "create_model_and_diffusion":
        from guided_diffusion.script_util import create_model_and_diffusion

        return create_model_and_diffusion
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
