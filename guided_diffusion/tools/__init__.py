"""Tools around data: checking a folder, slicing volumes, writing phantoms."""
