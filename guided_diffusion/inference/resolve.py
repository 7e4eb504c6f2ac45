"""Resolve flags into everything that sampling needs: checkpoint, options and data.

A checkpoint brings its own flags; a given flag that contradicts them is refused. In sampling,
``--diffusion_steps`` and ``--timestep_respacing`` count network evaluations and do not describe the
training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from guided_diffusion.data.classes import Classes, find_classes
from guided_diffusion.data.datasets import SegmentationDataset, readable
from guided_diffusion.data.frames import WOLLEB_CROP, Frame
from guided_diffusion.data.jobs import Job, parse_job
from guided_diffusion.errors import UserError
from guided_diffusion.inference.plan import sampler_of
from guided_diffusion.inference.trained import (
    Trained,
    disagreement_error,
    load_agreeing,
    with_own_preset,
)
from guided_diffusion.layouts import open_data
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.network import DiffusionOptions, NetworkOptions
from guided_diffusion.options.objective import resolve_objective
from guided_diffusion.options.presets import preset_notes, suggest_preset
from guided_diffusion.options.segmentation import (
    RunOptions,
    SampleDataOptions,
    SamplingOptions,
    dead_flags,
    run_options,
)
from guided_diffusion.script_util import frame_for, network_for


@dataclass(frozen=True)
class NetworkSetup:
    """One of the networks that draw.

    Attributes:
        trained: the checkpoint.
        options: how its masks are drawn; ``steps`` counts evaluations, 0 for the sampler's default.
        network: of the checkpoint.
        diffusion: that it was trained for.
    """

    trained: Trained
    options: SamplingOptions
    network: NetworkOptions
    diffusion: DiffusionOptions

    @property
    def members(self) -> int:
        """Masks that it draws for a case."""
        return self.options.num_ensemble * (2 if self.options.flip_members else 1)


@dataclass(frozen=True)
class SampleSetup:
    """Everything that sampling needs.

    Attributes:
        networks: those that draw, one or more.
        options: of the run.
        respacing: ``--timestep_respacing`` of this run, where it was given.
        run: folder, seed, device and precision.
        job: which part of the cases is drawn; None for all.
        classes: what the mask's channels are; None for one of everything.
        frame: how cases reach the networks' size.
        normalise: how the pixels of files were scaled in training.
        dataset: the cases to segment; None if only the model is needed.
        notes: messages to log before anything is drawn.
    """

    networks: tuple[NetworkSetup, ...]
    options: SamplingOptions
    respacing: str
    run: RunOptions
    job: Job | None
    classes: Classes | None
    frame: Frame
    normalise: str
    dataset: SegmentationDataset | None
    notes: tuple[str, ...]


def resolve_sampling(flags: Flags, *, model: str | Sequence[str] | None = None) -> SampleSetup:
    """Make the set-up of sampling; if ``model`` is given, it is loaded and no data are opened.

    ``model`` is one path, several separated by commas, or a list.

    Raises:
        UserError: flags, checkpoints and data that do not belong together.
    """
    path = flags.group(SamplingOptions).model_path if model is None else model
    flags, own_preset = with_own_preset(flags, path)
    run = run_options(flags, RunOptions)
    job = parse_job(flags.group(SamplingOptions).job)
    flag = "--model_path" if model is None else "path"
    loaded = load_agreeing(path, flags, flag=flag)
    known = loaded[0].flags
    versions = {one.flags.get("version") for one in loaded}
    preset = own_preset + preset_notes(known)
    preset += suggest_preset(flags, loaded[0].checkpoint.run, SamplingOptions)
    if flags.preset and versions == {"unet"}:
        flags = replace(flags, preset={})
        preset = ["--preset has no effect: it concerns a diffusion, not a plain U-Net"]
    options = flags.group(SamplingOptions)
    dataset = None
    if model is None:
        dataset = open_data(known.group(SampleDataOptions), part="testing", test=True)
    chosen = replace(
        options,
        steps=chosen_steps(flags, options.steps),
        mask_temperature=options.mask_temperature or _fitted_temperature(loaded),
    )
    networks = []
    for one in loaded:
        network = (
            one.flags.group(NetworkOptions)
            if dataset is None
            else network_for(dataset, one.flags, one.path if one.is_own else None)
        )
        _refuse_coarse(options, network)
        _refuse_no_dropout(options, network, one.path)
        diffusion = resolve_objective(one.flags, network.version)
        mixed = len(versions) > 1 and "unet" in versions
        alone = len(loaded) == 1
        own = _of_one_answer(chosen, flags, network, diffusion, one.path, mixed=mixed, alone=alone)
        networks.append(NetworkSetup(one, own, network, diffusion))
    normalise = known.get("normalise", "auto")
    return SampleSetup(
        networks=tuple(networks),
        options=options,
        respacing=flags.given.get("timestep_respacing", ""),
        run=run,
        job=job,
        classes=find_classes(known.get("mask_labels", "")),
        frame=_common_frame(dataset, networks),
        normalise="none" if normalise == "auto" else normalise,
        dataset=dataset,
        notes=(*preset, *_dead_for_all(flags, networks), *(dataset.notes if dataset else ())),
    )


def _common_frame(dataset: SegmentationDataset | None, networks: Sequence[NetworkSetup]) -> Frame:
    """Choose how cases reach the networks' size, which must be the same for all of them."""
    case = None
    if dataset is not None:
        case = next(readable(dataset, range(len(dataset))), None) or dataset[0]
    frames = []
    for one in networks:
        crop = one.trained.flags.get("crop", "auto")
        if dataset is None or case is None:
            size = one.network.image_size
            frames.append(Frame(size, WOLLEB_CROP if crop == "wolleb" else 0))
        else:
            frames.append(frame_for(dataset, one.network, crop, case=case)[0])
    for one, frame in zip(networks, frames, strict=True):
        if frame != frames[0]:
            crops = ("wolleb" if own.crop else "none" for own in (frame, frames[0]))
            raise disagreement_error(one.trained.path, networks[0].trained.path, "crop", *crops)
    return frames[0]


