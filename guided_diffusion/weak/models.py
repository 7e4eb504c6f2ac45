"""Trained diffusions of images and classifiers, found, loaded and put on their device.

Checkpoints of this suite describe themselves. Of bare weights of the improved- and guided-diffusion
family, those of Hu et al. (2023) among them, the shapes give channels and classes; the rest is as
the flags say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from guided_diffusion.checkpoint import (
    CLASSIFIER,
    IMAGES,
    Weights,
    load_weights,
    require_fit,
)
from guided_diffusion.dist_util import dev, place_model
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import Denoiser, GaussianDiffusion
from guided_diffusion.inference.trained import Trained, load_trained
from guided_diffusion.networks.classifier import EncoderUNetModel
from guided_diffusion.networks.resnet import ResNet50
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.weak import (
    ClassifierOptions,
    ImageDiffusionOptions,
    ImageNetworkOptions,
)
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion, create_model
from guided_diffusion.unet import UNetModel
from guided_diffusion.weak.finding import (
    CLASS_ROWS,
    classifier_file,
    diffusion_file,
    is_unet,
    rows_note,
    with_two_classes,
)
from guided_diffusion.weak.guidance import Classify, guide, noise_aware

Net = TypeVar("Net", bound=torch.nn.Module)
_HEADS = ("fc.weight", "out.2.c_proj.weight", "out.3.weight", "out.2.weight")


@dataclass(frozen=True)
class ImageModel:
    """A diffusion of images, ready to denoise.

    Attributes:
        net: in evaluation mode, on its device.
        diffusion: that it was trained for.
        clip: the range x0 is clamped to at every evaluation, or None.
        source: where the weights are from, for the log.
        trained: its checkpoint.
    """

    net: UNetModel
    diffusion: GaussianDiffusion
    clip: tuple[float, float] | None
    source: str
    trained: Trained

    @property
    def settings(self) -> tuple[object, ...]:
        """All that predictions depend on besides the weights."""
        known = self.trained.flags
        return known.group(ImageNetworkOptions), known.group(ImageDiffusionOptions), self.clip

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.net.parameters()).device

    def denoiser(self, size: torch.Size, y: Tensor | None) -> Denoiser:
        """Make the denoiser of images of a size [B, C, H, W], of classes ``y`` (int64 or mixed)."""
        nothing = torch.empty(size[0], 0, *size[2:], device=self.device)
        return self.diffusion.denoiser(self.net, self.net.encode(nothing), clip=self.clip, y=y)

    def branch(
        self,
        size: torch.Size,
        share: float,
        *,
        guide: ClassifierModel | None = None,
        label: int = 0,
        scale: float = 1.0,
    ) -> Denoiser:
        """Make the denoiser of images of a size, of ``share`` lesion and the rest normal.

        Args:
            size: [B, C, H, W].
            share: of the lesion's class embedding, from 0 to 1.
            guide: the classifier that leads it; None for none.
            label: the class that it is led to.
            scale: strength of the guidance.
        """
        mixed = torch.tensor([[1 - share, share]], device=self.device).expand(size[0], -1)
        denoise = self.denoiser(size, mixed if self.net.num_classes else None)
        if guide is None:
            return denoise
        y = torch.full((size[0],), label, device=self.device)
        return guide.guiding(denoise, y, scale=scale, of=self.diffusion)


@dataclass(frozen=True)
class ClassifierModel:
    """A classifier of noisy images, ready to guide and to explain.

    Attributes:
        net: in evaluation mode, on its device.
        diffusion: whose noise it was trained on.
        image_size: height and width it was trained at.
        source: where the weights are from, for the log.
        trained: its checkpoint.
    """

    net: EncoderUNetModel | ResNet50
    diffusion: GaussianDiffusion
    image_size: int
    source: str
    trained: Trained

    @property
    def settings(self) -> tuple[object, ...]:
        """All that predictions depend on besides the weights."""
        known = self.trained.flags
        return known.group(ClassifierOptions), known.group(ImageDiffusionOptions)

    @property
    def at_level(self) -> Classify:
        """The classifier, conditioned on the noise level, of images in its own range."""
        return noise_aware(self.net, self.diffusion)

    def guiding(
        self, denoise: Denoiser, y: Tensor, *, scale: float, of: GaussianDiffusion
    ) -> Denoiser:
        """Lead a denoiser of the diffusion ``of`` towards the classes ``y``."""
        classify = noise_aware(self.net, self.diffusion, mask_range=of.mask_range)
        return guide(denoise, classify, y, scale=scale)


def load_image_model(
    flags: Flags,
    *,
    folder: str,
    weights: str = "ema",
    clip: bool = True,
    whole_schedule: bool = False,
) -> ImageModel:
    """Load the diffusion that ``--model_path`` names, else that of ``folder`` or beside it.

    Bare weights may have more classes than two; the lesion's is then ``--class_index``.

    Args:
        flags: of the command.
        folder: of the run.
        weights: ``ema`` or ``raw``.
        clip: clamp x0 to its range at every evaluation.
        whole_schedule: a given ``--diffusion_steps`` is the schedule length of bare weights, as
            ``--trained_steps`` is, and not a number of evaluations.

    Raises:
        UserError: no checkpoint there, or one of something else.
    """
    path = diffusion_file(flags, folder)
    length = flags.given.get("diffusion_steps", 0) if whole_schedule else 0
    if length and "trained_steps" not in flags.given:
        flags = flags.with_given(trained_steps=length)
        trained = load_trained(path, flags, kind=IMAGES, passing=("trained_steps",))
    else:
        trained = load_trained(path, flags, kind=IMAGES)
    known, notes = trained.flags, []
    if not trained.is_own:
        known = known.with_resolved(**_shapes_of_unet(trained.checkpoint.model))
        notes.append(f"taken as trained on {known.get('diffusion_steps')} steps (--trained_steps)")
        two, row = with_two_classes(trained.checkpoint, path, flags.get("class_index", 1))
        trained = trained._replace(checkpoint=two)
        notes += [rows_note(row)] * bool(row)
    network = known.group(ImageNetworkOptions)
    options = known.group(ImageDiffusionOptions)
    process = create_gaussian_diffusion(options)
    make = partial(create_model, network, options, of_images=True)
    chosen = trained.checkpoint.choose(weights)[1]
    return ImageModel(
        net=_placed(make, trained, weights, flags),
        diffusion=process,
        clip=process.mask_range if clip else None,
        source=f"{path}: {', '.join([chosen, *notes])}",
        trained=trained,
    )


def load_classifier(flags: Flags, *, folder: str, weights: str = "ema") -> ClassifierModel:
    """Load the classifier that ``--classifier_path`` names, else that of ``folder``.

    The flags of the diffusion are another network's: what they say need not be as it was trained.

    Raises:
        UserError: no checkpoint there, or one of something else.
    """
    path = classifier_file(flags, folder)
    others = [entry.name for entry in fields(ImageDiffusionOptions)]
    trained = load_trained(path, flags, kind=CLASSIFIER, passing=[*others, "trained_steps"])
    known = trained.flags
    if not trained.is_own:
        known = known.with_resolved(**_shapes_of_classifier(trained.checkpoint.model, path))
    options = known.group(ClassifierOptions)
    return ClassifierModel(
        net=_placed(partial(create_classifier, **vars(options)), trained, weights, flags),
        diffusion=create_gaussian_diffusion(known.group(ImageDiffusionOptions)),
        image_size=options.image_size,
        source=f"{path}: {trained.checkpoint.choose(weights)[1]}",
        trained=trained,
    )


def _placed(make: Callable[[], Net], trained: Trained, weights: str, flags: Flags) -> Net:
    """Fill a network with the chosen weights, and bring it to its device for inference."""
    chosen, _ = trained.checkpoint.choose(weights)
    require_fit(make, [chosen], trained.path)
    net = make()
    load_weights(net, chosen, trained.path)
    return place_model(net, dev(flags.get("gpu_dev", "0"))).eval().requires_grad_(False)


def _shapes_of_unet(weights: Weights) -> dict[str, Any]:
    """Flags that the shapes of bare weights imply."""
    stem, head = weights.get("input_blocks.0.0.weight"), weights.get("out.2.weight")
    if stem is None or head is None:
        return {}
    return {
        "in_ch": stem.shape[1],
        "learn_sigma": len(head) == 2 * stem.shape[1],
        "class_cond": CLASS_ROWS in weights,
    }


def _shapes_of_classifier(weights: Weights, path: Path) -> dict[str, Any]:
    """Flags that the names and shapes of bare weights imply."""
    if is_unet(weights):
        raise UserError(path, f"is not {CLASSIFIER}", "Correct the path.")
    resnet = "fc.weight" in weights
    stem = weights.get("conv1.weight" if resnet else "input_blocks.0.0.weight")
    head = next((weights[name] for name in _HEADS if name in weights), None)
    if stem is None or head is None:
        return {}
    return {
        "model_type": "resnet50" if resnet else "encoder",
        "in_channel": stem.shape[1],
        "num_classes": len(head),
        "classifier_told_time": "time_embed.0.weight" in weights,
    }
