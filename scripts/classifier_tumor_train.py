"""Train a classifier of noisy images that are labelled as a whole."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.errors import exit_on_user_error
from guided_diffusion.options.parser import parse
from guided_diffusion.options.weak import TRAIN_CLASSIFIER


def main() -> None:
    with exit_on_user_error():
        typed = parse(__doc__ or "", TRAIN_CLASSIFIER)
        # torch is imported only once flags are read
        from guided_diffusion.weak.train import train_classifier

        train_classifier(typed)


if __name__ == "__main__":
    main()
