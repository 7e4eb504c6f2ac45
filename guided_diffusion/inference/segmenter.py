"""A trained network that turns images into ensembles of masks.

Mask i of case c depends on the seed, c and i alone, for any batch size, order or device.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

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
from guided_diffusion.data.folders import is_nifti, split_name
from guided_diffusion.data.frames import Frame
from guided_diffusion.data.geometry import place
from guided_diffusion.data.readers import read_grid
from guided_diffusion.dist_util import autocast, compiling, describe, dev, place_model
from guided_diffusion.ensemble import FUSIONS, UNCERTAINTIES, blend_coarse
from guided_diffusion.errors import UserError, memory_problem, python_names
from guided_diffusion.gaussian_diffusion import Denoiser, GaussianDiffusion, Prediction
from guided_diffusion.inference.inputs import ImageLike, pixels_of
from guided_diffusion.inference.plan import (
    SamplingPlan,
    batched,
    halved,
    make_plan,
    padded,
    within_memory,
)
from guided_diffusion.inference.resolve import SampleSetup, resolve_sampling
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.nn import AttentionBlock
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.segmentation import ONLY_OF_FOLDERS, SAMPLE
from guided_diffusion.sampling import SAMPLERS, STOCHASTIC, MemberNoise, member_seed
from guided_diffusion.schedule import NoiseLevel
from guided_diffusion.script_util import create_gaussian_diffusion, create_model, parameter_count
from guided_diffusion.unet import UNetModel

StepCallback = Callable[[Tensor, NoiseLevel, Prediction], object]
"""Called with every network evaluation: the noisy masks, their level, and the prediction."""


class Draws(NamedTuple):
    """What was drawn for some cases, at the network's size and on the CPU.

    Attributes:
        members: soft masks, float32 [B, E, K, h, w] in [0, 1].
        coarse: the network's coarse mask at the last evaluation, averaged over the members where
            they make it differ, float32 [B, K, h, w]; None where it has none.
    """

    members: Tensor
    coarse: Tensor | None


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
    ) -> None:
        self.net = net.eval()
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
    def load(cls, path: str | Path, **flags: Any) -> Segmenter:
        """Load a checkpoint, or a folder's latest one.

        Args:
            path: of the checkpoint.
            flags: those of ``segmentation_sample.py`` that concern the model and the drawing, by
                name, such as ``sampler="dpm_solver++"``, ``steps=10``, ``num_ensemble=5``,
                ``seed=10``; for bare weights also the network's.

        Raises:
            UserError: no checkpoint there, an unknown flag or value, or one that contradicts the
                checkpoint.
        """
        given = Flags.of(SAMPLE, without=ONLY_OF_FOLDERS, **flags)
        return cls.from_setup(resolve_sampling(given, model=str(path)))

    @classmethod
    def from_setup(cls, setup: SampleSetup) -> Segmenter:
        """Build the network of a set-up, ready to draw.

        Raises:
            UserError: weights that do not fit the network, or a plan that the network cannot have.
        """
        process = create_gaussian_diffusion(setup.diffusion, setup.network.version)
        make = partial(create_model, setup.network, setup.diffusion, setup.classes)
        trained = setup.trained
        with torch.device("meta"):
            outline = make()
        adapted, _ = adapt_weights(trained.checkpoint, outline)
        fitting_weights(outline, adapted.choose(setup.options.weights)[0], trained.path)
        net = make()
        checkpoint, missing = adapt_weights(trained.checkpoint, net)
        weights, which = checkpoint.choose(setup.options.weights)
        load_weights(net, weights, trained.path)

        device = dev(setup.run.gpu_dev)
        plan = make_plan(
            setup.options,
            setup.run,
            process,
            device=device,
            own=trained.is_own,
            respacing=setup.respacing,
        )
        plan = within_memory(
            plan,
            size=net.image_size,
            width=net.model_channels,
            masks=net.mask_channels,
            device=device,
        )
        source = f"{trained.path}: {which}"
        if not trained.is_own:
            source += f", taken as trained on {len(process.schedule)} steps (--trained_steps)"
        if missing:
            source += f"; {missing_weights_note(missing)}"
        return cls(
            place_model(net, device, compile=plan.compile),
            process,
            frame=setup.frame,
            plan=plan,
            source=source,
            classes=setup.classes,
            normalise=setup.normalise,
        )

    def __str__(self) -> str:
        plan = self.plan
        coarse = "" if plan.coarse == "none" else f"coarse mask: {plan.coarse}, "
        return (
            f"{self.source}; {parameter_count(self.net)} on {describe(self.device)}, "
            f"{plan.precision}; {plan.num_ensemble} masks a case by {plan.sampler}, "
            f"{plan.evaluations} evaluations each, {coarse}fused by {plan.fusion}, seed {plan.seed}"
        )

    @property
    def fingerprint(self) -> str:
        """Everything that the masks depend on, in 16 hexadecimal digits."""
        process = {
            entry.name: getattr(self.diffusion, entry.name) for entry in fields(self.diffusion)
        }
        del process["schedule"]  # the plan's levels are what is drawn at
        heads = [
            (layer.num_heads, layer.use_new_attention_order)
            for layer in self.net.modules()
            if isinstance(layer, AttentionBlock)
        ]
        settings = (replace(self.plan, batch_size=0), self.frame, self.classes, process, heads)
        digest = hashlib.sha256(repr(settings).encode())
        for name, value in self.net.state_dict().items():
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
        return [
            self.finish(case, members, None if drawn.coarse is None else drawn.coarse[index])
            for index, (case, members) in enumerate(zip(cases, drawn.members, strict=True))
        ]

    def finish(self, case: Case, members: Tensor, coarse: Tensor | None) -> Segmentation:
        """Bring a case's members [E, K, h, w] and coarse mask [K, h, w] to its size, and fuse.

        Raises:
            UserError: a member that is not finite.
        """
        plan = self.plan
        if not members.isfinite().all():
            raise UserError(
                case.name,
                f"the drawn masks are not finite in {plan.precision}",
                "Use --precision fp32; scripts/check_data.py looks at the images.",
            )

        def restored(mask: Tensor) -> Tensor:
            own = mask if self.classes else mask[..., 0, :, :]
            return self.frame.restore(own, (case.image.shape[-2], case.image.shape[-1]))

        own = blended = restored(members)
        if coarse is not None and plan.coarse != "none":
            zero = float(self.diffusion.from_range(torch.zeros(())))
            blended = restored(blend_coarse(members, coarse, plan.coarse, zero=zero))
        return Segmentation(
            members=own,
            fused=FUSIONS[plan.fusion](blended),
            uncertainty=UNCERTAINTIES[plan.measure].rule(own),
            classes=self.classes,
            measure=plan.measure,
            coarse=None if coarse is None else restored(coarse),
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
        started, plan = time.perf_counter(), self.plan
        self.plan = replace(plan, levels=(plan.levels[0], plan.levels[-1]))
        fitted = self.frame.fit(case).image
        try:
            with compiling():
                for _ in range(3):  # CUDA graphs are recorded on the second call
                    self.draw(fitted[None].expand(plan.cases, -1, -1, -1), [case.name] * plan.cases)
        finally:
            self.plan = replace(self.plan, levels=plan.levels)
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
                done.append(self._draw_together(images[some], names[some], callback))
                first += len(images[some])
                continue
            except (RuntimeError, MemoryError) as error:
                problem, batch = memory_problem(error), self.plan.inputs_of(len(names[some]))
                if not problem or batch == 1:
                    raise
            # The error is gone by now, and with it the memory of what it interrupted.
            self.plan = halved(self.plan, batch, problem, device=self.device)
            self.halved = True
        coarse = [drawn.coarse for drawn in done if drawn.coarse is not None]
        members = torch.cat([drawn.members for drawn in done])
        return Draws(members, torch.cat(coarse) if coarse else None)

    @torch.inference_mode()
    def _draw_together(
        self, images: Tensor, names: Sequence[str], callback: StepCallback | None
    ) -> Draws:
        plan = self.plan
        with autocast(self.device, plan.precision):
            condition = self.net.encode(images.to(self.device))
        shape = (self.net.mask_channels, *images.shape[-2:])
        members = [(case, i) for case in range(len(images)) for i in range(plan.num_ensemble)]
        masks, coarse_masks = [], []
        for chunk in batched(members, plan.inputs if plan.compile else plan.batch_size):
            inputs = padded(chunk, plan.inputs) if plan.compile else chunk
            noise = MemberNoise([member_seed(plan.seed, names[case], i) for case, i in inputs])
            cases = torch.tensor([case for case, _ in inputs], device=self.device)
            denoise = self.diffusion.denoiser(self.net, condition.rows(cases), clip=plan.clip)
            observed = _Observed(denoise, callback)
            x = plan.temperature * noise(torch.empty(len(inputs), *shape, device=self.device))
            options = plan.options | ({"randn_like": noise} if plan.sampler in STOCHASTIC else {})
            with autocast(self.device, plan.precision):
                x0 = SAMPLERS[plan.sampler](observed, x, plan.levels, **options)
            masks.append(self.diffusion.from_range(x0[: len(chunk)]).float().cpu())
            if observed.coarse is not None:
                coarse_masks.append(observed.coarse[: len(chunk)].float().cpu())
        size = (len(images), plan.num_ensemble)
        coarse = torch.cat(coarse_masks).unflatten(0, size).mean(dim=1) if coarse_masks else None
        return Draws(torch.cat(masks).unflatten(0, size), coarse)


class _Observed:
    """A denoiser that keeps the coarse mask of its last call and hands every one to a callback."""

    def __init__(self, denoise: Denoiser, callback: StepCallback | None) -> None:
        self.denoise, self.callback = denoise, callback
        self.coarse: Tensor | None = None

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        prediction = self.denoise(x, level)
        self.coarse = prediction.coarse
        if self.callback:
            self.callback(x, level, prediction)
        return prediction
