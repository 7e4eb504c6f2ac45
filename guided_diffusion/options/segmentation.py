"""The flags of training, sampling and scoring, one frozen dataclass per concern.

A field carries its own default, help line and choices, so nothing is listed twice. Names, types and
defaults are those of Diffusion-based-Segmentation and MedSegDiff, except for the deviations that
docs/migration.md lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from guided_diffusion.errors import UserError
from guided_diffusion.options.flags import Flags, flag
from guided_diffusion.options.network import (
    MOST_INPUTS,
    MOST_PROCESSES,
    MOST_STEPS,
    DiffusionOptions,
    NetworkOptions,
)
from guided_diffusion.options.presets import PresetOptions

DPM_SOLVERS = ("dpm_solver", "dpm_solver++")
SOLVERS = (*DPM_SOLVERS, "sde_dpm_solver++", "unipc")


@dataclass(frozen=True)
class DataOptions:
    """Where the images are and how they reach the network's size."""

    data_dir: str = flag("./data/training", "folder with the data set", run=True)
    data_name: str = flag("", "layout: BRATS, NNUNET, ... (docs/data.md); empty: found", run=True)
    split: str = flag(
        "",
        "file of '<case or patient id> <training|validation|testing>' lines to divide data_dir, "
        "or a fold of nnU-Net's, as in splits_final.json:0",
        run=True,
    )
    crop: str = flag(
        "auto",
        "wolleb cuts 240x240 to 224x224, none resizes; auto: wolleb for BraTS slices, the plain "
        "network and image_size 256",
        choices=("auto", "none", "wolleb"),
    )
    modalities: str = flag(
        "",
        "channels and their order, by the names of the files, as in flair,t1ce or t2,adc; empty: "
        "all, of BraTS data t1,t1ce,t2,flair",
    )
    normalise: str = flag(
        "auto",
        "intensities: minmax and percentile (1 to 99, clipped) to [0, 1], zscore of what is not 0; "
        "a volume is scaled as a whole; auto: minmax for volumes, else none",
        choices=("auto", "none", "minmax", "percentile", "zscore"),
    )
    mask_labels: str = flag(
        "",
        "classes of the mask by label, as in 1,2,4 or WT,TC,ET (BraTS) or core=1+4,oedema=2; "
        "empty: all above 0 is one class",
    )
    slices: str = flag(
        "", "slices of each volume, from 0, end left out, as in 80:129; empty: all", run=True
    )
    plane: str = flag(
        "axial",
        "how volumes are sliced, by their headers; slices count to the left, back and top",
        choices=("axial", "coronal", "sagittal"),
    )
    blank_slices: bool = flag(True, "keep slices of a volume whose image is constant", run=True)
    cache_dir: str = flag(
        "auto",
        "folder where volumes are unpacked once; auto: guided_diffusion in the user's cache; none: "
        "the last ones stay in up to 1 GiB of memory",
        run=True,
    )


@dataclass(frozen=True)
class SampleDataOptions(DataOptions):
    """Where the images to segment are and how they reach the network's size."""

    data_dir: str = flag(
        "./data/testing", "folder with the data set or with bare images, or one image", run=True
    )


