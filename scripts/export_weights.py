"""Write the weights of a checkpoint alone, as safetensors or .pt."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.commands import main

if __name__ == "__main__":
    main("export_weights")
