"""Write a folder of seeded phantoms in one of the layouts the data sets read.

Called by hand, by the README's walk-through and by the benchmarks; all the work is done by
`guided_diffusion.phantoms`, which is imported only after the flags are read so that `--help` is
quick. Needs no install: the repository root is put on the path.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.errors import UserError, exit_on_user_error

LAYOUTS = {  # layout: size and slices where the flags are not given
    "brats2d": {"size": 80, "slices": 4},
    "brats3d": {"size": 240, "slices": 155},
    "isic": {"size": 128},
    "weak": {"size": 64, "slices": 3},
}


def main(argv: list[str] | None = None) -> None:
    """Read the flags and write the phantoms; exits with code 2 where a flag is unusable."""
    args = read_flags(argv)
    with exit_on_user_error():
        refuse_occupied(args.out)
        write(args)


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; flags left out take the layout's own defaults."""
    parser = argparse.ArgumentParser(description="Write a folder of seeded phantoms.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write; must be absent or empty")
    add("--layout", choices=LAYOUTS, default="brats2d", help="file layout (default brats2d)")
    add("--seed", type=natural, default=0, help="number of the phantom world (default 0)")
    add("--patients", type=positive, default=31, help="patients, or ISIC pictures (default 31)")
    add(
        "--slices",
        type=positive,
        help="slices per patient (4; weak 3); brats3d: depth (155)",
    )
    add("--size", type=positive, help="pixels per side (80; brats3d 240, isic 128, weak 64)")
    add("--raters", type=natural, default=0, help="also write the masks of this many raters")
    add("--generation", choices=("2023", "2025"), default="2025", help="isic: which CSV layout")
    add("--split", type=share, default=0.8, help="share of patients for training (default 0.8)")
    args = parser.parse_args(argv)
    if args.layout == "isic" and args.slices is not None:
        parser.error("--slices says nothing for --layout isic; leave it out")
    if args.layout == "weak" and args.raters:
        parser.error("--raters says nothing for --layout weak; leave it out")
    for name, value in LAYOUTS[args.layout].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def natural(text: str) -> int:
    """Read a whole number of 0 or more."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} found, 0 or more expected")
    return int(text)


def positive(text: str) -> int:
    """Read a whole number of 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} found, 1 or more expected")
    return int(text)


def share(text: str) -> float:
    """Read a number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} found, a number from 0 to 1 expected")
    return float(text)


def refuse_occupied(out: Path) -> None:
    """Raise UserError unless `out` is absent or empty; a README.md alone is no obstacle."""
    if not out.exists():
        return
    names = sorted(p.name for p in out.iterdir()) if out.is_dir() else ["a file"]
    found = [name for name in names if name != "README.md"]
    if found:
        raise UserError(
            f"--out {out}",
            found=", ".join(found[:3]) + (" ..." if len(found) > 3 else ""),
            expected="a new or empty folder",
            hint="Name another folder or empty this one.",
        )


def write(args: argparse.Namespace) -> None:
    """Write the phantoms the flags ask for, showing progress by patient."""
    from tqdm import tqdm

    from guided_diffusion.tools import phantom_folders

    common = {
        "patients": args.patients,
        "size": args.size,
        "training": args.split,
        "progress": lambda numbers: tqdm(numbers, desc=args.layout, unit="patient"),
    }
    if args.layout == "weak":
        phantom_folders.write_weak(args.out, args.seed, slices=args.slices, **common)
        return
    common["raters"] = args.raters
    if args.layout == "brats2d":
        phantom_folders.write_brats_slices(args.out, args.seed, slices=args.slices, **common)
    elif args.layout == "brats3d":
        phantom_folders.write_brats_volumes(args.out, args.seed, slices=args.slices, **common)
    else:
        phantom_folders.write_isic(args.out, args.seed, generation=args.generation, **common)


if __name__ == "__main__":
    main()
