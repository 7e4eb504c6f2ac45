"""Every command of the suite: its flags, its help, and what it does once the flags are read.

``guided-diffusion NAME``, ``python -m guided_diffusion NAME`` and the script of a command are the
same code. Nothing heavy is imported before the flags are read, so that ``-h`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from guided_diffusion.errors import UserError, did_you_mean, exit_on_user_error
from guided_diffusion.options.console import tolerant_console
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.parser import parse
from guided_diffusion.options.presets import naming_preset, with_preset
from guided_diffusion.options.reading import ReadingOptions
from guided_diffusion.options.scoring import SCORE
from guided_diffusion.options.segmentation import SAMPLE, TRAIN, RunOptions
from guided_diffusion.options.tools import (
    CHECK,
    EXPORT,
    PHANTOMS,
    SLICES,
    ConfigOptions,
    ExportOptions,
    PhantomOptions,
)
from guided_diffusion.options.weak import (
    SAMPLE_IMAGES,
    SEGMENT_WEAKLY,
    TRAIN_CLASSIFIER,
    TRAIN_IMAGES,
    WRITE_ARRAYS,
)

if TYPE_CHECKING:
    from guided_diffusion.training.resolve import TrainSetup


def train(flags: Flags) -> None:
    """Train a diffusion model that segments images, or a U-Net (--version unet)."""
    from guided_diffusion.inference.next_steps import after_training
    from guided_diffusion.training.resolve import resolve_training

    _run_training(resolve_training(flags), lambda: after_training(flags))


def _run_training(setup: TrainSetup, after: Callable[[], str]) -> None:
    """Train, or with ``--dry_run True`` do everything before that, and log what comes next."""
    from guided_diffusion import logger
    from guided_diffusion.tools.dry_run import rehearse_training
    from guided_diffusion.train_util import run_training

    if setup.options.dry_run:
        rehearse_training(setup)
    else:
        run_training(setup)
        logger.log(after())


def sample(flags: Flags) -> None:
    """Draw ensembles of masks from a trained model and fuse them."""
    from guided_diffusion.dist_util import setup_dist
    from guided_diffusion.inference.launching import launch
    from guided_diffusion.inference.predict import run_sampling
    from guided_diffusion.inference.resolve import resolve_sampling

    launch(flags.group(RunOptions).multi_gpu, flags.command)
    setup_dist()
    run_sampling(resolve_sampling(flags))


def score(flags: Flags) -> None:
    """Score predicted masks against the ground truth."""
    from guided_diffusion.tools.scoring import run_scoring

    for line in run_scoring(flags):
        print(line)


def check(flags: Flags) -> None:
    """Look at a data set as training would, and list everything that is wrong with it."""
    from guided_diffusion.tools.commands import run_check

    for line in run_check(flags):
        print(line)


def slices(flags: Flags) -> None:
    """Cut BraTS volumes into the two-dimensional layout, divided by patient."""
    from guided_diffusion.tools.commands import run_slicing

    _require(flags, "src", "out")
    for line in run_slicing(flags):
        print(line)


def phantoms(flags: Flags) -> None:
    """Write a folder of seeded phantoms in one of the layouts that the data sets have."""
    from guided_diffusion.tools.commands import write_phantoms

    _require(flags, "out")
    print(write_phantoms(flags.group(PhantomOptions)))


def export(flags: Flags) -> None:
    """Write the weights of a checkpoint alone, as safetensors or .pt."""
    from guided_diffusion.tools.commands import run_export

    print(run_export(flags.group(ExportOptions)))


def weak_train(flags: Flags) -> None:
    """Train a diffusion model of images that are labelled as a whole."""
    from guided_diffusion.inference.next_steps import after_weak_training
    from guided_diffusion.weak.train import resolve_images

    setup = resolve_images(flags)
    _run_training(setup, lambda: after_weak_training(flags, setup.recorded))


def weak_classifier(flags: Flags) -> None:
    """Train a classifier of noisy images that are labelled as a whole."""
    from guided_diffusion.inference.next_steps import after_weak_training
    from guided_diffusion.weak.train import resolve_classifier

    setup = resolve_classifier(flags)
    _run_training(setup, lambda: after_weak_training(flags, setup.recorded))


def weak_sample(flags: Flags) -> None:
    """Draw images from noise, with --guided led by a classifier."""
    from guided_diffusion.weak.commands import draw_images

    draw_images(flags)


def weak_segment(flags: Flags) -> None:
    """Segment images from their labels alone, and score the masks."""
    from guided_diffusion.weak.commands import segment_weakly

    segment_weakly(flags)


def weak_arrays(flags: Flags) -> None:
    """Write both branches of a diffusion and their difference as arrays."""
    from guided_diffusion.weak.arrays import write_arrays

    write_arrays(flags)


class Command(NamedTuple):
    """A command.

    Attributes:
        run: what it does; its docstring is the command's summary.
        groups: its option groups.
        scripts: the scripts that are this command.
        basic: the flags that ``-h`` shows.
        examples: of its flags.
    """

    run: Callable[[Flags], None]
    groups: tuple[type, ...]
    scripts: tuple[str, ...]
    basic: list[str]
    examples: tuple[str, ...]

    @property
    def summary(self) -> str:
        """What the command does, in one sentence."""
        return self.run.__doc__ or ""


def _command(
    run: Callable[[Flags], None], groups: tuple[type, ...], scripts: str, basic: str, *examples: str
) -> Command:
    reading = () if groups is PHANTOMS else (ReadingOptions,)
    groups = (*groups, *reading, ConfigOptions)
    return Command(run, groups, tuple(scripts.split()), basic.split(), examples)


_FIRST = "--data_dir data/training --out_dir results/first"
_SMALL = "--image_size 64 --num_channels 32 --batch_size 8 --max_steps 500"
_WEAK = "--src_dir data/weak --save_dir results/weak"

COMMANDS = {
    "train": _command(
        *(train, TRAIN, "segmentation_train"),
        "preset data_dir out_dir mask_labels image_size num_channels batch_size lr max_steps "
        "save_interval val_dir resume augment num_workers multi_gpu",
        f"{_FIRST} {_SMALL}",
        f"{_FIRST} --resume auto --max_steps 1000",
    ),
    "sample": _command(
        *(sample, SAMPLE, "segmentation_sample"),
        "preset model_path data_dir out_dir num_ensemble dpm_solver sampler steps fusion "
        "uncertainty num_samples batch_size seed multi_gpu",
        "--model_path results/first --data_dir data/testing --dpm_solver True --steps 10",
        "--model_path results/first --sampler ddim --steps 50 --num_ensemble 10",
    ),
    "score": _command(
        *(score, SCORE, "segmentation_env"),
        "inp_pth out_pth partial mask_labels empty tolerance raters compare report",
        "--inp_pth results/first --out_pth data/testing",
        "--compare results/first results/second --out_pth data/testing",
    ),
    "check": _command(
        *(check, CHECK, "check_data"),
        "data_dir data_name image_size mask_labels labelled split out",
        "--data_dir data/training --out sheet.png",
        "--data_dir data/testing --labelled False",
    ),
    "slices": _command(
        *(slices, SLICES, "brats_slices"),
        "src out slices blank_slices modalities normalise dtype train seed workers",
        "--src BraTS20 --out slices",
        "--src BraTS20 --out slices --modalities flair,t1ce --slices 60:120",
    ),
    "phantoms": _command(
        *(phantoms, PHANTOMS, "make_phantoms"),
        "out layout patients slices size raters generation split seed",
        "--out phantoms",
        "--out phantoms --layout isic --patients 40 --raters 3",
    ),
    "export": _command(
        *(export, EXPORT, "export_weights"),
        "model_path out weights precision training",
        "--model_path results/first --out first.safetensors",
        "--model_path results/first --weights raw --out first.pt",
    ),
    "weak-train": _command(
        *(weak_train, TRAIN_IMAGES, "train_tumor_ddfm train_2d_ddfm"),
        "preset src_dir out_dir class_cond image_size num_channels batch_size lr max_steps "
        "save_interval resume",
        f"{_WEAK} --class_cond True",
        f"{_WEAK} --class_cond True --resume auto",
    ),
    "weak-classifier": _command(
        *(weak_classifier, TRAIN_CLASSIFIER, "classifier_tumor_train classifier_train"),
        "preset src_dir out_dir model_type image_size classifier_width batch_size lr max_steps "
        "held_out",
        _WEAK,
        f"{_WEAK} --model_type resnet50",
    ),
    "weak-sample": _command(
        *(weak_sample, SAMPLE_IMAGES, "image_tumor_sample classifier_tumor_sample"),
        "out_dir model_path classifier_path guided classifier_scale class_index num_samples steps "
        "use_ddim seed",
        "--save_dir results/weak --num_samples 16",
        "--save_dir results/weak --guided --classifier_scale 10",
    ),
    "weak-segment": _command(
        *(weak_segment, SEGMENT_WEAKLY, "image_p_seg"),
        "preset src_dir out_dir method level steps guided num_samples results_dir",
        _WEAK,
        f"{_WEAK} --method gradcam",
    ),
    "weak-arrays": _command(
        *(weak_arrays, WRITE_ARRAYS, "image_p_sample"),
        "src_dir out_dir model_path classifier_path guided classifier_scale level steps "
        "class_index num_samples",
        _WEAK,
        f"{_WEAK} --guided --num_samples 4",
    ),
}


def main(name: str = "", argv: Sequence[str] | None = None) -> None:
    """Run a command, by its own name or that of one of its scripts.

    Without a name the first argument is the command. Bad input ends with exit code 2.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with tolerant_console(), exit_on_user_error():
        program = f"python scripts/{name}.py" if name else "guided-diffusion"
        if not name:
            if not words or words[0] in ("-h", "--help", "--about"):
                print(_about() if words[:1] == ["--about"] else _overview())
                return
            name = words.pop(0)
            program += f" {name}"
        by_script = {script: key for key, c in COMMANDS.items() for script in c.scripts}
        name = by_script.get(name, name)
        if name not in COMMANDS:
            raise UserError(
                name or "''",
                "there is no such command",
                did_you_mean(name, COMMANDS, "-h lists all commands."),
            )
        command = COMMANDS[name]
        flags = parse(
            command.groups,
            words,
            command=name,
            program=program,
            summary=command.summary,
            basic=command.basic,
            examples=[f"{program} {example}" for example in command.examples],
        )
        if flags.get("about"):
            print(_about())
            return
        flags = _configured(flags, name)
        if ReadingOptions in flags.groups:
            from guided_diffusion.data.limits import set_limit

            set_limit(flags.group(ReadingOptions).max_read_gib)
        with naming_preset(flags):
            command.run(flags)


