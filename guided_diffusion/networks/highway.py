"""MedSegDiff's condition network, the highway: a small U-Net over the image.

Wu et al. (2023), with the tensor names of their published weights (``hwm.*``): an encoder of six
levels of convolution, batch normalisation and leaky ReLU, and a decoder. It predicts a coarse mask
and the feature maps that condition the diffusion network. Features of the diffusion network can
gate it; they pass through an FF-Parser, a filter learned in Fourier space. ``medsegdiff`` connects
the two networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.nn import single_precision

WIDTHS = (32, 64, 128, 256, 480, 480)
"""Channels of each level, finest first; the last is the bottleneck."""
SIZE_MULTIPLE = 2 ** (len(WIDTHS) - 1)
"""Height and width of an image must be multiples of this."""
_SLOPE = 0.01


class HighwayOutput(NamedTuple):
    """The output of the highway for an image.

    Attributes:
        decoded: the decoder's maps, deepest first: [B, 256, H/16, W/16], [B, 128, H/8, W/8],
            [B, 64, H/4, W/4], [B, 32, H/2, W/2], [B, 32, H, W].
        bottleneck: the deepest map, [B, 480, H/32, W/32].
        coarse: the coarse mask, float32 [B, K, H, W] in (0, 1).
    """

    decoded: list[Tensor]
    bottleneck: Tensor
    coarse: Tensor


class Highway(nn.Module):
    """The condition network.

    Args:
        in_channels: channels of the image.
        mask_channels: K, channels of the coarse mask.
        gate_channels: channels of the diffusion network's maps that gate the outermost levels, at
            the sizes of levels 1, 2, ... Empty for no gates.
        image_size: height and width the gates' filters are made for; they are interpolated for
            others.

    Its activations are never recomputed to save memory: a second pass would count each batch twice
    in the running statistics.
    """

    def __init__(
        self,
        in_channels: int,
        mask_channels: int = 1,
        *,
        gate_channels: Sequence[int] = (),
        image_size: int = 256,
    ) -> None:
        super().__init__()
        # The decoder comes first, in the order of published tensors.
        self.conv_blocks_localization = nn.ModuleList(
            nn.ModuleList([Level([2 * wide, wide]), Level([wide, narrow])])
            for wide, narrow in pairwise([*WIDTHS[-2::-1], WIDTHS[0]])
        )
        first, deepest = WIDTHS[0], WIDTHS[-1]
        outer = [Level([in_channels, first, first], dropout=0.5)]
        outer += [Level([i, o, o], dropout=0.5) for i, o in pairwise(WIDTHS[:-1])]
        inner = [Level([WIDTHS[-2], deepest], 0.5), Level([deepest, deepest], 0.5)]
        self.conv_blocks_context = nn.ModuleList([*outer, nn.Sequential(*inner)])
        if gate_channels:
            pairs = list(zip(gate_channels, WIDTHS, strict=False))
            self.conv_trans_blocks_a = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in pairs)
            self.conv_trans_blocks_b = nn.ModuleList(nn.Conv2d(o, 1, 1) for _, o in pairs)
            self.ffparser = nn.ModuleList(
                FFParser(width, image_size // 2 ** (level + 1))
                for level, (_, width) in enumerate(pairs)
            )
        self.seg_outputs = nn.ModuleList([nn.Conv2d(first, mask_channels, 1, bias=False)])
        self.apply(_initialise)

    def enter(self, image: Tensor) -> Tensor:
        """Compute the first level's map [B, 32, H, W] of an image [B, C, H, W].

        It depends on the image alone, with or without gates.

        Raises:
            ValueError: H or W is not a multiple of 32.
        """
        if image.shape[-1] % SIZE_MULTIPLE or image.shape[-2] % SIZE_MULTIPLE:
            raise ValueError(f"an image of {tuple(image.shape[-2:])} cannot be halved 5 times")
        return cast(Tensor, self.conv_blocks_context[0](image))

    def forward(self, first: Tensor, features: Sequence[Tensor] = ()) -> HighwayOutput:
        """Encode and decode.

        Args:
            first: the result of :meth:`enter`, [B, 32, H, W].
            features: maps of the diffusion network, one per gate: [B, C_d, H / 2^(d+1), W /
                2^(d+1)].
        """
        skips, x = [first], first
        for level, block in enumerate(self.conv_blocks_context[1:]):
            x = F.max_pool2d(x, 2)
            if level < len(features):
                x = self.gate(x, features[level], level)
            x = block(x)
            skips.append(x)

        bottleneck, decoded = skips.pop(), []
        x = bottleneck
        for merge, narrow in cast("list[nn.ModuleList]", self.conv_blocks_localization):
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
            x = narrow(merge(torch.cat([x, skips.pop()], dim=1)))
            decoded.append(x)
        return HighwayOutput(decoded, bottleneck, self.seg_outputs[0](x).float().sigmoid())

    def gate(self, x: Tensor, feature: Tensor, level: int) -> Tensor:
        """Weigh a map [B, C, h, w] per pixel and per channel by a feature of the diffusion network.

        The feature is projected to C channels and filtered by the FF-Parser. A further convolution
        of it weighs the pixels, and its mean over all pixels weighs the channels.
        """
        g = self.ffparser[level](self.conv_trans_blocks_a[level](feature)).to(x.dtype)
        per_pixel = self.conv_trans_blocks_b[level](g)
        return x * per_pixel * g.mean(dim=(-2, -1), keepdim=True)


class Level(nn.Module):
    """A sequence of convolution units with these channels."""

    def __init__(self, channels: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ConvUnit(i, o, dropout) for i, o in pairwise(channels)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_0, h, w] to [B, C_n, h, w]."""
        return cast(Tensor, self.blocks(x))


