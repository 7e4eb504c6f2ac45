"""Diffusion-based medical image segmentation: train, draw ensembles, fuse and score them."""

__version__ = "0.1.0"
