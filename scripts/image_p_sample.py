"""Write both branches of a diffusion and their difference as arrays."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.__main__ import main

if __name__ == "__main__":
    main("image_p_sample")