def _dead_for_all(flags: Flags, networks: Sequence[NetworkSetup]) -> list[str]:
    """List the given flags that have no effect on any of the networks."""
    dead = []
    for one in networks:
        sampler = sampler_of(one.options)
        outcome = {**vars(one.options), "sampler": sampler, "version": one.network.version}
        dead.append(dead_flags(flags, outcome))
    names = [{note.split()[0] for note in notes} for notes in dead]
    return [note for note in dead[0] if all(note.split()[0] in own for own in names)]


def chosen_steps(flags: Flags, steps: int) -> int:
    """Count the network evaluations that the flags ask for; 0 where they leave it open.

    ``--steps`` wins, then ``--timestep_respacing`` (which leaves the count open), then a given
    ``--diffusion_steps``.
    """
    respaced = flags.given.get("timestep_respacing", "")
    return steps or (0 if respaced else flags.given.get("diffusion_steps", 0))


def _fitted_temperature(loaded: Sequence[Trained]) -> float:
    """Return the temperature of fused masks that the last validation of training fitted.

    Raises:
        UserError: there was no validation, or the masks of several weights are fused.
    """
    trained, *others = loaded
    if others:
        raise UserError(
            "--mask_temperature 0",
            "asks for the temperature of one training, but there are several weights",
            "Name the temperature, or one of the weights.",
        )
    fitted = trained.checkpoint.training.get("best", {}).get("mask_temperature")
    if not isinstance(fitted, float):
        raise UserError(
            "--mask_temperature 0",
            f"{trained.path} holds no temperature: none was fitted, as without validation",
            "Train with --val_dir, or omit --mask_temperature.",
        )
    return fitted


