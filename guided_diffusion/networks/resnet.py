"""ResNet-50 as a noise-aware classifier: He et al. (2016), with torchvision's tensor names.

The ResNet of the published weak-supervision code is not conditioned on the timestep and so has to
infer how noisy its input is; here every stage can be. Its batch normalisation used running
statistics that were never updated, so nothing was normalised; here it is the standard one, which in
evaluation computes the same from the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from guided_diffusion.nn import time_embedding, timestep_embedding, zeroed

DEPTHS, WIDTHS, STEM = (3, 4, 6, 3), (64, 128, 256, 512), 64


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions with a shortcut, to 4 * ``width`` channels."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride=stride, bias=False),
                nn.BatchNorm2d(4 * width),
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, 4 * width, H / stride, W / stride]."""
        h = torch.relu(self.bn1(self.conv1(x)))
        h = torch.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return torch.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """Image classifier of 50 layers.

    Args:
        in_channels: number of image channels.
        out_channels: number of classes.
        embed_time: add an embedding of the timestep to the input of every stage.
    """

    def __init__(self, in_channels: int, out_channels: int, *, embed_time: bool = True) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_classes = out_channels
        self.conv1 = nn.Conv2d(in_channels, STEM, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = (STEM, *(4 * width for width in WIDTHS[:-1]))
        for number, (channels, width, depth) in enumerate(
            zip(inputs, WIDTHS, DEPTHS, strict=True), start=1
        ):
            first = Bottleneck(channels, width, stride=1 if number == 1 else 2)
            rest = [Bottleneck(4 * width, width, stride=1) for _ in range(depth - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
        self.fc = nn.Linear(4 * WIDTHS[-1], out_channels)
        self.embed_time = embed_time
        if embed_time:
            self.time_embed = time_embedding(STEM)
            self.emb_layers = nn.ModuleList(zeroed(nn.Linear(4 * STEM, c)) for c in inputs)

    def features(self, x: Tensor, t: Tensor | None = None) -> list[Tensor]:
        """Compute the maps of the four stages, finest first.

        Args:
            x: noisy images [B, C, H, W].
            t: timesteps [B]; None for 0; ignored without ``embed_time``.
        """
        h = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        maps = []
        for number, shift in enumerate(self._shifts(x, t), start=1):
            h = self.get_submodule(f"layer{number}")(h if shift is None else h + shift)
            maps.append(h)
        return maps

    def _shifts(self, x: Tensor, t: Tensor | None) -> Sequence[Tensor | None]:
        """The embedding of the timestep to add to the input of each stage, [B, C, 1, 1]."""
        if not self.embed_time:
            return [None] * len(DEPTHS)
        timesteps = torch.zeros(len(x), device=x.device) if t is None else t
        emb = self.time_embed(timestep_embedding(timesteps, STEM).to(self.fc.weight.dtype))
        return [layer(emb)[:, :, None, None] for layer in self.emb_layers]

    def head(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute logits [B, K] from the maps of :meth:`features`."""
        return self.fc(maps[-1].mean(dim=(2, 3)))

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Classify noisy images [B, C, H, W] at timesteps [B]: logits [B, K]."""
        return self.head(self.features(x, t))
