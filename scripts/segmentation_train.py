"""Train a diffusion model that segments images, or a U-Net (--version unet)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.__main__ import main

if __name__ == "__main__":
    main("segmentation_train")