def _of_one_answer(
    options: SamplingOptions,
    flags: Flags,
    network: NetworkOptions,
    diffusion: DiffusionOptions,
    path: Path,
    *,
    mixed: bool = False,
    alone: bool = True,
) -> SamplingOptions:
    """Settle how the one answer without a noisy mask is asked for, where that is meant.

    A plain U-Net has no other answer. One answer makes one member, unless dropout makes more. Where
    U-Nets and diffusions are ``mixed``, flags of a diffusion are not meant for the U-Nets. Weights
    that are ``alone`` make one mask, whose uncertainty is its entropy.

    Raises:
        UserError: flags that only a diffusion can have, or an answer that the network cannot give.
    """
    is_unet = network.version == "unet"
    if is_unet and mixed:
        options = replace(options, sampler="direct", steps=0)
    elif is_unet:
        walks = {
            "sampler": options.sampler not in ("", "direct"),
            "use_ddim": options.use_ddim,
            "dpm_solver": options.dpm_solver,
            "eta": bool(options.eta),
            "timestep_respacing": bool(flags.given.get("timestep_respacing")),
            "mask_guidance": options.mask_guidance != 1,
            "temperature": options.temperature != 1,
        }
        for name in (name for name, given in walks.items() if given):
            raise UserError(
                f"--{name} {flags.given.get(name, getattr(options, name, ''))}",
                f"concerns a diffusion, but {path} is a plain U-Net (--version unet), which has "
                "one answer and draws no noise",
                f"Omit --{name}.",
            )
        options = replace(options, sampler="direct")
    elif not diffusion.mask_dropout:
        for name, asked in (
            ("sampler", options.sampler == "direct"),
            ("mask_guidance", options.mask_guidance != 1),
        ):
            if asked:
                raise UserError(
                    f"--{name} {getattr(options, name)}",
                    f"needs the answer without a noisy mask, but {path} was trained with one in "
                    "every draw",
                    "Train with --mask_dropout 0.5; --steps 1 --use_ddim True is one evaluation "
                    "from noise.",
                )
    if options.sampler != "direct":
        return options
    cause = f"{path} is a plain U-Net, which" if is_unet else "--sampler direct"
    other = "" if is_unet else ", or --sampler direct"
    if options.steps > 1:
        name = "steps" if flags.given.get("steps") else "diffusion_steps"
        raise UserError(
            f"--{name} {options.steps}",
            f"{cause} answers in one evaluation, without a noisy mask",
            f"Omit --{name}{other}.",
        )
    if options.mask_guidance != 1 and not is_unet:
        raise UserError(
            f"--mask_guidance {options.mask_guidance}",
            "says how far the noisy mask is trusted, which --sampler direct withholds",
            "Omit one of the two.",
        )
    if options.dropout_members:
        return options
    if options.num_ensemble > 1 and "num_ensemble" in flags.given and not (is_unet and mixed):
        raise UserError(
            f"--num_ensemble {options.num_ensemble}",
            f"{cause} draws no noise, so that all masks would be equal",
            f"Omit --num_ensemble{other}. Further masks come from --flip_members True, several "
            "weights in --model_path, and --dropout_members True after training with --dropout.",
        )
    if alone and not options.flip_members and "uncertainty" not in flags.given:
        options = replace(options, uncertainty="entropy")  # the deviation of one mask is 0
    return replace(options, num_ensemble=1, steps=1)


def _refuse_no_dropout(options: SamplingOptions, network: NetworkOptions, path: Path) -> None:
    """Raise a UserError where dropout is asked for and the network was trained without."""
    if options.dropout_members and not network.dropout:
        raise UserError(
            "--dropout_members True",
            f"{path} was trained without dropout, or does not say at which rate",
            "Train with --dropout 0.1; for weights that do not say it, give the --dropout of their "
            "training.",
        )


def _refuse_coarse(options: SamplingOptions, network: NetworkOptions) -> None:
    """Raise a UserError where a coarse mask is asked for and there is none."""
    if options.coarse != "none" and network.version in ("plain", "unet"):
        raise UserError(
            f"--coarse {options.coarse}",
            f"the {network.version} network has no coarse mask",
            "Omit --coarse.",
        )
