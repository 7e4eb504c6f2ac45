"""Building blocks that all networks share, with the tensor names of published weights.

Timestep embedding (Vaswani et al., 2017), the residual and attention blocks of Dhariwal & Nichol
(2021), and the contracting path built from them, which the U-Net and the classifier share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Layer = TypeVar("Layer", bound=nn.Module)


class Output(NamedTuple):
    """The output of a network.

    Attributes:
        raw: the prediction [B, K, H, W], or [B, 2K, H, W] with a learned variance.
        coarse: the condition network's own mask [B, 1, H, W] in (0, 1), or None.
    """

    raw: Tensor
    coarse: Tensor | None = None


@dataclass(frozen=True)
class BlockStyle:
    """Options that all blocks of one network share; 0 ``emb_channels``: no embedded timestep.

    Of a network's levels, ``use_checkpoint`` concerns the ``checkpoint_levels`` finest.
    """

    emb_channels: int
    dropout: float = 0.0
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_checkpoint: bool = False
    checkpoint_levels: int = 1000
    num_heads: int = 1
    num_head_channels: int = -1
    use_new_attention_order: bool = False

    def at_level(self, level: int) -> BlockStyle:
        """Return the options of the blocks at a level; 0 is the finest."""
        active = self.use_checkpoint and level < self.checkpoint_levels
        return replace(self, use_checkpoint=active)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Embed timesteps [B], fractional ones too, as cosines and sines: float32 [B, dim]."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(max_period) / half * steps)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


class GroupNorm32(nn.GroupNorm):
    """Group normalisation with 32 groups, computed in float32 whatever the input's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, ...]; the dtype of ``x`` is kept."""
        # On CUDA devices, autocast makes it float32, and the kernel takes contiguous tensors alone:
        # maps would be copied four times. A compiler fuses it all.
        half = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and x.ndim > 2
        if half and not torch.compiler.is_compiling():
            with single_precision(x):
                return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        # The kernel computes half precision in float32 itself, but its backward pass is slow there.
        # F.group_norm would refuse a group of one value, which is normalised to the bias.
        wide = x.float() if torch.is_grad_enabled() else x
        normalised = torch.group_norm(wide, self.num_groups, self.weight, self.bias, self.eps)
        return normalised.to(x.dtype)


class _GroupNorm(torch.autograd.Function):
    """Group normalisation of [B, C, ...] in its dtype and memory order, with sums in float32.

    What is kept for the backward pass is the input itself.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        by_group, pixels = (len(x), groups, -1), tuple(range(2, x.ndim))
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = x.mean(pixels, dtype=wide).view(by_group).mean(-1, keepdim=True)
        norm = torch.linalg.vector_norm(x, dim=pixels, dtype=wide)
        square = norm.square().view(by_group).mean(-1, keepdim=True) / x[0, 0].numel()
        rstd = torch.addcmul(square, mean, mean, value=-1).clamp(min=0).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        scale = weight.view(groups, -1) * rstd
        return _scaled(x, scale, torch.addcmul(bias.view(groups, -1), mean, scale, value=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        by_group, pixels = (*mean.shape[:2], -1), tuple(range(2, x.ndim))
        weight = weight.view(mean.shape[1], -1)
        like = weight.expand(len(x), *weight.shape)
        direct = (weight * rstd).view(*x.shape[:2], *[1] * len(pixels))
        normalised = _scaled(x, rstd.expand_as(like), (-mean * rstd).expand_as(like))
        # What weight and bias get of every image.
        of_weight = (grad * normalised).sum(pixels, dtype=mean.dtype).view(by_group)
        of_bias = grad.sum(pixels, dtype=mean.dtype).view(by_group)
        # What reaches the input by way of variance and mean, and then directly.
        share = -rstd / x[0, 0].numel()
        by_variance, by_mean = (
            (share * (weight * part).mean(-1, keepdim=True)).expand_as(like)
            for part in (of_weight, of_bias)
        )
        found = _scaled(normalised, by_variance, by_mean)
        torch.addcmul(found, grad, direct, out=found)
        return found, of_weight.sum(0).flatten(), of_bias.sum(0).flatten(), None, None


def _scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Compute ``x * scale + shift`` like ``x`` [B, C, ...], by values [B, G, C/G]; rounded once."""
    shape = (*x.shape[:2], *[1] * (x.ndim - 2))
    return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape), out=torch.empty_like(x))


