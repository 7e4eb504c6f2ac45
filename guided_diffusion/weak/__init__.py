"""Weak supervision: masks from image-level labels by diffusion and classifier guidance."""
