"""Parts of training: set-up, averages, checkpoints, validation, log and stop signal."""