class ConvUnit(nn.Module):
    """Convolution, dropout of whole channels, batch normalisation, leaky ReLU."""

    def __init__(self, channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.instnorm = BatchNorm32(out_channels)  # the published name, though it is batch norm
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C_out, h, w]."""
        x = F.dropout2d(self.conv(x), self.dropout, self.training)
        return F.leaky_relu(self.instnorm(x), _SLOPE)


class BatchNorm32(nn.BatchNorm2d):
    """Batch normalisation in the dtype of its weights, whatever the input's dtype.

    A single value has no variance: a batch of one image whose map is one pixel is normalised by the
    running statistics, in training too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, h, w]; the dtype of ``x`` is kept."""
        value = x.to(self.weight.dtype)
        if x.numel() > self.num_features or not self.training:
            return super().forward(value).to(x.dtype)
        parameters = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(value, *parameters, eps=self.eps).to(x.dtype)


class FFParser(nn.Module):
    """FF-Parser, Wu et al. (2023): a learned complex weight per frequency and channel.

    Args:
        channels: C.
        size: h = w of the maps for which there is one weight per frequency. For maps of other sizes
            the weights are interpolated by frequency in cycles per pixel.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        noise = 0.02 * torch.randn(channels, size, size // 2 + 1, 2)
        # Published networks start with this noise alone, which closes their gates.
        self.complex_weight = nn.Parameter(noise + torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        """Filter [B, C, h, w], periodic at its borders; float32 whatever the dtype of ``x``."""
        with single_precision(x):
            # The parts of a complex number are adjacent in memory; channels_last separates them.
            weight = interpolate_spectrum(self.complex_weight.contiguous(), x.shape[-2:])
            spectrum = torch.fft.rfft2(x.to(weight.dtype), norm="ortho")
            spectrum = spectrum * torch.view_as_complex(weight.contiguous())
            return torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")


def interpolate_spectrum(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate a filter linearly to the frequencies of maps of another size.

    Args:
        weight: [C, H, W/2 + 1, 2], in the order of ``rfft2``; W even.
        size: (h, w) of the maps.

    Returns:
        [C, h, w/2 + 1, 2]; ``weight`` itself if the sizes agree.
    """
    own = (weight.shape[1], 2 * (weight.shape[2] - 1))
    if own == tuple(size):
        return weight
    device, dtype = weight.device, weight.dtype
    rows = torch.fft.fftfreq(size[0], device=device, dtype=dtype) * own[0]
    columns = torch.fft.rfftfreq(size[1], device=device, dtype=dtype) * own[1]
    # Rows are periodic, row H is row 0; columns end at the highest frequency.
    down = _interpolation(rows, own[0], periodic=True)
    across = _interpolation(columns, own[1] // 2 + 1, periodic=False)
    return torch.einsum("hH,cHWz,wW->chwz", down, weight, across)


def _interpolation(positions: Tensor, count: int, *, periodic: bool) -> Tensor:
    """Weights [n, count] that interpolate ``count`` values at fractional positions [n]."""
    low = positions.floor()
    part = (positions - low)[:, None]
    low, high = low.long(), low.long() + 1
    low, high = (low % count, high % count) if periodic else (low, high.clamp(max=count - 1))
    one_hot = torch.eye(count, device=positions.device, dtype=positions.dtype)
    return (1 - part) * one_hot[low] + part * one_hot[high]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, a=_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