def single_precision(x: Tensor) -> AbstractContextManager[object]:
    """Disable autocast on the device of ``x``; the meta device has no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def maybe_checkpoint(
    active: bool, function: Callable[..., Tensor], *inputs: Tensor | None
) -> Tensor:
    """Call a function; if ``active``, recompute its activations in the backward pass."""
    if active and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(function, *inputs, use_reentrant=False))
    return function(*inputs)


def zeroed(layer: Layer) -> Layer:
    """Initialise a layer with zeros, so that its residual block starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Dropout(nn.Dropout):
    """Dropout that can also draw a mask for every row of a batch, from a number of its own.

    Attributes:
        keys: int32 [B] on the device of the input. The mask of a row follows from its number alone,
            on any device, in evaluation too; None for torch's dropout.
    """

    keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of [B, ...], and scale those that are kept."""
        if self.keys is None:
            return super().forward(x)
        bits = _hash_positions(self.keys, x[0].numel()).reshape(x.shape)
        kept = (bits & (2**24 - 1)) >= round(self.p * 2**24)
        return x * kept / max(1 - self.p, 2**-24)


def _hash_positions(keys: Tensor, count: int) -> Tensor:
    """Hash every key with the positions 0 to ``count`` - 1: int32 [B] to pseudo-random [B, count].

    Integers wrap around; the rounds are those of a 32-bit multiply-xorshift hash.
    """
    keys = keys[:, None]
    bits = torch.arange(count, dtype=torch.int32, device=keys.device) ^ keys
    for _ in range(3):
        bits = ((bits >> 16) & 0xFFFF ^ bits) * 0x45D9F3B + keys
    return (bits >> 16) & 0xFFFF ^ bits


class Downsample(nn.Module):
    """Halve height and width by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H/2, W/2]."""
        return cast(Tensor, self.op(x))


class Upsample(nn.Module):
    """Double height and width by repetition, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2H, 2W]."""
        return cast(Tensor, self.conv(_double(x)))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


class ResBlock(nn.Module):
    """Residual block, conditioned on the timestep if the network is; may resample its branches."""

    def __init__(
        self, channels: int, out_channels: int, style: BlockStyle, resample: str = "none"
    ) -> None:
        super().__init__()
        self.use_checkpoint = style.use_checkpoint
        self.use_scale_shift_norm = style.use_scale_shift_norm
        self.resample = {"none": None, "up": _double, "down": _halve}[resample]

        self.in_layers = nn.Sequential(
            GroupNorm32(channels),
            nn.SiLU(),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        if style.emb_channels:
            width = out_channels * (2 if style.use_scale_shift_norm else 1)
            self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(style.emb_channels, width))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(),
            Dropout(style.dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        """Map [B, C, H, W] and the timestep embedding [B, E], if any, to [B, C_out, H', W']."""
        return maybe_checkpoint(self.use_checkpoint, self._forward, x, emb)

    def _forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)

        norm, *rest = self.out_layers
        if emb is None:
            h = norm(h)
        elif self.use_scale_shift_norm:
            scale, shift = self._embedded(emb, h).chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + self._embedded(emb, h))
        for layer in rest:
            h = layer(h)
        return cast(Tensor, self.skip_connection(x)) + h

    def _embedded(self, emb: Tensor, like: Tensor) -> Tensor:
        return cast(Tensor, self.emb_layers(emb)).to(like.dtype)[:, :, None, None]


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map.

    The legacy order of the projected channels puts heads before query, key and value; the new order
    puts them after. Published weights need the order they were trained with.
    """

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        per_head = style.num_head_channels
        self.num_heads = style.num_heads if per_head == -1 else channels // per_head
        self.use_new_attention_order = style.use_new_attention_order
        self.use_checkpoint = style.use_checkpoint
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the H * W positions of [B, C, H, W]; the shape is kept."""
        return maybe_checkpoint(self.use_checkpoint, self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        attended = attend(
            _pointwise(self.qkv, self.norm(x).flatten(2)),
            self.num_heads,
            heads_first=not self.use_new_attention_order,
        )
        return x + _pointwise(self.proj_out, attended).reshape(x.shape)


def _pointwise(layer: nn.Conv1d, flat: Tensor) -> Tensor:
    """Apply a convolution of width 1 to [B, C, N] as a linear map.

    This keeps the channels-last memory order that the fast attention kernels require.
    """
    return F.linear(flat.transpose(1, 2), layer.weight[..., 0], layer.bias).transpose(1, 2)


def attend(qkv: Tensor, num_heads: int, *, heads_first: bool) -> Tensor:
    """Compute scaled dot-product attention of stacked queries, keys and values.

    Args:
        qkv: [B, 3C, N], its channels ordered (head, qkv, C/head), or (qkv, head, C/head) when not
            ``heads_first``.
        num_heads: a divisor of C.
        heads_first: the order of the channels.

    Returns:
        [B, C, N].
    """
    split = (num_heads, 3) if heads_first else (3, num_heads)
    parts = qkv.unflatten(1, (*split, -1)).transpose(-1, -2)
    q, k, v = parts.unbind(2 if heads_first else 1)
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)


class TimestepEmbedSequential(nn.Sequential):
    """A sequence of layers that passes the timestep embedding to its residual blocks."""

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:  # type: ignore[override]
        """Apply all layers to [B, C, H, W] with the timestep embedding [B, E], if any."""
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def time_embedding(channels: int) -> nn.Sequential:
    """Build the MLP that follows :func:`timestep_embedding`: [B, C] to [B, 4C]."""
    return nn.Sequential(
        nn.Linear(channels, 4 * channels),
        nn.SiLU(),
        nn.Linear(4 * channels, 4 * channels),
    )


def contracting_path(
    in_channels: int,
    widths: Sequence[int],
    num_res_blocks: int,
    attention_ds: Collection[int],
    style: BlockStyle,
) -> tuple[nn.ModuleList, list[int]]:
    """Build the input blocks of a U-Net or classifier.

    Args:
        in_channels: channels of the input.
        widths: channels of each level, finest first; multiples of 32.
        num_res_blocks: residual blocks per level.
        attention_ds: the downsampling factors (1, 2, 4, ...) whose levels have attention.
        style: options that all blocks share.

    Returns:
        The blocks, and the number of output channels of each.
    """
    stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
    blocks: list[nn.Module] = [TimestepEmbedSequential(stem)]
    channels = [widths[0]]
    for level, width in enumerate(widths):
        own = style.at_level(level)
        for _ in range(num_res_blocks):
            layers: list[nn.Module] = [ResBlock(channels[-1], width, own)]
            if 2**level in attention_ds:
                layers.append(AttentionBlock(width, own))
            blocks.append(TimestepEmbedSequential(*layers))
            channels.append(width)
        if level < len(widths) - 1:
            halving = (
                ResBlock(width, width, own, "down") if style.resblock_updown else Downsample(width)
            )
            blocks.append(TimestepEmbedSequential(halving))
            channels.append(width)
    return nn.ModuleList(blocks), channels


def middle_block(channels: int, style: BlockStyle) -> TimestepEmbedSequential:
    """Build the deepest part: residual, attention, residual."""
    return TimestepEmbedSequential(
        ResBlock(channels, channels, style),
        AttentionBlock(channels, style),
        ResBlock(channels, channels, style),
    )
