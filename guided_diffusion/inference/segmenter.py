"""A trained network that turns images into ensembles of masks.

Mask i of case c depends on the seed, c and i alone, for any batch size, order or device.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from guided_diffusion.checkpoint import adapt_weights, load_weights, missing_weights_note
from guided_diffusion.data.batches import collate
from guided_diffusion.data.classes import Classes
from guided_diffusion.data.datasets import Case, Frame, scaled
from guided_diffusion.data.folders import is_nifti, split_name
from guided_diffusion.data.geometry import place
from guided_diffusion.data.readers import Array, read_grid, read_image_file
from guided_diffusion.dist_util import autocast, compiling, describe, dev, place_model
from guided_diffusion.ensemble import FUSIONS, UNCERTAINTIES, blend_coarse
from guided_diffusion.errors import UserError, python_names
from guided_diffusion.gaussian_diffusion import Denoiser, GaussianDiffusion, Prediction
from guided_diffusion.inference.plan import SamplingPlan, make_plan
from guided_diffusion.inference.resolve import SampleSetup, resolve_sampling
from guided_diffusion.nn import AttentionBlock
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.segmentation import ONLY_OF_FOLDERS, SAMPLE
from guided_diffusion.sampling import SAMPLERS, STOCHASTIC, MemberNoise, member_seed
from guided_diffusion.schedule import NoiseLevel
from guided_diffusion.script_util import create_gaussian_diffusion, create_model, parameter_count
from guided_diffusion.unet import UNetModel

Item = TypeVar("Item")


class Segmentation(NamedTuple):
    """The segmentation of a case, at its own size.

    A network of declared classes (``--mask_labels``) has a class axis before H, W in everything
    but ``labels``: [E, K, H, W] and [K, H, W].

    Attributes:
        members: the drawn masks, soft, float32 [E, H, W] in [0, 1].
        fused: the ensemble's mask, soft, float32 [H, W] in [0, 1]; the members are joined with the
            coarse mask first, as the plan says. Their spread is measured before that.
        uncertainty: by ``measure``, float32 [H, W]; the standard deviation lies in [0, 0.5].
        classes: what the channels are; None where everything is one class.
        measure: a name of :data:`guided_diffusion.ensemble.UNCERTAINTIES`.
        coarse: the condition network's own mask, soft, float32 [H, W] in [0, 1]; None where the
            network has none.
    """

    members: Tensor
    fused: Tensor
    uncertainty: Tensor
    classes: Classes | None = None
    measure: str = "std"
    coarse: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """The binary mask, bool [H, W]: fused at least one half.

        Of classes that share no label only the likeliest of each pixel.
        """
        if self.classes is None:
            return self.fused >= 0.5
        return torch.from_numpy(self.classes.masks(self.fused.numpy()))

    @property
    def labels(self) -> Tensor:
        """The label map, uint8 [H, W]: 0 and the labels of the classes, or 0 and 1."""
        if self.classes is None:
            return self.mask.to(torch.uint8)
        return torch.from_numpy(self.classes.label_map(self.fused.numpy()))

    def turned(self, turn: Callable[[Array], Array]) -> Segmentation:
        """Turn the planes of all maps [..., H, W] alike."""
        members, fused, uncertainty, coarse = (
            values if values is None else torch.from_numpy(turn(values.numpy()).copy())
            for values in (self.members, self.fused, self.uncertainty, self.coarse)
        )
        assert members is not None and fused is not None and uncertainty is not None
        return self._replace(members=members, fused=fused, uncertainty=uncertainty, coarse=coarse)


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
        net = create_model(setup.network, setup.diffusion, setup.classes)
        trained = setup.trained
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
    def __call__(self, image: ArrayLike | Tensor | str | Path, name: str = "") -> Segmentation:
        """Segment one image of any size.

        Args:
            image: float [C, H, W] in the range of training (pictures: [0, 1]), or the path of a
                picture or NIfTI file, whose masks lie as its array is stored.
            name: seeds the noise; a path's stem by itself.

        Raises:
            UserError: another number of channels than the network has, or an unreadable file.
        """
        channels = self.net.in_channels - self.net.mask_channels
        turn_back: Callable[[Array], Array] | None = None
        if isinstance(image, (str, Path)):
            name = name or split_name(Path(image).name)[0]
            pixels, _ = read_image_file(Path(image), channels=channels)
            pixels = scaled(pixels, self.normalise)
            if is_nifti(Path(image)):
                turn_back = place(read_grid(Path(image))).view.turn_back
        else:
            pixels = torch.as_tensor(image, dtype=torch.float32)
        if pixels.ndim != 3 or len(pixels) != channels or not pixels.numel():
            raise UserError(
                name or "image",
                f"its shape is {tuple(pixels.shape)}, that of training is [{channels}, H, W]",
                "Put the channels first.",
            )
        result = self.segment([Case(pixels, None, name or "image")])[0]
        return result.turned(turn_back) if turn_back else result

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
            self.plan = plan
        return time.perf_counter() - started

    @torch.inference_mode()
    def draw_with_coarse(
        self, images: Tensor, names: Sequence[str], callback: StepCallback | None = None
    ) -> Draws:
        """Draw the members of some cases, all as one batch as far as ``batch_size`` allows.

        Args:
            images: at the network's size, float32 [B, C, h, w].
            names: of the B cases; they seed the noise.
            callback: called with every network evaluation.
        """
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


def batched(values: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Cut a sequence into pieces of ``size``; the last may be shorter."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def padded(values: Sequence[Item], size: int) -> Sequence[Item]:
    """Repeat the last value until there are ``size``: compiled code is for one shape."""
    return [*values, *[values[-1]] * (size - len(values))]
