"""Cut a folder of BraTS volumes into the two-dimensional layout, divided by patient."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.errors import exit_on_user_error


def main() -> None:
    args = read_flags()
    with exit_on_user_error():
        cut(args)


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--src", type=Path, required=True, help="folder of volumes, one folder per case")
    add("--out", type=Path, required=True, help="folder to write; the same command continues")
    add("--slices", default="80:129", help="axial slices, from 0, end left out (default 80:129)")
    add("--blank_slices", choices=("True", "False"), default="True", help="keep constant slices")
    add("--modalities", default="", help="such as flair,t1ce (default: all there are)")
    add("--normalise", choices=("none", "minmax", "percentile", "zscore"), default="minmax")
    add("--dtype", choices=("uint8", "float32"), default="uint8", help="of the images")
    add("--train", type=float, default=0.8, help="share of patients for training (default 0.8)")
    add("--seed", type=int, default=0, help="of the division (default 0)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    return parser.parse_args()


def cut(args: argparse.Namespace) -> None:
    """Cut what is not cut yet, with progress by volume."""
    from tqdm import tqdm

    from guided_diffusion.bratsloader import find_modalities
    from guided_diffusion.data.datasets import Reading
    from guided_diffusion.options.flags import slice_range
    from guided_diffusion.tools import slices as slicing

    reading = Reading(
        modalities=find_modalities(args.modalities),
        slices=slice_range(args.slices),
        blank_slices=args.blank_slices == "True",
        normalise=args.normalise,
    )
    plan = slicing.SlicingPlan(reading, dtype=args.dtype, train=args.train, seed=args.seed)
    dataset = slicing.open_volumes(args.src, reading)
    jobs = slicing.plan_jobs(dataset, args.out, plan)
    slicing.sweep(args.out)
    for note in dataset.notes:
        print(note)

    counts = slicing.cut_all(dataset, jobs, dtype=plan.dtype, workers=args.workers)
    written = sum(tqdm(counts, total=len(jobs), unit="volume", disable=None))
    print(
        f"{written} slices of {len(jobs)} volumes written, {len(dataset) - written} were there; "
        f"who is in which part: {args.out / 'split.txt'}"
    )


if __name__ == "__main__":
    main()
