"""Trained networks, mostly one, that turn images into ensembles of masks.

The noise of mask i of case c depends on the seed, c and i alone, for any batch size, order or
device; its values differ by rounding alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.checkpoint import (
    adapt_weights,
    fitting_weights,
    load_weights,
    missing_weights_note,
)
from guided_diffusion.data.batches import collate
from guided_diffusion.data.classes import Classes
from guided_diffusion.data.datasets import Case
from guided_diffusion.data.folders import counted, is_nifti, split_name
from guided_diffusion.data.frames import Frame
from guided_diffusion.data.geometry import place
from guided_diffusion.data.readers import read_grid
from guided_diffusion.dist_util import compiling, describe, dev, place_model
from guided_diffusion.ensemble import UNCERTAINTIES, blend_coarse, fusion, mean
from guided_diffusion.errors import UserError, memory_problem, python_names
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.inference.drawing import (
    Draws,
    StepCallback,
    TrainedNetwork,
    draw_all,
    joined,
)
from guided_diffusion.inference.inputs import ImageLike, pixels_of
from guided_diffusion.inference.plan import (
    SamplingPlan,
    halved,
    make_plan,
    within_memory,
)
from guided_diffusion.inference.precision import set_up_kernels
from guided_diffusion.inference.resolve import NetworkSetup, SampleSetup, resolve_sampling
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.nn import AttentionBlock, Dropout
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.presets import with_preset
from guided_diffusion.options.segmentation import ONLY_OF_FOLDERS, SAMPLE
from guided_diffusion.schedule import NoiseLevel
from guided_diffusion.scoring.components import clean_soft, temper_soft
from guided_diffusion.script_util import create_gaussian_diffusion, create_model, parameter_count
from guided_diffusion.unet import UNetModel


class Segmenter:
    """A trained network that turns images into :class:`Segmentation` s.

    Args:
        net: on its device; put into evaluation mode.
        diffusion: that it was trained for.
        frame: how cases reach the network's size.
        plan: how masks are drawn.
        source: where the weights are from, for the log.
        classes: what the mask's channels are; None for one of everything.
        normalise: how the pixels of files were scaled in training: a name of
            :data:`guided_diffusion.data.intensity.NORMALISATIONS`.
        others: further networks for the same images and classes, whose masks join the ensemble.
    """

    def __init__(
        self,
        net: UNetModel,
        diffusion: GaussianDiffusion,
        *,
        frame: Frame,
        plan: SamplingPlan,
        source: str = "",
        classes: Classes | None = None,
        normalise: str = "none",
        others: Sequence[TrainedNetwork] = (),
    ) -> None:
        self.net = net.eval()
        self.others = tuple(other._replace(net=other.net.eval()) for other in others)
        self.diffusion = diffusion
        self.frame = frame
        self.plan = plan
        self.source = source
        self.classes = classes
        self.normalise = normalise
        self.device = next(net.parameters()).device
        self.halved = False

    @classmethod
    @python_names()
    def load(cls, path: str | Path | Sequence[str | Path], **flags: Any) -> Segmenter:
        """Load a checkpoint, or a folder's latest one, or several.

        Args:
            path: of the checkpoint, or the name of weights that come with the package, such as
                ``isic-small``; several as a list, or separated by commas.
            flags: those of ``segmentation_sample.py`` that concern the model and the drawing, by
                name, such as ``sampler="dpm_solver++"``, ``steps=10``, ``num_ensemble=5``,
                ``seed=10``; for bare weights also the network's.

        Raises:
            UserError: no checkpoint there, an unknown flag or value, or one that contradicts the
                checkpoint.
        """
        given = with_preset(Flags.of(SAMPLE, without=ONLY_OF_FOLDERS, **flags), "sample")
        model = [*map(str, path)] if isinstance(path, (list, tuple)) else str(path)
        return cls.from_setup(resolve_sampling(given, model=model))

    @classmethod
    def from_setup(cls, setup: SampleSetup) -> Segmenter:
        """Build the networks of a set-up, ready to draw.

        Raises:
            UserError: weights that do not fit the network, or a plan that the network cannot have.
        """
        built: list[TrainedNetwork] = []
        for one in setup.networks:
            built.append(_build(one, setup, batch_size=built[-1].plan.batch_size if built else 0))
        first, *others = built
        return cls(
            first.net,
            first.diffusion,
            frame=setup.frame,
            plan=first.plan,
            source=first.source,
            classes=setup.classes,
            normalise=setup.normalise,
            others=others,
        )

    @property
    def networks(self) -> tuple[TrainedNetwork, ...]:
        """All networks, in the order in which their members are numbered."""
        return (TrainedNetwork(self.net, self.diffusion, self.plan, self.source), *self.others)

    @property
    def evaluations(self) -> int:
        """Network evaluations of a case."""
        return sum(plan.members * plan.evaluations for _, _, plan, _ in self.networks)

    def __str__(self) -> str:
        plan = self.plan
        coarse = "" if plan.coarse == "none" else f"coarse mask: {plan.coarse}, "
        weights = (f"{source}; {parameter_count(net)}" for net, _, _, source in self.networks)
        draws = [_drawing_text(own) for _, _, own, _ in self.networks]
        if self.others:
            equal = len({*draws}) == 1
            draws = [f"{draws[0]}, of each weights"] if equal else [*draws, "in this order"]
        return (
            f"{'; '.join(weights)} on {describe(self.device)}, {plan.precision}; "
            f"{', '.join(draws)}, "
            f"{coarse}{_fusion_text(plan)}, seed {plan.seed}"
        )

    @property
    def fingerprint(self) -> str:
        """Everything that the masks depend on, in 16 hexadecimal digits."""
        digest = hashlib.sha256(repr((self.frame, self.classes)).encode())
        for net, diffusion, plan, _ in self.networks:
            process = {entry.name: getattr(diffusion, entry.name) for entry in fields(diffusion)}
            del process["schedule"]  # the plan's levels are what is drawn at
            layers = [*net.modules()]
            heads = [
                (layer.num_heads, layer.use_new_attention_order)
                for layer in layers
                if isinstance(layer, AttentionBlock)
            ]
            rates = [layer.p for layer in layers if isinstance(layer, Dropout)]
            dropped = rates if plan.dropout_members else []
            settings = (replace(plan, batch_size=0), process, heads, dropped)
            digest.update(repr(settings).encode())
            for name, value in net.state_dict().items():
                digest.update(name.encode())
                digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @python_names()
    def __call__(self, image: ImageLike, name: str = "") -> Segmentation:
        """Segment one image of any size.

        Args:
            image: the path of a picture or NIfTI file, whose masks lie as its array is stored; a
                PIL image; or an array or tensor [C, H, W] of uint8 or uint16 pixels, or of floats
                in the range of training (pictures: [0, 1]).
            name: seeds the noise; the file's stem by itself.

        Raises:
            UserError: another number of channels than the network has, an unreadable file, or
                values that cannot be those of training.
        """
        file = image if isinstance(image, (str, PathLike)) else getattr(image, "filename", "")
        name = name or split_name(Path(file).name)[0] or "image"
        channels = self.net.in_channels - self.net.mask_channels
        pixels = pixels_of(image, name=name, channels=channels, normalise=self.normalise)
        (result,) = self.segment([Case(pixels, None, name)])
        if isinstance(image, (str, PathLike)) and is_nifti(Path(image)):
            return result.turned(place(read_grid(Path(image))).view.turn_back)
        return result

    def segment(
        self, cases: Sequence[Case], callback: StepCallback | None = None
    ) -> list[Segmentation]:
        """Segment cases of any size: bring them to the network's, draw, bring back, fuse.

        ``callback`` is called with every network evaluation.
        """
        batch = collate([self.frame.fit(case) for case in cases])
        drawn = self.draw_with_coarse(batch.image, batch.names, callback)
        return [self.finish(case, drawn.case(index)) for index, case in enumerate(cases)]

    def finish(self, case: Case, drawn: Draws) -> Segmentation:
        """Bring what was drawn for a case, without the axis B, to its size, and fuse.

        Raises:
            UserError: a member, or the answer without a noisy mask, that is not finite.
        """
        plan, (members, coarse, direct) = self.plan, drawn
        if not all(part.isfinite().all() for part in (members, direct) if part is not None):
            raise UserError(
                case.name,
                f"the drawn masks are not finite in {plan.precision}",
                "Use --precision fp32; scripts/check_data.py looks at the images.",
            )

        def restored(mask: Tensor) -> Tensor:
            own = mask if self.classes else mask[..., 0, :, :]
            return self.frame.restore(own, (case.image.shape[-2], case.image.shape[-1]))

        sources = members if direct is None else direct[None]
        if coarse is not None and plan.coarse != "none":
            zero = float(self.diffusion.from_range(torch.zeros(())))
            sources = blend_coarse(sources, coarse, plan.coarse, zero=zero)
        exclusive = self.classes is not None and self.classes.exclusive
        fuse = mean if plan.fusion == "direct" else fusion(plan.fusion, exclusive=exclusive)
        own = restored(members)
        fused = fuse(own if sources is members else restored(sources))
        if plan.mask_temperature != 1:
            fused = temper_soft(fused, self.classes, plan.mask_temperature)
        if plan.largest or plan.fill_holes:
            largest, fill_holes = plan.largest, plan.fill_holes
            fused = clean_soft(fused, self.classes, largest=largest, fill_holes=fill_holes)
        return Segmentation(
            members=own,
            fused=fused,
            uncertainty=UNCERTAINTIES[plan.measure].rule(own),
            classes=self.classes,
            measure=plan.measure,
            coarse=None if coarse is None else restored(coarse),
            per_weights=tuple(one.plan.members for one in self.networks) if self.others else (),
        )

    def draw(
        self, images: Tensor, names: Sequence[str], callback: StepCallback | None = None
    ) -> Tensor:
        """Draw the members of some cases: :meth:`draw_with_coarse` without the coarse masks."""
        return self.draw_with_coarse(images, names, callback).members

    def warm_up(self, case: Case) -> float:
        """Compile, or tune, for cases of this size, and return the seconds that it took.

        Raises:
            UserError: the compiler does not work here.
        """
        started = time.perf_counter()
        levels = [plan.levels for _, _, plan, _ in self.networks]
        self._set_levels([(own[0], own[-1]) for own in levels])
        fitted = self.frame.fit(case).image
        cases = self.plan.cases
        try:
            with compiling():
                for _ in range(3):  # CUDA graphs are recorded on the second call
                    self.draw(fitted[None].expand(cases, -1, -1, -1), [case.name] * cases)
        finally:
            self._set_levels(levels)
        return time.perf_counter() - started

    def draw_with_coarse(
        self, images: Tensor, names: Sequence[str], callback: StepCallback | None = None
    ) -> Draws:
        """Draw the members of some cases, all as one batch as far as ``batch_size`` allows.

        Args:
            images: at the network's size, float32 [B, C, h, w].
            names: of the B cases; they seed the noise.
            callback: called with every network evaluation.

        Where memory runs out, ``batch_size`` is halved for good, which changes no mask.
        """
        done: list[Draws] = []
        first = 0
        while first < len(images):
            some = slice(first, first + (self.plan.cases if self.halved else len(images)))
            try:
                done.append(draw_all(self.networks, images[some], names[some], callback))
                first += len(images[some])
                continue
            except (RuntimeError, MemoryError) as error:
                problem = memory_problem(error)
                batch = max(one.plan.inputs_of(len(names[some])) for one in self.networks)
                if not problem or batch == 1:
                    raise
            # The error is gone by now, and with it the memory of what it interrupted.
            lower = halved(self.plan, batch, problem, device=self.device)
            self._replan(partial(_with_batch, most=lower.batch_size))
            self.halved = True
        return joined(done)

    def _set_levels(self, levels: Sequence[tuple[NoiseLevel, ...]]) -> None:
        """Change the noise levels of every network."""
        own = iter(levels)
        self._replan(lambda plan: replace(plan, levels=next(own)))

    def _replan(self, change: Callable[[SamplingPlan], SamplingPlan]) -> None:
        """Change the plan of every network."""
        self.plan = change(self.plan)
        self.others = tuple(other._replace(plan=change(other.plan)) for other in self.others)


def _with_batch(plan: SamplingPlan, *, most: int) -> SamplingPlan:
    return replace(plan, batch_size=min(plan.batch_size, most))


def _build(one: NetworkSetup, setup: SampleSetup, *, batch_size: int) -> TrainedNetwork:
    """Build one network of a set-up; its batch is at most ``batch_size``, if that is not 0."""
    process = create_gaussian_diffusion(one.diffusion, one.network.version, setup.classes)
    make = partial(create_model, one.network, one.diffusion, setup.classes)
    trained = one.trained
    with torch.device("meta"):
        outline = make()
    adapted, _ = adapt_weights(trained.checkpoint, outline)
    fitting_weights(outline, adapted.choose(one.options.weights)[0], trained.path)
    net = make()
    checkpoint, missing = adapt_weights(trained.checkpoint, net)
    weights, which = checkpoint.choose(one.options.weights)
    load_weights(net, weights, trained.path)

    device = dev(setup.run.gpu_dev)
    plan = make_plan(
        one.options,
        setup.run,
        process,
        device=device,
        own=trained.is_own,
        respacing=setup.respacing,
    )
    plan = within_memory(
        replace(plan, batch_size=min(plan.batch_size, batch_size or plan.batch_size)),
        size=net.image_size,
        width=net.model_channels,
        masks=net.mask_channels,
        device=device,
        members=sum(one.members for one in setup.networks),
    )
    source = f"{trained.path}: {which}"
    if not trained.is_own:
        source += f", taken as trained on {len(process.schedule)} steps (--trained_steps)"
    if missing:
        source += f"; {missing_weights_note(missing)}"
    set_up_kernels(device, tf32=setup.run.tf32, one_size=not setup.frame.crop)
    net = place_model(net, device, compile=plan.compile)
    return TrainedNetwork(net, process, plan, source)


def _drawing_text(plan: SamplingPlan) -> str:
    """'5 masks a case by ddim, 10 evaluations each', and how they come to differ."""
    ways = " with dropout" * plan.dropout_members + ", half of them flipped" * plan.flip_members
    guided = "" if plan.mask_guidance == 1 else f", mask guidance {plan.mask_guidance:g}"
    return (
        f"{counted(plan.members, 'mask')} a case by {plan.sampler}{ways}, "
        f"{counted(plan.evaluations, 'evaluation')} each{guided}"
    )


def _fusion_text(plan: SamplingPlan) -> str:
    """'fused by mean, mask temperature 0.8', and what is done to the fused mask."""
    tempered = plan.mask_temperature != 1
    temperature = f", mask temperature {plan.mask_temperature:.3g}" if tempered else ""
    largest = ", largest component" if plan.largest else ""
    return f"fused by {plan.fusion}{temperature}{largest}{', holes filled' * plan.fill_holes}"
