"""The composition root: from flags to networks, diffusions, data and runs.

The one place that knows every name. ``create_model_and_diffusion`` and its parts build objects from
flags; :func:`train`, :func:`sample` and :func:`score` are what the three scripts do after parsing.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from guided_diffusion import logger
from guided_diffusion.checkpoint import (
    LATEST,
    Checkpoint,
    Weights,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
)
from guided_diffusion.datasets import (
    Frame,
    Framed,
    Remembered,
    SegmentationDataset,
    auto_frame,
)
from guided_diffusion.dist_util import describe, dev
from guided_diffusion.dpm_solver import solver_levels
from guided_diffusion.errors import UserError
from guided_diffusion.evaluate import evaluate, report
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.layouts import open_dataset
from guided_diffusion.options import (
    SAMPLE,
    TRAIN,
    DataOptions,
    DiffusionOptions,
    NetworkOptions,
    RunOptions,
    SampleDataOptions,
    SamplingOptions,
    ScoringOptions,
    TrainingOptions,
    dead_flags,
    fill,
    numbers,
    recorded,
    refuse_contradictions,
)
from guided_diffusion.predict import Plan, Segmenter, segment
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.respace import space_timesteps
from guided_diffusion.schedule import NoiseLevel, NoiseSchedule
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.unet import UNetModel

NUM_CLASSES = 2

_CHANNEL_MULT = {
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}


def create_model_and_diffusion(**flags: Any) -> tuple[UNetModel, GaussianDiffusion]:
    """Build network and diffusion from the scripts' flags; what is not given has its default.

    Raises:
        UserError: flags that no network or schedule can have.
        TypeError: a name that is no flag of network or diffusion.
    """
    network, diffusion = fill(NetworkOptions, flags), fill(DiffusionOptions, flags)
    unknown = flags.keys() - vars(network).keys() - vars(diffusion).keys()
    if unknown:
        raise TypeError(f"no such network or diffusion flag: {', '.join(sorted(unknown))}")
    return create_model(network, diffusion), create_gaussian_diffusion(diffusion)


def create_model(network: NetworkOptions, diffusion: DiffusionOptions) -> UNetModel:
    """Build the network."""
    channel_mult = _channel_mult(network)
    return UNetModel(
        image_size=network.image_size,
        in_channels=network.in_ch,
        model_channels=network.num_channels,
        out_channels=2 if diffusion.learn_sigma else 1,
        num_res_blocks=network.num_res_blocks,
        attention_resolutions=_attention_ds(network),
        dropout=network.dropout,
        channel_mult=channel_mult,
        num_classes=NUM_CLASSES if network.class_cond else None,
        use_checkpoint=network.use_checkpoint,
        num_heads=network.num_heads,
        num_head_channels=network.num_head_channels,
        num_heads_upsample=network.num_heads_upsample,
        use_scale_shift_norm=network.use_scale_shift_norm,
        resblock_updown=network.resblock_updown,
        use_new_attention_order=network.use_new_attention_order,
    )


def create_gaussian_diffusion(options: DiffusionOptions) -> GaussianDiffusion:
    """Build the diffusion; respacing chooses the times that are trained."""
    schedule = NoiseSchedule.named(options.noise_schedule, options.diffusion_steps)
    kept = space_timesteps(options.diffusion_steps, options.timestep_respacing)
    return GaussianDiffusion(
        schedule=schedule,
        timesteps=tuple(sorted(kept)),
        predict_xstart=options.predict_xstart,
        learn_sigma=options.learn_sigma,
        use_kl=options.use_kl,
        rescale_learned_sigmas=options.rescale_learned_sigmas,
        rescale_timesteps=options.rescale_timesteps,
        mask_range=_mask_range(options.mask_range),
    )


def _channel_mult(network: NetworkOptions) -> list[float]:
    """The width of each level; sizes between the parents' take the next larger one's."""
    given = numbers("channel_mult", network.channel_mult, float)
    table = next((m for size, m in _CHANNEL_MULT.items() if network.image_size <= size), None)
    mult = given or list(table or _CHANNEL_MULT[256])
    halvings = len(mult) - 1
    if network.image_size < 1 or network.image_size % 2**halvings:
        step = 2**halvings
        nearest = max(step, round(network.image_size / step) * step)
        raise UserError(
            "--image_size",
            found=network.image_size,
            expected=f"a multiple of {step}, for the network halves it {halvings} times",
            mend=f"Use --image_size {nearest}, or fewer levels with --channel_mult.",
        )
    for width in (network.num_channels * factor for factor in mult):
        if width % 32 or width < 32:
            raise UserError(
                "--num_channels",
                found=f"{network.num_channels}, which makes a level {width:g} channels wide",
                expected="every level's width to be a multiple of 32 (32 groups are normalised)",
                mend="Use --num_channels 32, 64, 96 or 128.",
            )
    return mult


def _attention_ds(network: NetworkOptions) -> set[int]:
    """Downsampling factors with attention: image_size // resolution, as published weights have."""
    resolutions = numbers("attention_resolutions", network.attention_resolutions)
    if any(resolution < 1 for resolution in resolutions):
        raise UserError(
            "--attention_resolutions",
            found=network.attention_resolutions,
            expected="sizes of feature maps, 1 or more",
            mend="Write for example --attention_resolutions 16,8.",
        )
    return {network.image_size // resolution for resolution in resolutions}


def _mask_range(text: str) -> tuple[float, float]:
    values = numbers("mask_range", text, float)
    if len(values) != 2 or values[0] >= values[1]:
        raise UserError(
            "--mask_range", found=text, expected="two rising numbers", mend="Use 0,1 or -1,1."
        )
    return values[0], values[1]


def train(typed: dict[str, Any]) -> None:
    """Train on a data set: what ``segmentation_train.py`` does with the flags typed."""
    options, run, data = (
        fill(TrainingOptions, typed),
        fill(RunOptions, typed),
        fill(DataOptions, typed),
    )
    options, run = _settled(options, typed), _with_precision(run)
    dataset = open_dataset(data.data_dir, data_name=data.data_name)
    path, start = _checkpoint_to_resume(options, run)
    trained = start.options if start else {}
    refuse_contradictions(typed, trained, path)
    network = _network_for(dataset, {**typed, **trained}, path)
    diffusion = fill(DiffusionOptions, {**typed, **trained})
    frame, crop = _frame(dataset, network, {**typed, **trained})

    device = dev(run.gpu_dev)
    torch.manual_seed(run.seed)
    net = create_model(network, diffusion)
    if start:
        load_weights(net, start.model, path)
    process = create_gaussian_diffusion(diffusion)
    loop = TrainLoop(
        _placed(net, device),
        process,
        dataset=Remembered(Framed(dataset, frame)),
        schedule_sampler=create_named_schedule_sampler(options.schedule_sampler, len(process.kept)),
        options=options,
        run=run,
        recorded={**recorded(network, diffusion), "crop": crop},
    )
    logger.configure(run.out_dir)
    for note in dead_flags(TRAIN, typed):
        logger.log(note)
    if start:
        loop.restore(start)
        logger.log(f"resuming {path} at step {start.step}")
    logger.log(
        f"{len(dataset)} {dataset.layout} cases, {dataset.channels} channels, {data.data_dir}; "
        f"{_million(net)} on {describe(device)}, {run.precision}; "
        f"steps {loop.step} to {loop.last_step or 'no end'}"
    )
    loop.run_loop()


def sample(typed: dict[str, Any]) -> None:
    """Draw, fuse and write masks: what ``segmentation_sample.py`` does with the flags typed."""
    options, data = fill(SamplingOptions, typed), fill(SampleDataOptions, typed)
    out_dir = Path(fill(RunOptions, typed).out_dir).expanduser()
    for note in dead_flags(SAMPLE, typed):
        logger.log(note)
    dataset = open_dataset(data.data_dir, data_name=data.data_name, test=True)
    segmenter, fingerprint = load_segmenter(dataset, typed)
    names = segment(
        segmenter,
        dataset,
        out_dir,
        fingerprint=fingerprint,
        num_samples=options.num_samples,
    )
    logger.log(
        f"{len(names)} cases in {out_dir}: <case>_mask.png, <case>_output_ens.png, "
        "<case>_uncertainty.png, <case>_overlay.png, <case>_output<i>.png, predictions.csv"
    )


def load_segmenter(dataset: SegmentationDataset, typed: dict[str, Any]) -> tuple[Segmenter, str]:
    """Load a trained model as the sampling flags say, for the cases of a data set.

    Returns:
        What draws masks, and a fingerprint of everything its masks depend on.
    """
    options, run = fill(SamplingOptions, typed), _with_precision(fill(RunOptions, typed))
    path = latest_checkpoint(options.model_path)
    checkpoint = load_checkpoint(path)
    flags = _trained_flags(checkpoint, typed, path)
    network = _network_for(dataset, flags, path if checkpoint.options else None)
    diffusion = fill(DiffusionOptions, flags)
    frame, _ = _frame(dataset, network, flags)
    process = create_gaussian_diffusion(diffusion)

    device = dev(run.gpu_dev)
    plan = _plan(options, run, process, typed, device=device, own=bool(checkpoint.options))
    net = create_model(network, diffusion)
    weights, which = checkpoint.choose(options.weights)
    load_weights(net, weights, path)
    logger.log(
        f"{path}: {which}; {_million(net)} on {describe(device)}, {plan.precision}\n"
        f"{len(dataset)} {dataset.layout} cases, {dataset.channels} channels, "
        f"{dataset.directory}\n{plan.num_ensemble} masks a case by {plan.sampler}, "
        f"{plan.evaluations} evaluations each; {plan.fusion}, seed {plan.seed}"
    )
    return Segmenter(_placed(net, device), process, frame=frame, plan=plan), _fingerprint(
        weights, plan, frame
    )


def score(typed: dict[str, Any]) -> None:
    """Score masks against the truth: what ``segmentation_env.py`` does with the flags typed."""
    options = fill(ScoringOptions, typed)
    summary = evaluate(options.inp_pth, options.out_pth, partial=options.partial)
    print(report(summary))
    print(
        f"written: {Path(options.inp_pth) / 'summary.json'}, {Path(options.inp_pth) / 'scores.csv'}"
    )
    overlays = sorted(Path(options.inp_pth).expanduser().glob("*_overlay.png"))
    if overlays:
        print(f"look at: {overlays[0]} and {len(overlays) - 1} more")


def _settled(options: TrainingOptions, typed: dict[str, Any]) -> TrainingOptions:
    """Where only ``--lr_anneal_steps`` is typed, it says when to stop; refuse impossible values."""
    for name in ("batch_size", "log_interval", "save_interval"):
        if getattr(options, name) < 1:
            raise UserError(
                f"--{name}",
                found=getattr(options, name),
                expected="1 or more",
                mend=f"Leave --{name} away for its default.",
            )
    if options.lr_anneal_steps and "max_steps" not in typed:
        return replace(options, max_steps=options.lr_anneal_steps)
    return options


def _with_precision(run: RunOptions) -> RunOptions:
    return replace(run, precision="fp16") if run.use_fp16 else run


def _checkpoint_to_resume(
    options: TrainingOptions, run: RunOptions
) -> tuple[Path | None, Checkpoint | None]:
    """Find what to continue from: a named checkpoint, or, with resume auto, the folder's own."""
    own = Path(run.out_dir).expanduser() / LATEST
    if options.resume_checkpoint:
        path = latest_checkpoint(options.resume_checkpoint, flag="--resume_checkpoint")
    elif own.exists() and options.resume == "auto":
        path = own
    else:
        if own.exists():
            logger.log(f"{own} exists and will be overwritten; --resume auto would continue it")
        return None, None
    return path, load_checkpoint(path)


def _trained_flags(checkpoint: Checkpoint, typed: dict[str, Any], path: Path) -> dict[str, Any]:
    """What network, diffusion and data were trained with: the checkpoint's word, else the flags'.

    In sampling, ``--diffusion_steps`` and ``--timestep_respacing`` count evaluations and do not
    describe the training.
    """
    describing = {
        k: v for k, v in typed.items() if k not in ("diffusion_steps", "timestep_respacing")
    }
    steps = typed.get("trained_steps", 0)
    if checkpoint.options:
        told = describing | ({"diffusion_steps": steps} if steps else {})
        refuse_contradictions(told, checkpoint.options, path)
        return {**typed, **checkpoint.options}
    logger.log(
        f"{path} holds bare weights: network and diffusion are taken from the flags, trained on "
        f"{steps or 1000} steps{'' if steps else ' (assumed; --trained_steps says otherwise)'}"
    )
    return {**describing, "diffusion_steps": steps or 1000}


def _network_for(
    dataset: SegmentationDataset, flags: dict[str, Any], path: Path | None
) -> NetworkOptions:
    """The network for a data set's channels; refuse what cannot segment it."""
    expected = dataset.channels + 1
    if flags.get("in_ch", expected) != expected:
        raise UserError(
            path or "--in_ch",
            found=f"a network of {flags['in_ch']} input channels",
            expected=f"{expected}: {dataset.channels} of the images in {dataset.directory} "
            "and the noisy mask",
            mend="Use data with the channels of training." if path else "Leave --in_ch away.",
        )
    if flags.get("class_cond"):
        raise UserError(
            "--class_cond",
            found="True",
            expected="False",
            mend="Segmentation has no class labels to condition on.",
        )
    return fill(NetworkOptions, {**flags, "in_ch": expected})


def _frame(
    dataset: SegmentationDataset, network: NetworkOptions, flags: dict[str, Any]
) -> tuple[Frame, str]:
    """How cases reach the network's size, and the word for it that a checkpoint remembers."""
    height, width = dataset[0].image.shape[-2:]
    frame = auto_frame(
        dataset.layout,
        (height, width),
        version=network.version,
        image_size=network.image_size,
        crop=flags.get("crop", "auto"),
    )
    return frame, "wolleb" if frame.crop else "none"


def _plan(
    options: SamplingOptions,
    run: RunOptions,
    diffusion: GaussianDiffusion,
    typed: dict[str, Any],
    *,
    device: torch.device,
    own: bool,
) -> Plan:
    """Settle how masks are drawn."""
    sampler = options.sampler or (
        "dpm_solver++" if options.dpm_solver else "ddim" if options.use_ddim else "ddpm"
    )
    clip = (diffusion.mask_range if own else (-1.0, 1.0)) if options.clip_denoised else None
    if options.num_ensemble < 1:
        raise UserError(
            "--num_ensemble", found=options.num_ensemble, expected="1 or more", mend="Use 5."
        )
    levels = sampling_levels(diffusion.schedule, sampler, options, typed)
    if options.method == "singlestep" and sampler.startswith("dpm_solver"):
        sampler += "_singlestep"
    keywords = {
        "ddpm": {},
        "ddim": {"eta": options.eta},
    }.get(sampler, {"order": options.order})
    return Plan(
        sampler=sampler,
        levels=tuple(levels),
        options=keywords,
        clip=clip,
        num_ensemble=options.num_ensemble,
        fusion=options.fusion,
        seed=run.seed,
        batch_size=options.batch_size or (8 if device.type == "cpu" else 32),
        precision=run.precision,
    )


def sampling_levels(
    schedule: NoiseSchedule, sampler: str, options: SamplingOptions, typed: dict[str, Any]
) -> list[NoiseLevel]:
    """Choose the levels of a run on the trained schedule.

    ``--steps`` counts evaluations and wins; then ``--timestep_respacing``, then a typed
    ``--diffusion_steps``; else DDPM and DDIM visit every trained time and DPM-Solver 50.

    Raises:
        UserError: more evaluations than trained times, or fewer than 1.
    """
    total, solver = len(schedule), sampler.startswith("dpm_solver")
    spec = typed.get("timestep_respacing", "")
    count = options.steps or (0 if spec else typed.get("diffusion_steps", 0))
    if not 0 <= count <= total:
        raise UserError(
            "--steps" if options.steps else "--diffusion_steps",
            found=count,
            expected=f"between 1 and {total}, the length of the trained schedule",
            mend="Ask for fewer evaluations; --trained_steps states the schedule of bare weights.",
        )
    if solver:
        evaluations = count or len(space_timesteps(total, spec or [min(50, total)]))
        return solver_levels(
            schedule,
            evaluations,
            order=options.order,
            method=options.method,
            skip_type=options.skip_type,
        )
    if count == 1:
        return schedule.levels([total - 1])
    kept = space_timesteps(total, [count] if count else spec)
    return schedule.levels(sorted(kept, reverse=True))


def _fingerprint(weights: Weights, plan: Plan, frame: Frame) -> str:
    """Everything that the masks depend on, in 16 hexadecimal digits."""
    digest = hashlib.sha256(repr((replace(plan, batch_size=0), frame)).encode())
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _placed(net: UNetModel, device: torch.device) -> UNetModel:
    """Move a network to its device, in the memory order that convolutions are fastest in."""
    return net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _million(net: UNetModel) -> str:
    return f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} million parameters"
