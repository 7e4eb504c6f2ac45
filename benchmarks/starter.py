"""Choose the weights that come with the package, and write their file.

    python benchmarks/starter.py --data DIR --weights FOLDER [FOLDER ...] --out FILE

Each FOLDER holds weights that ``method.py --stages members --sets isic --weights FOLDER`` has kept;
DIR holds ``isbi2016_256``. Of the winning recipe, the training with the best Dice of the direct
answer on all validation cases of ``splits/isic.txt`` is written, in half precision, with what
``--preset small`` records. Test cases are not looked at.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from method import SETS, SPLITS, Data, Json, recipes, score, segmenter_of

from guided_diffusion.checkpoint import Checkpoint, export_weights
from guided_diffusion.data.splits import narrowed
from guided_diffusion.dist_util import dev
from guided_diffusion.errors import UserError, exit_on_user_error
from guided_diffusion.layouts import open_dataset
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.presets import with_preset
from guided_diffusion.options.segmentation import TRAIN
from guided_diffusion.training.resolve import resolve_training

RECIPE, SIZE, STEPS = "dice_ce b=0.2 q=0.7", 64, 1200
DIRECT: Json = {"sampler": "direct", "num_ensemble": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="kept weights")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--device", default="", help="that the chosen one was trained on")
    parser.add_argument("--torch", default="", help="version of torch that trained it")
    parser.add_argument("--commit", default="", help="of the code that trained it")
    arguments = parser.parse_args()

    pattern = f"isic-{RECIPE}-*-{SIZE}-{STEPS}.pt"
    files = [file for folder in arguments.weights for file in sorted(folder.glob(pattern))]
    if not files:
        raise UserError("--weights", f"no folder holds {pattern}", "Run method.py first.")
    data = validation(arguments.data)
    _, chosen = max((dice_of(file, data), file) for file in files)
    seed = int(chosen.stem.split("-")[-3])
    export_weights(checkpoint(chosen, seed, arguments), "ema", arguments.out, precision="fp16")
    digest = hashlib.sha256(arguments.out.read_bytes()).hexdigest()
    print(f"{chosen}: {arguments.out}, {arguments.out.stat().st_size:,} bytes, SHA-256 {digest}")


def validation(folder: Path) -> Data:
    """All validation cases of ISIC."""
    dataset = open_dataset(folder / SETS["isic"][0])
    cases = narrowed(dataset, SPLITS / "isic.txt", "validation")
    return Data([], [cases[index] for index in range(len(cases))], [], dataset.channels)


def dice_of(file: Path, data: Data) -> float:
    """Mean Dice of the direct answer on validation cases."""
    segmenter = segmenter_of({"seed": 0, "size": SIZE}, data, recipes()[RECIPE], dev("0"))
    segmenter.net.load_state_dict(torch.load(file, map_location="cpu"))
    scores = score(segmenter, data.validation, DIRECT, keep=True)
    spread, number = np.std(scores["cases"], ddof=1), len(scores["cases"])
    print(f"{file}: Dice {scores['dice']:.4f}, standard deviation {spread:.3f} over {number} cases")
    return float(scores["dice"])


def checkpoint(file: Path, seed: int, arguments: argparse.Namespace) -> Checkpoint:
    """The weights as the checkpoint that ``--preset small`` would have saved."""
    given = {"preset": "small", "seed": seed}
    where = {"data_dir": str(arguments.data / SETS["isic"][0]), "data_name": "ISIC"}
    split = {"split": str(SPLITS / "isic.txt")}
    flags = with_preset(Flags.of(TRAIN, **given, **where, **split), "train")
    weights = torch.load(file, map_location="cpu")
    return Checkpoint(
        options=resolve_training(flags).recorded,
        step=STEPS,
        model=weights,
        ema={"0.99": weights},
        run={
            "command": f"python benchmarks/method.py --stages members --sets isic --seeds {seed}",
            "given": given,
            "versions": {"torch": arguments.torch},
            "device": arguments.device,
            "code": {"commit": arguments.commit},
        },
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main()