@dataclass(frozen=True)
class RunOptions:
    """Output folder, seed, devices and precision."""

    out_dir: str = flag("./results/", "folder for everything that is written")
    seed: int = flag(10, "seed of all randomness", least=-(2**63), most=2**63 - 1)
    gpu_dev: str = flag("0", "index of the CUDA device")
    multi_gpu: str = flag("", "CUDA devices to share the work, as in 0,1,2")
    use_fp16: bool = flag(False, "the same as --precision fp16")
    precision: str = flag(
        "fp32",
        "arithmetic of the network's layers; auto: bf16 where the device computes it itself (CUDA "
        "from capability 8, processors with AVX512-BF16 or AMX), else fp32",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    tf32: bool = flag(
        True, "CUDA: fp32 convolutions in TF32, 10 bits of mantissa; matrix products never are"
    )
    compile: str = flag(
        "",
        "compile the network with this mode of torch.compile; reduce-overhead uses CUDA graphs",
        choices=("", "default", "reduce-overhead", "max-autotune"),
    )


@dataclass(frozen=True)
class TrainingOptions:
    """The training loop."""

    max_steps: int = flag(100_000, "stop after this many steps; 0: never", least=0)
    batch_size: int = flag(1, "images in one step", least=1)
    microbatch: int = flag(-1, "images in one forward pass; -1 or 0: the whole batch", least=-1)
    lr: float = flag(1e-4, "learning rate", least=0)
    weight_decay: float = flag(0.0, "weight decay of AdamW", least=0)
    lr_anneal_steps: int = flag(
        0, "let the rate fall linearly to 0 over this many steps, then stop", least=0
    )
    ema_rate: str = flag("0.9999", "decay of the averaged weights; several by commas")
    warmup_steps: int = flag(0, "steps over which the learning rate rises", least=0)
    grad_clip: float = flag(0.0, "largest norm of the gradient; 0: no clipping", least=0)
    max_bad_steps: int = flag(10, "stop after this many non-finite steps in a row", least=1)
    keep: int = flag(0, "numbered checkpoints to keep, the newest; 0: all", least=0)
    schedule_sampler: str = flag(
        "uniform", "how timesteps are drawn", choices=("uniform", "loss-second-moment")
    )
    log_interval: int = flag(100, "steps between two lines of the log", least=1)
    save_interval: int = flag(5000, "steps between two checkpoints", least=1)
    resume_checkpoint: str = flag("", "checkpoint, or folder of one, to continue from")
    resume: str = flag(
        "", "auto: continue from the latest checkpoint in out_dir, if any", choices=("", "auto")
    )
    num_workers: int = flag(
        -1,
        "processes that read data; -1: up to 4 beside a CUDA device, else 0",
        least=-1,
        cap=MOST_PROCESSES,
    )
    augment: bool = flag(False, "flip, rotate, scale and brighten training cases at random")
    rater_choice: str = flag(
        "random",
        "mask of a case with several raters: random, one of theirs at each step; mean, the share "
        "of raters that mark a pixel; majority",
        choices=("random", "mean", "majority"),
    )
    foreground_share: float = flag(
        0.0,
        "share of the training cases that is drawn from those with a lesion, as in 0.5; the rest "
        "is drawn from all",
        least=0,
        most=1,
    )
    cache_gib: float = flag(
        2.0, "disk space, in GiB, for decoded training cases of this run", least=0
    )
    fsdp: str = flag(
        "auto",
        "divide the network among the processes (fully_shard), instead of a copy in each; auto: "
        "where a copy does not fit into a device's memory",
        choices=("auto", "on", "off"),
    )
    dry_run: bool = flag(False, "do everything up to the first step, and write nothing", run=True)
    fp16_scale_growth: float = flag(
        1e-3, "growth of the loss scale", dead="torch chooses the loss scale itself"
    )
    dpm_solver: bool = flag(False, "sample with DPM-Solver++", dead="it concerns sampling only")


@dataclass(frozen=True)
class WatchOptions:
    """Validation of a training run."""

    val_dir: str = flag(
        "", "labelled data set to validate on; empty: the validation part of --split, if any"
    )
    val_interval: int = flag(0, "steps between two validations; 0: at every checkpoint", least=0)
    val_cases: int = flag(16, "cases to validate on, evenly spread; 0: all", least=0)
    val_steps: int = flag(5, "network evaluations per mask in validation", least=1)
    patience: int = flag(
        0, "stop after this many validations in a row without a better Dice; 0: never", least=0
    )


@dataclass(frozen=True)
class LiveOptions:
    """Live display of a training run."""

    tensorboard: bool = flag(False, "write TensorBoard's event files into out_dir as well")
    visdom: int = flag(
        0, "port of a visdom server on this machine to draw on; 0: none", least=0, most=65535
    )


@dataclass(frozen=True)
class SamplingOptions:
    """How masks are drawn."""

    model_path: str = flag("", "checkpoint, folder of one, or isic-small; several by commas")
    num_ensemble: int = flag(5, "masks drawn for each case", least=1, cap=10_000)
    flip_members: bool = flag(
        False, "draw num_ensemble masks of the image flipped left to right, too, and flip them back"
    )
    dropout_members: bool = flag(
        False, "keep dropout active, of networks trained with it, so that masks differ by it too"
    )
    num_samples: int = flag(0, "first cases to segment; 0: all", least=0)
    job: str = flag(
        "", "part of the cases, as in 3/16: part 3 of 16 jobs that write into one out_dir"
    )
    batch_size: int = flag(0, "cases x masks at a time; 0: automatic", least=0, cap=MOST_INPUTS)
    sampler: str = flag(
        "",
        "sampler; empty: by dpm_solver and use_ddim, else DDPM; direct: one "
        "evaluation without a noisy mask",
        choices=("", "ddpm", "ddim", "direct", *SOLVERS),
    )
    steps: int = flag(0, "network evaluations per mask; 0: all timesteps, solvers 50", least=0)
    dpm_solver: bool = flag(False, "sample with DPM-Solver++")
    use_ddim: bool = flag(False, "sample with DDIM")
    eta: float = flag(0.0, "noise of DDIM: 0 is deterministic, 1 is that of DDPM", least=0, most=1)
    order: int = flag(
        2, "order of DPM-Solver and UniPC: 1, 2 or 3; sde_dpm_solver++ has 1 and 2", least=1, most=3
    )
    method: str = flag("multistep", "kind of DPM-Solver", choices=("multistep", "singlestep"))
    skip_type: str = flag(
        "time_uniform",
        "how DPM-Solver spaces its levels",
        choices=("time_uniform", "logSNR", "time_quadratic"),
    )
    temperature: float = flag(
        1.0, "scale of the noise a mask starts from; above 1 masks differ more", least=0
    )
    mask_guidance: float = flag(
        1.0,
        "how far the noisy mask is trusted, of networks trained with mask_dropout: below 1 masks "
        "differ less, above 1 more",
        least=0,
        most=100,
    )
    clip_denoised: bool = flag(True, "clip the predicted clean mask at every evaluation")
    fusion: str = flag(
        "mean",
        "fusion of masks; direct: mask of --sampler direct; squared_mean: MedSegDiff's staple",
        choices=("mean", "vote", "staple", "expected_dice", "direct", "squared_mean"),
    )
    mask_temperature: float = flag(
        1.0,
        "divides the log-odds of the fused mask, which changes no binary mask; 0: as the last "
        "validation of training fitted it",
        least=0,
        most=100,
    )
    uncertainty: str = flag(
        "std",
        "uncertainty map: std or variance of the members, or entropy (bits) of their mean",
        choices=("std", "variance", "entropy"),
    )
    coarse: str = flag(
        "none",
        "how the condition network's own mask joins each drawn one before they are fused: blend is "
        "MedSegDiff's rule, mean and logit average, only takes it alone",
        choices=("none", "blend", "mean", "logit", "only"),
    )
    largest: str = flag(
        "", "keep the largest component, 4- or 8-connected; empty: all", choices=("", "4", "8")
    )
    fill_holes: bool = flag(False, "fill the holes of masks")
    weights: str = flag("ema", "averaged or last weights", choices=("ema", "raw"))
    trained_steps: int = flag(
        0, "schedule length of bare weights; 0: 1000", least=0, cap=MOST_STEPS
    )
    save_members: bool = flag(True, "write the single masks too, as <case>_output<i>.png")
    writers: int = flag(0, "threads that write; 0: up to 4 beside a GPU, else 1", least=0, cap=64)
    debug: bool = flag(
        False,
        "write <case>_debug.png too, with channels, truth, fused mask and members, and "
        "<case>_members.gif, in which the members come out of noise",
    )
    dry_run: bool = flag(False, "do everything up to the first case, and write nothing", run=True)
    visdom: int = flag(
        0, "port of a visdom server on this machine to show masks on; 0: none", least=0, most=65535
    )


LATER: dict[str, Any] = {
    "mask_labels": "",
    "plane": "axial",
    "predict_v": False,
    "min_snr_gamma": 0.0,
    "mask_loss": "mse",
    "mask_dropout": 0.0,
    "noise_share": 0.0,
    "input_scale": 1.0,
    "coarse_loss": "none",
    "ss_blocks": 2,
    "rater_choice": "random",
}
"""Recorded flags that older checkpoints lack, with the values they were trained with."""
DIFFUSING = ("plain", "1", "new", "2")
"""The versions of the network that see a noisy mask."""
ONLY: dict[str, tuple[str, tuple[object, ...]]] = {
    "ss_blocks": ("version", ("2",)),
    "use_ddim": ("sampler", ("ddim",)),
    "dpm_solver": ("sampler", (*DPM_SOLVERS, "sde_dpm_solver++")),
    "eta": ("sampler", ("ddim",)),
    "order": ("sampler", SOLVERS),
    "skip_type": ("sampler", SOLVERS),
    "temperature": ("sampler", ("ddpm", "ddim", *SOLVERS)),
    "method": ("sampler", DPM_SOLVERS),
    "timestep_respacing": ("steps", (0,)),
    "sigma_small": ("use_ddim", (False,)),
    "noise_schedule": ("version", DIFFUSING),
    "rescale_timesteps": ("version", DIFFUSING),
    "schedule_sampler": ("version", DIFFUSING),
    "diffusion_steps": ("version", DIFFUSING),
    "noise_share": ("version", DIFFUSING),
    "input_scale": ("version", DIFFUSING),
    "use_scale_shift_norm": ("version", DIFFUSING),
    "val_steps": ("version", DIFFUSING),
}
"""Flags that have an effect only for some values of another flag: which flag, which values."""
TRAIN = (
    *(PresetOptions, DataOptions, NetworkOptions, DiffusionOptions, TrainingOptions, WatchOptions),
    *(LiveOptions, RunOptions),
)
SAMPLE = (
    *(PresetOptions, SampleDataOptions, NetworkOptions, DiffusionOptions, SamplingOptions),
    RunOptions,
)
ONLY_OF_FOLDERS = (
    *("data_dir", "data_name", "split", "slices", "blank_slices", "cache_dir"),
    *("out_dir", "multi_gpu", "model_path", "num_samples", "job", "debug", "dry_run", "visdom"),
    *("save_members", "writers"),
)
"""Flags of sampling that concern a data set and its results, not the model or one image."""


def dead_flags(flags: Flags, outcome: Mapping[str, Any] = {}) -> list[str]:
    """List the given flags that have no effect, each with the reason.

    ``outcome`` holds the final values of the flags in :data:`ONLY`, as far as they are known.
    """
    dead = [
        f"--{entry.name} has no effect: {entry.metadata['dead']}"
        for group in flags.groups
        for entry in fields(group)
        if entry.name in flags.given and entry.metadata["dead"]
    ]
    idle = [
        f"--{name} has no effect with --{other} {outcome[other]}"
        for name, (other, values) in ONLY.items()
        if flags.given.get(name, False) is not False and outcome.get(other, values[0]) not in values
    ]
    return dead + idle


Run = TypeVar("Run", bound=RunOptions)


def run_options(flags: Flags, kind: type[Run]) -> Run:
    """Make the options of a run, in which ``--use_fp16`` means ``--precision fp16``.

    Raises:
        UserError: another precision is given as well.
    """
    run = flags.group(kind)
    if run.use_fp16 and flags.get("precision", "fp16") != "fp16":
        raise UserError(
            f"--precision {run.precision}",
            "contradicts --use_fp16 True, which means --precision fp16",
            "Omit --use_fp16.",
        )
    return replace(run, precision="fp16") if run.use_fp16 else run
