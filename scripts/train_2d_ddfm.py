"""Train a diffusion model of the slices of NumPy volumes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.options.parser import parse
from guided_diffusion.options.weak import TRAIN_IMAGES


def main() -> None:
    with exit_on_user_error():
        typed = parse(__doc__ or "", TRAIN_IMAGES)
        # torch is imported only once flags are read
        from guided_diffusion.weak.train import train_images

        train_images(typed)


if __name__ == "__main__":
    main()
