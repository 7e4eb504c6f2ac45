"""The flags of the tools around data: checking a folder, slicing volumes, writing phantoms."""

from __future__ import annotations

from dataclasses import dataclass

from guided_diffusion.options.flags import flag
from guided_diffusion.options.network import MOST_PIXELS, MOST_PROCESSES, NetworkOptions
from guided_diffusion.options.segmentation import DataOptions

PHANTOM_LAYOUTS = (
    *("brats2d", "brats3d", "brats2021", "isic", "isic2018", "weak", "nnunet", "nnunet2d", "msd"),
    *(
        "acdc",
        "busi",
        "drive",
        "refuge",
        "lidc",
        "custom",
        "pairs",
        "pairs_gt",
        "suffix",
        "parts",
        "modalities",
    ),
)


@dataclass(frozen=True)
class CheckOptions:
    """How a folder is checked."""

    out: str = flag("", "contact sheet to write, such as sheet.png; empty: none")
    cases: int = flag(24, "cases on the contact sheet", least=1, most=240)
    image_size: int = flag(
        NetworkOptions.image_size,
        "that of training: masks that vanish at it are named",
        least=1,
        cap=MOST_PIXELS,
    )
    labelled: bool = flag(True, "False: check as for sampling, where masks may be absent")
    num_workers: int = flag(
        -1,
        "processes that read; 0: this one; -1: by cores and cases",
        least=-1,
        cap=MOST_PROCESSES,
    )


@dataclass(frozen=True)
class SlicingOptions:
    """How volumes are cut into slices."""

    src: str = flag("", "folder of volumes, one folder per case")
    out: str = flag("", "folder to write; the same command continues")
    slices: str = flag("80:129", "slices of each volume, from 0, end left out")
    plane: str = flag(
        "axial",
        "how volumes are sliced, by their headers",
        choices=("axial", "coronal", "sagittal"),
    )
    blank_slices: bool = flag(True, "keep slices whose image is constant")
    modalities: str = flag("", "modalities to write, as in flair,t1ce; empty: all there are")
    normalise: str = flag(
        "minmax", "intensities of a volume", choices=("none", "minmax", "percentile", "zscore")
    )
    dtype: str = flag("uint8", "type of the images", choices=("uint8", "float32"))
    train: float = flag(0.8, "share of patients for training", least=0, most=1)
    seed: int = flag(0, "seed of the division of the patients")
    workers: int = flag(0, "processes; 0: one per core", least=0, cap=MOST_PROCESSES)
    dry_run: bool = flag(False, "find the volumes and their slices, and write nothing")


@dataclass(frozen=True)
class PhantomOptions:
    """What phantoms are written."""

    out: str = flag("", "folder to write; must be absent or empty")
    layout: str = flag("brats2d", f"file layout: {', '.join(PHANTOM_LAYOUTS)}")
    seed: int = flag(0, "seed of all phantoms", least=0)
    patients: int = flag(31, "patients, or ISIC pictures", least=1)
    slices: int = flag(
        0,
        "slices per patient (of volumes the depth); 0: 4, weak 3, brats3d 155, other volumes 52",
        least=0,
        cap=MOST_PIXELS,
    )
    size: int = flag(
        0, "pixels per side; 0: 80, brats3d 240, pictures 128, weak 64", least=0, cap=MOST_PIXELS
    )
    raters: int = flag(0, "also write the masks of this many raters", least=0)
    generation: str = flag("2025", "isic: which CSV layout", choices=("2023", "2025"))
    split: float = flag(0.8, "share of patients for training", least=0, most=1)
    dry_run: bool = flag(False, "check the flags and the folder, and write nothing")


@dataclass(frozen=True)
class ExportOptions:
    """Which weights are written, and where."""

    model_path: str = flag("", "checkpoint, or the folder that holds savedmodel.pt")
    out: str = flag("", "file to write, such as model.safetensors or model.pt")
    weights: str = flag("ema", "averaged or last weights", choices=("ema", "raw"))
    precision: str = flag(
        "fp32", "type of the numbers; fp16 halves the file", choices=("fp32", "fp16")
    )
    training: bool = flag(
        False, "write all that a run continues from, in one .pt file where it was in shards"
    )
    dry_run: bool = flag(False, "read and check the checkpoint, and write nothing")


@dataclass(frozen=True)
class ConfigOptions:
    """A file of flags."""

    config: str = flag(
        "", "YAML file to read flags from, such as a run's config.yaml; those given here win"
    )


CHECK = (DataOptions, CheckOptions)
SLICES = (SlicingOptions,)
PHANTOMS = (PhantomOptions,)
EXPORT = (ExportOptions,)
