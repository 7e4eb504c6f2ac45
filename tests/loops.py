"""Training loops over drawn shapes, for tests of training, and comparisons of what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from guided_diffusion.checkpoint import load_checkpoint, load_weights
from guided_diffusion.data.batches import Batch, collate
from guided_diffusion.data.datasets import Case
from guided_diffusion.dist_util import place_model
from guided_diffusion.options.segmentation import RunOptions, TrainingOptions
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.resolve import TrainSetup


class Discs(Dataset[Case]):
    """Discs of different places and sizes in noise: the mask can be learned from the image."""

    def __init__(self, size: int = 6) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Case:
        noise = torch.Generator().manual_seed(index)
        row, column = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        x, y = 4 + 8 * torch.rand(2, generator=noise)
        mask = ((row - y) ** 2 + (column - x) ** 2 < (3 + index % 3) ** 2).float()[None]
        return Case(mask + 0.1 * torch.randn(1, 16, 16, generator=noise), mask, f"disc{index}")


DISC_FLAGS: dict[str, Any] = {
    "image_size": 16,
    "in_ch": 2,
    "num_channels": 32,
    "channel_mult": "1",
    "num_res_blocks": 1,
    "attention_resolutions": "",
    "predict_xstart": True,
    "mask_range": "-1,1",
    "noise_schedule": "cosine",
}


def make_loop(out_dir: Path, *, size: int = 6, seed: int = 1, **options: Any) -> TrainLoop:
    """A loop over discs with a network whose weights are all random, none of them zero."""
    own = {*DISC_FLAGS, "version", "dropout", "learn_sigma", "mask_loss", "mask_dropout"}
    flags = {key: options.pop(key) for key in list(options) if key in own}
    channels_last, rest = options.pop("channels_last", False), options.pop("rest", {})
    steps = options.pop("diffusion_steps", 100)
    precision = options.pop("precision", "fp32")
    net, diffusion = create_model_and_diffusion(**{**DISC_FLAGS, **flags}, diffusion_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    settings = TrainingOptions(
        **{"batch_size": 4, "lr": 1e-3, "ema_rate": "0.9,0.99", "log_interval": 1, **options}
    )
    run = RunOptions(out_dir=str(out_dir), seed=seed, precision=precision)
    return TrainLoop(TrainSetup(net, diffusion, Discs(size), settings, run, **rest))


def resumed(loop: TrainLoop, path: Path) -> TrainLoop:
    """Bring a new loop to where a checkpoint was written."""
    start = load_checkpoint(path)
    load_weights(loop.net, start.model, path)
    loop.restore(start, path=path)
    return loop


def batch_of(count: int) -> Batch:
    """The first discs as a batch."""
    return collate([Discs()[index] for index in range(count)])


def with_nan(batch: Batch) -> Batch:
    """Replace the images of a batch by NaN."""
    return batch._replace(image=torch.full_like(batch.image, torch.nan))


COARSE_FLAGS: dict[str, Any] = {
    "image_size": 32,
    "in_ch": 2,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "num_heads": 1,
    "predict_xstart": True,
    "mask_range": "-1,1",
    "noise_schedule": "cosine",
    "diffusion_steps": 50,
}


class Squares(Dataset[Case]):
    """Bright squares of 12 pixels in noise, 32 x 32."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Case:
        noise = torch.Generator().manual_seed(index)
        mask = torch.zeros(1, 32, 32)
        mask[:, 4 * index : 4 * index + 12, 8:20] = 1
        return Case(mask + 0.1 * torch.randn(1, 32, 32, generator=noise), mask, f"square{index}")


def make_coarse_loop(
    version: str, folder: Path, *, precision: str = "fp32", **options: Any
) -> TrainLoop:
    """A loop over squares with a network of MedSegDiff."""
    torch.manual_seed(0)
    flags = {name: options.pop(name) for name in ("coarse_loss",) if name in options}
    net, diffusion = create_model_and_diffusion(**COARSE_FLAGS, version=version, **flags)
    settings = TrainingOptions(**{"batch_size": 4, "lr": 1e-3, "ema_rate": "0.9", **options})
    run = RunOptions(out_dir=str(folder), precision=precision)
    net = place_model(net, torch.device("cpu"))
    return TrainLoop(TrainSetup(net, diffusion, Squares(), settings, run))


def equal(one: object, other: object) -> bool:
    """Whether two nested values agree to the bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(equal(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return (
            isinstance(other, type(one)) and len(one) == len(other) and all(map(equal, one, other))
        )
    return one == other
