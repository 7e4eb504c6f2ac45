"""Data sets: what a case is, how files are read, cached, divided, augmented and batched."""
