"""Diffusion-based medical image segmentation: train, draw ensembles, fuse and score them."""

import os

# Fresh memory costs a fault every 4 KiB, on a CPU a tenth of a training step: take huge pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"
