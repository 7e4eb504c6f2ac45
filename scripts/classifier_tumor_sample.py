"""Draw images from noise, led by a classifier with --guided."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.options.parser import parse
from guided_diffusion.options.weak import SAMPLE_IMAGES


def main() -> None:
    with exit_on_user_error():
        typed = parse(__doc__ or "", SAMPLE_IMAGES)
        # torch is imported only once flags are read
        from guided_diffusion.weak.commands import draw_images

        draw_images(typed)


if __name__ == "__main__":
    main()