def _configured(flags: Flags, name: str) -> Flags:
    """Add the flags of ``--config`` and those of ``--preset``; the command line's win over both."""
    given = dict(flags.given)
    path = given.pop("config", "")
    groups = tuple(group for group in flags.groups if group is not ConfigOptions)
    if path:
        from guided_diffusion.options.config import read_config

        given = {**read_config(path, name, groups, commands=tuple(COMMANDS)), **given}
    return with_preset(replace(flags, groups=groups, given=given), name)


def _overview() -> str:
    """The commands, a line each."""
    lines = [f"  {name:<16} {command.summary}" for name, command in COMMANDS.items()]
    usage = "usage: guided-diffusion COMMAND [flags]"
    more = "guided-diffusion COMMAND -h shows the flags; --about shows version, torch and device."
    return "\n".join([usage, "", *lines, "", more])


def _about() -> str:
    """Version, torch and device."""
    import torch

    from guided_diffusion import __version__
    from guided_diffusion.dist_util import describe, dev

    return f"guided-diffusion {__version__}, torch {torch.__version__}, {describe(dev())}"


def _require(flags: Flags, *names: str) -> None:
    """Raise a UserError for the first flag that was not given."""
    for name in names:
        if not flags.get(name):
            raise UserError(f"--{name}", "is missing", f"Name a folder with --{name}.")
