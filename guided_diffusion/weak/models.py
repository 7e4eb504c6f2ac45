"""Trained diffusions of images and classifiers, found, loaded and put on their device.

Checkpoints of this suite describe themselves. Bare weights of the improved- and guided-diffusion
family, the weak-supervision seed's among them, tell their channels and classes by their shapes; the
rest is as the flags say. Called by ``weak_runs``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.checkpoint import (
    LATEST,
    Weights,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
)
from guided_diffusion.dist_util import dev, place_model
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import Denoiser, GaussianDiffusion
from guided_diffusion.inference.resolve import trained_flags
from guided_diffusion.networks.classifier import EncoderUNetModel
from guided_diffusion.networks.resnet import ResNet50
from guided_diffusion.options.flags import fill
from guided_diffusion.options.weak import (
    ClassifierOptions,
    ImageDiffusionOptions,
    ImageNetworkOptions,
)
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion, create_model
from guided_diffusion.unet import UNetModel
from guided_diffusion.weak.guidance import Classify, guide, noise_aware

DIFFUSION, CLASSIFIER = "model.pt", "classifier_model.pt"
"""What the published scripts call the two networks' latest weights in ``save_dir``."""
_HEADS = ("fc.weight", "out.2.c_proj.weight", "out.3.weight", "out.2.weight")


@dataclass(frozen=True)
class ImageModel:
    """A diffusion of images, ready to denoise.

    Attributes:
        net: in evaluation mode, on its device.
        diffusion: that it was trained for.
        clip: the range x0 is clamped to at every evaluation, or None.
        source: where the weights are from, for the log.
    """

    net: UNetModel
    diffusion: GaussianDiffusion
    clip: tuple[float, float] | None
    source: str

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.net.parameters()).device

    def denoiser(self, size: torch.Size, y: Tensor | None) -> Denoiser:
        """Make the denoiser of images of a size [B, C, H, W], of classes ``y`` (int64 or mixed)."""
        nothing = torch.empty(size[0], 0, *size[2:], device=self.device)
        return self.diffusion.denoiser(self.net, self.net.encode(nothing), clip=self.clip, y=y)


@dataclass(frozen=True)
class ClassifierModel:
    """A classifier of noisy images, ready to guide and to explain.

    Attributes:
        net: in evaluation mode, on its device.
        diffusion: whose noise it was trained on.
        image_size: height and width it was trained at.
        source: where the weights are from, for the log.
    """

    net: EncoderUNetModel | ResNet50
    diffusion: GaussianDiffusion
    image_size: int
    source: str

    @property
    def at_level(self) -> Classify:
        """The classifier, told the level."""
        return noise_aware(self.net, self.diffusion)

    def guiding(self, denoise: Denoiser, y: Tensor, *, scale: float) -> Denoiser:
        """Lead a denoiser towards the classes ``y``."""
        return guide(denoise, self.at_level, y, scale=scale)


def load_image_model(
    typed: dict[str, Any], *, folder: str, weights: str = "ema", clip: bool = True
) -> ImageModel:
    """Load the diffusion that ``--model_path`` names, else that of ``folder``.

    Raises:
        UserError: no checkpoint there, or one of something else.
    """
    path = _model_file(typed.get("model_path") or folder, DIFFUSION, "--model_path")
    checkpoint = load_checkpoint(path)
    flags = trained_flags(checkpoint, typed, path)
    own = bool(checkpoint.options)
    if own and not flags.get("of_images"):
        raise _other(path, "a diffusion of images", "scripts/train_tumor_ddfm.py")
    if not own:
        flags |= _shapes_of_unet(checkpoint.model)
    network = fill(ImageNetworkOptions, flags)
    options = fill(ImageDiffusionOptions, flags)
    process = create_gaussian_diffusion(options)
    net = create_model(network, options, of_images=True)
    chosen, which = checkpoint.choose(weights)
    load_weights(net, chosen, path)
    device = dev(typed.get("gpu_dev", "0"))
    return ImageModel(
        net=place_model(net, device).eval().requires_grad_(False),
        diffusion=process,
        clip=process.mask_range if clip else None,
        source=f"{path}: {which}",
    )


def load_classifier(typed: dict[str, Any], *, folder: str, weights: str = "ema") -> ClassifierModel:
    """Load the classifier that ``--classifier_path`` names, else that of ``folder``.

    Raises:
        UserError: no checkpoint there, or one of something else.
    """
    path = _model_file(typed.get("classifier_path") or folder, CLASSIFIER, "--classifier_path")
    checkpoint = load_checkpoint(path)
    flags = trained_flags(checkpoint, typed, path)
    if checkpoint.options and "model_type" not in checkpoint.options:
        raise _other(path, "a classifier of images", "scripts/classifier_tumor_train.py")
    if not checkpoint.options:
        flags |= _shapes_of_classifier(checkpoint.model, path)
    options = fill(ClassifierOptions, flags)
    net = create_classifier(**vars(options))
    chosen, which = checkpoint.choose(weights)
    load_weights(net, chosen, path)
    device = dev(typed.get("gpu_dev", "0"))
    return ClassifierModel(
        net=place_model(net, device).eval().requires_grad_(False),
        diffusion=create_gaussian_diffusion(fill(ImageDiffusionOptions, flags)),
        image_size=options.image_size,
        source=f"{path}: {which}",
    )


def _model_file(path: str, published: str, flag: str) -> Path:
    """A checkpoint, or in a folder the one that has the published name, else the latest."""
    named = Path(path).expanduser() / published
    latest = Path(path).expanduser() / LATEST
    use_named = named.is_file() and (published == CLASSIFIER or not latest.is_file())
    return latest_checkpoint(named if use_named else path, flag=flag)


def _shapes_of_unet(weights: Weights) -> dict[str, Any]:
    """Flags that the shapes of bare weights tell."""
    stem, head = weights.get("input_blocks.0.0.weight"), weights.get("out.2.weight")
    if stem is None or head is None:
        return {}
    return {
        "in_ch": stem.shape[1],
        "learn_sigma": len(head) == 2 * stem.shape[1],
        "class_cond": "label_emb.weight" in weights,
    }


def _shapes_of_classifier(weights: Weights, path: Path) -> dict[str, Any]:
    """Flags that the names and shapes of bare weights tell."""
    if "output_blocks.0.0.in_layers.0.weight" in weights:
        raise _other(path, "a classifier of images", "scripts/classifier_tumor_train.py")
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


def _other(path: Path, expected: str, script: str) -> UserError:
    return UserError(
        path,
        found="a network of another kind",
        expected=expected,
        hint=f"Train one with {script}, or correct the path.",
    )
