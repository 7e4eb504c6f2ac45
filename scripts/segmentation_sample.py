"""Draw ensembles of masks from a trained model and fuse them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.options.parser import parse
from guided_diffusion.options.segmentation import SAMPLE


def main() -> None:
    with exit_on_user_error():
        typed = parse(__doc__ or "", SAMPLE)
        # torch is imported only once flags are read
        from guided_diffusion.commands import sample

        sample(typed)


if __name__ == "__main__":
    main()
