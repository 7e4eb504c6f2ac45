"""The noise-aware classifier: the U-Net's contracting path with a pooling head.

Dhariwal & Nichol (2021), section 4, with the tensor names of their weights. For weak supervision,
its gradient guides a sampler, and its feature maps explain its decision: like the ResNet of
``resnet`` it computes them with ``features`` and the logits from them with ``head``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from guided_diffusion.nn import (
    BlockStyle,
    GroupNorm32,
    attend,
    contracting_path,
    middle_block,
    time_embedding,
    timestep_embedding,
    zeroed,
)

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")


class EncoderUNetModel(nn.Module):
    """Image classifier conditioned on the timestep.

    Args:
        image_size: height and width of the images; the attention pool accepts no others.
        in_channels: number of image channels.
        model_channels: width of the first level, a multiple of 32.
        out_channels: number of classes.
        num_res_blocks: residual blocks per level.
        attention_resolutions: downsampling factors with attention.
        pool: a name of :data:`POOLS`.

    The other arguments are those of :class:`guided_diffusion.unet.UNetModel`.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        *,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        pool: str = "adaptive",
        num_head_channels: int = 64,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.num_classes = out_channels
        self.pool = pool
        widths = [int(mult * model_channels) for mult in channel_mult]
        style = BlockStyle(
            emb_channels=4 * model_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            num_head_channels=num_head_channels,
        )

        self.time_embed = time_embedding(model_channels)
        self.input_blocks, channels = contracting_path(
            in_channels, widths, num_res_blocks, attention_resolutions, style
        )
        self.middle_block = middle_block(widths[-1], style)
        self.out = _head(
            pool,
            widths[-1],
            sum(channels) + widths[-1],
            out_channels,
            side=image_size // 2 ** (len(widths) - 1),
            head_channels=num_head_channels,
        )

    def features(self, x: Tensor, t: Tensor | None = None) -> list[Tensor]:
        """Compute the feature maps of every block, finest first, the middle block's last.

        If the pool reads the last map alone, that map is returned normalised: gradients before the
        normalisation say nothing about a map's mean, and Grad-CAM would miss the lesion.

        Args:
            x: noisy images [B, C, H, W].
            t: timesteps [B], fractional ones allowed; None for 0.
        """
        timesteps = torch.zeros(len(x), device=x.device) if t is None else t
        weight = self.get_parameter("time_embed.0.weight")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(weight.dtype))
        maps = []
        h = x
        for block in [*self.input_blocks, self.middle_block]:
            h = block(h, emb)
            maps.append(h)
        return maps if self.reads_all else [*maps[:-1], self.out[:2](h)]

    def head(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute logits [B, K] from the maps of :meth:`features`."""
        if self.reads_all:
            return self.out(torch.cat([h.mean(dim=(2, 3)) for h in maps], dim=1))
        return self.out[2:](maps[-1])

    @property
    def reads_all(self) -> bool:
        """Whether the pool reads the maps of all blocks."""
        return self.pool.startswith("spatial")

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Classify noisy images [B, C, H, W] at timesteps [B]: logits [B, K]."""
        return self.head(self.features(x, t))


class AttentionPool2d(nn.Module):
    """Attention pooling: the mean of all positions attends to them. Radford et al. (2021), 2.3."""

    def __init__(self, side: int, channels: int, head_channels: int, out_channels: int) -> None:
        super().__init__()
        embedding = torch.randn(channels, side**2 + 1) / math.sqrt(channels)
        self.positional_embedding = nn.Parameter(embedding)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)
        self.num_heads = channels // head_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, side, side] to [B, K]."""
        flat = x.flatten(2)
        tokens = torch.cat([flat.mean(dim=-1, keepdim=True), flat], dim=-1)
        qkv = self.qkv_proj(tokens + self.positional_embedding.to(tokens.dtype))
        attended = attend(qkv, self.num_heads, heads_first=False)
        return self.c_proj(attended[..., :1])[..., 0]


def _head(
    pool: str, deepest: int, all_channels: int, classes: int, *, side: int, head_channels: int
) -> nn.Sequential:
    """Build the pool and output layers, over ``deepest`` channels of the last map or all of all."""
    if pool == "adaptive":
        return nn.Sequential(
            GroupNorm32(deepest),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            zeroed(nn.Conv2d(deepest, classes, 1)),
            nn.Flatten(),
        )
    if pool == "attention":
        return nn.Sequential(
            GroupNorm32(deepest),
            nn.SiLU(),
            AttentionPool2d(side, deepest, head_channels, classes),
        )
    if pool == "spatial":
        return nn.Sequential(nn.Linear(all_channels, 2048), nn.ReLU(), nn.Linear(2048, classes))
    if pool == "spatial_v2":
        return nn.Sequential(
            nn.Linear(all_channels, 2048), GroupNorm32(2048), nn.SiLU(), nn.Linear(2048, classes)
        )
    raise ValueError(f"pool {pool!r} is not one of {', '.join(POOLS)}")
