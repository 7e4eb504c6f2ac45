"""The SS-Former of MedSegDiff-V2: band-limited cross-attention between spectra.

Wu et al. (2024), the sections on the spectrum-space transformer and on the neural band-pass filter;
each function is one of their equations. ``medsegdiff_v2`` builds the network from these blocks and
lists what the paper leaves open. A spectrum here is the orthonormal two-dimensional Fourier
transform of every channel, with its N = h * w frequencies in the order of ``torch.fft.fft2``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from guided_diffusion.nn import GroupNorm32, single_precision


def spectrum(x: Tensor) -> Tensor:
    """F: the spectrum complex64 [B, N, C] of a map [B, C, h, w] of any precision."""
    return torch.fft.fft2(x.float(), norm="ortho").flatten(2).transpose(1, 2)


def inverse_spectrum(spectra: Tensor, size: Sequence[int]) -> Tensor:
    """F^-1: the map float32 [B, C, h, w] of a spectrum [B, N, C]; ``size`` is (h, w).

    Only the real part is returned.
    """
    shaped = spectra.transpose(1, 2).unflatten(-1, tuple(size))
    return torch.fft.ifft2(shaped, norm="ortho").real


def affinity(query: Tensor, key: Tensor, period: Tensor) -> Tensor:
    """M = sin(w . Q K^T): how much each frequency of the query attends to each of the key.

    Args:
        query: spectrum complex64 [B, N, C], F(c0) W_q.
        key: spectrum complex64 [B, N, C], F(e) W_k.
        period: w, [1].

    Returns:
        float32 [B, N, N] in [-1, 1]. The product is the real part of one spectrum times the
        conjugate of the other, divided by the square root of C.
    """
    product = query.real @ key.real.mT + query.imag @ key.imag.mT
    return torch.sin(period * product / math.sqrt(query.shape[-1]))


def pass_band(m: Tensor, gain: Tensor) -> Tensor:
    """M' = M . filter, element by element: M [B, N, N] and the gain of each frequency [B, N].

    The filter is the product of the gains of an element's two frequencies.
    """
    return m * gain[:, :, None] * gain[:, None, :]


def mix_spectrum(m: Tensor, value: Tensor) -> Tensor:
    """f = F^-1(M) (c0 W_v): mix the spectrum of a map [B, C, h, w] by M [B, N, N] float32.

    The inverse transform of an operator M on spectra is the operator on maps that transforms, mixes
    by M and transforms back. The sum over N frequencies is divided by the square root of N, so that
    its scale does not grow with the map.
    """
    values = spectrum(value)
    mixed = torch.complex(m @ values.real, m @ values.imag) / math.sqrt(m.shape[-1])
    return inverse_spectrum(mixed, value.shape[-2:])


class NeuralBandPass(nn.Module):
    """The neural band-pass filter: a gain in (0, 1) per frequency, conditioned on the timestep.

    A small convolutional network over a grid of coordinates. Between its two convolutions, the
    timestep embedding sets scale and shift of each channel by adaptive instance normalisation.
    """

    def __init__(self, emb_channels: int, hidden: int = 32) -> None:
        super().__init__()
        self.read = nn.Conv2d(3, hidden, 3, padding=1, padding_mode="circular")
        # The embedding's projection; its name is part of the tensor names in checkpoints.
        self.told = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * hidden))
        self.write = nn.Conv2d(hidden, 1, 3, padding=1, padding_mode="circular")
        nn.init.constant_(self.write.bias, 2.0)  # type: ignore[arg-type]  # gains near 1

    def forward(self, emb: Tensor, size: Sequence[int]) -> Tensor:
        """Gains float32 [B, N] for timestep embeddings [B, E] and maps of ``size`` (h, w)."""
        scale, shift = self.told(emb)[:, :, None, None].float().chunk(2, dim=1)
        h = self.read(coordinates(size, emb)[None])
        h = adaptive_instance_norm(h.float(), scale, shift)
        return torch.sigmoid(self.write(nn.functional.silu(h)).float()).flatten(1)


def coordinates(size: Sequence[int], like: Tensor) -> Tensor:
    """Coordinates of each frequency: float32 [3, h, w], in units of the highest.

    Vertical and horizontal frequency, and their distance from zero; on the device of ``like``.
    """
    axes = (2 * torch.fft.fftfreq(n, device=like.device) for n in size)
    grid = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([*grid, torch.hypot(*grid)])


def adaptive_instance_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """AdaIN, Huang & Belongie (2017), eq. 8: x [B or 1, C, h, w], scale and shift [B, C, 1, 1].

    Each channel of each image is normalised, multiplied by 1 + scale, and shifted.
    """
    mean = x.mean(dim=(-2, -1), keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=(-2, -1), keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) * (1 + scale) + shift


class SpectrumAttention(nn.Module):
    """A cross-attention in Fourier space, followed by an MLP."""

    def __init__(self, channels: int, emb_channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(GroupNorm32(channels) for _ in range(3))
        self.projections = nn.ModuleList(
            nn.Conv2d(channels, channels, 1, bias=False) for _ in range(3)
        )
        self.period = nn.Parameter(torch.ones(1))
        self.band = NeuralBandPass(emb_channels)
        self.mlp = nn.Sequential(
            GroupNorm32(channels),
            nn.Conv2d(channels, 2 * channels, 1),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, 1),
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, emb: Tensor) -> Tensor:
        """Refine ``value`` by attention of ``query`` to ``key``: [B, C, h, w] each, as the result.

        The projections W_q, W_k and W_v act on channels and so commute with F.
        """
        q, k, v = (
            project(norm(x))
            for project, norm, x in zip(
                self.projections, self.norms, (query, key, value), strict=True
            )
        )
        gain = self.band(emb, query.shape[-2:])
        with single_precision(query):  # phases need full precision
            m = pass_band(affinity(spectrum(q), spectrum(k), self.period), gain)
            f = mix_spectrum(m, v)
        refined = value + f.to(value.dtype)
        return cast(Tensor, refined + self.mlp(refined))


class SSFormerBlock(nn.Module):
    """Two symmetric cross-attentions: of the condition to the diffusion, and back."""

    def __init__(self, channels: int, emb_channels: int) -> None:
        super().__init__()
        self.blend = SpectrumAttention(channels, emb_channels)
        self.carry = SpectrumAttention(channels, emb_channels)

    def forward(self, c: Tensor, e: Tensor, emb: Tensor) -> Tensor:
        """Blend the condition's embedding with the diffusion's.

        Args:
            c: deepest embedding of the condition, or the previous block's result, [B, C, h, w].
            e: deepest embedding of the diffusion model, [B, C, h, w].
            emb: timestep embedding [B, E].

        Returns:
            [B, C, h, w], the condition of the next block.
        """
        blended = self.blend(c, e, c, emb)
        return cast(Tensor, self.carry(blended, e, e, emb))
