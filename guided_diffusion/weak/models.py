"""Trained diffusions of images and classifiers, found, loaded and put on their device.

Checkpoints of this suite describe themselves. Of bare weights of the improved- and guided-diffusion
family, those of Hu et al. (2023) among them, the shapes give channels and classes; the rest is as
the flags say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from guided_diffusion.checkpoint import (
    CLASSIFIER,
    IMAGES,
    LATEST,
    Weights,
    latest_checkpoint,
    load_weights,
    require_fit,
)
from guided_diffusion.dist_util import dev, place_model
from guided_diffusion.errors import UserError
from guided_diffusion.files import expanded
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
from guided_diffusion.weak.guidance import Classify, guide, noise_aware

DIFFUSION_FILE, CLASSIFIER_FILE = "model.pt", "classifier_model.pt"
"""What the published scripts call the two networks' latest weights in ``save_dir``."""
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
        """The classifier, conditioned on the noise level."""
        return noise_aware(self.net, self.diffusion)

    def guiding(self, denoise: Denoiser, y: Tensor, *, scale: float) -> Denoiser:
        """Lead a denoiser towards the classes ``y``."""
        return guide(denoise, self.at_level, y, scale=scale)


def load_image_model(
    flags: Flags, *, folder: str, weights: str = "ema", clip: bool = True
) -> ImageModel:
    """Load the diffusion that ``--model_path`` names, else that of ``folder``.

    Raises:
        UserError: no checkpoint there, or one of something else.
    """
    path = _model_file(flags, "model_path", folder, DIFFUSION_FILE)
    trained = load_trained(path, flags, kind=IMAGES)
    path, known = trained.path, trained.flags
    if not trained.is_own:
        known = known.with_resolved(**_shapes_of_unet(trained.checkpoint.model))
    network = known.group(ImageNetworkOptions)
    options = known.group(ImageDiffusionOptions)
    process = create_gaussian_diffusion(options)
    make = partial(create_model, network, options, of_images=True)
    return ImageModel(
        net=_placed(make, trained, weights, flags),
        diffusion=process,
        clip=process.mask_range if clip else None,
        source=f"{path}: {trained.checkpoint.choose(weights)[1]}",
    )


def load_classifier(flags: Flags, *, folder: str, weights: str = "ema") -> ClassifierModel:
    """Load the classifier that ``--classifier_path`` names, else that of ``folder``.

    Raises:
        UserError: no checkpoint there, or one of something else.
    """
    path = _model_file(flags, "classifier_path", folder, CLASSIFIER_FILE)
    trained = load_trained(path, flags, kind=CLASSIFIER)
    path, known = trained.path, trained.flags
    if not trained.is_own:
        known = known.with_resolved(**_shapes_of_classifier(trained.checkpoint.model, path))
    options = known.group(ClassifierOptions)
    return ClassifierModel(
        net=_placed(partial(create_classifier, **vars(options)), trained, weights, flags),
        diffusion=create_gaussian_diffusion(known.group(ImageDiffusionOptions)),
        image_size=options.image_size,
        source=f"{path}: {trained.checkpoint.choose(weights)[1]}",
    )


def _placed(make: Callable[[], Net], trained: Trained, weights: str, flags: Flags) -> Net:
    """Fill a network with the chosen weights, and bring it to its device for inference."""
    chosen, _ = trained.checkpoint.choose(weights)
    require_fit(make, [chosen], trained.path)
    net = make()
    load_weights(net, chosen, trained.path)
    return place_model(net, dev(flags.get("gpu_dev", "0"))).eval().requires_grad_(False)


def _model_file(flags: Flags, name: str, folder: str, published: str) -> Path:
    """Find a checkpoint, or in a folder the one with the published name, else the latest.

    Without the flag ``name`` that of the run's own folder is taken.
    """
    given = flags.get(name)
    path, flag = (given, f"--{name}") if given else (folder, "--save_dir")
    named = expanded(path, flag=flag) / published
    latest = expanded(path, flag=flag) / LATEST
    use_named = named.is_file() and (published == CLASSIFIER_FILE or not latest.is_file())
    return latest_checkpoint(named if use_named else path, flag=flag)


def _shapes_of_unet(weights: Weights) -> dict[str, Any]:
    """Flags that the shapes of bare weights imply."""
    stem, head = weights.get("input_blocks.0.0.weight"), weights.get("out.2.weight")
    if stem is None or head is None:
        return {}
    return {
        "in_ch": stem.shape[1],
        "learn_sigma": len(head) == 2 * stem.shape[1],
        "class_cond": "label_emb.weight" in weights,
    }


def _shapes_of_classifier(weights: Weights, path: Path) -> dict[str, Any]:
    """Flags that the names and shapes of bare weights imply."""
    if "output_blocks.0.0.in_layers.0.weight" in weights:
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
