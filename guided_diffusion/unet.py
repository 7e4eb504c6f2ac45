"""The U-Net that denoises a mask conditioned on an image.

The network and tensor names of Dhariwal & Nichol (2021); as in Wolleb et al. (2022), image and
noisy mask are concatenated as input channels, and the image is never noised. A convolution is
linear, so the image's part of the first one is computed once per image (:meth:`UNetModel.encode`)
and shared by all ensemble members and all steps.

:class:`DirectUNet` is the same U-Net without diffusion: the baseline of every comparison.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.nn import (
    AttentionBlock,
    BlockStyle,
    GroupNorm32,
    Output,
    ResBlock,
    TimestepEmbedSequential,
    Upsample,
    contracting_path,
    middle_block,
    time_embedding,
    timestep_embedding,
    zeroed,
)

AnyCondition = TypeVar("AnyCondition", bound="Condition")


@dataclass(frozen=True, eq=False)
class Condition:
    """The part of a forward pass that depends on the image alone.

    Subclasses add fields, tensors [B, ...], for networks that compute more from the image.

    Attributes:
        stem: the image's part of the first feature map, [B, C, H, W].
    """

    stem: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return (getattr(self, entry.name) for entry in fields(self))

    def rows(self: AnyCondition, index: Tensor) -> AnyCondition:
        """Select the condition of image ``index[i]`` for the i-th network input."""
        return type(self)(*(value[index] for value in self))


class UNetModel(nn.Module):
    """U-Net with residual and attention blocks, conditioned on an image and the timestep.

    Args:
        image_size: height and width that attention and depth were chosen for; others work too.
        in_channels: image channels plus mask channels; mask channels only if there is no condition.
        model_channels: width of the first level, a multiple of 32.
        out_channels: K, or 2K with a learned variance.
        num_res_blocks: residual blocks per level.
        attention_resolutions: downsampling factors with attention, e.g. ``(16,)``.
        mask_channels: K, the last of the input channels.
        channel_mult: width of each level in units of ``model_channels``.
        num_classes: number of class labels, for a class-conditional network.
        use_checkpoint: recompute activations in the backward pass, to save memory.
        checkpoint_levels: of so many levels, the finest first.
        num_heads_upsample: attention heads of the expanding path; -1 for ``num_heads``.
        diffuses: the network sees a noisy mask and the timestep; see :class:`DirectUNet`.

    The other arguments are those of :class:`guided_diffusion.nn.BlockStyle`.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Collection[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        *,
        mask_channels: int = 1,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        checkpoint_levels: int = 1000,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        diffuses: bool = True,
    ) -> None:
        super().__init__()
        # Attributes that other modules read.
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.mask_channels = mask_channels
        self.num_classes = num_classes
        self.num_res_blocks = num_res_blocks
        self.widths = widths = [int(mult * model_channels) for mult in channel_mult]

        # Options of all blocks; the expanding path may have another number of heads.
        style = BlockStyle(
            emb_channels=4 * model_channels if diffuses else 0,
            dropout=dropout,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_checkpoint=use_checkpoint,
            checkpoint_levels=checkpoint_levels,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_new_attention_order=use_new_attention_order,
        )
        self.style = style
        decoder_style = (
            style if num_heads_upsample == -1 else replace(style, num_heads=num_heads_upsample)
        )

        # The embedding of the timestep and of the class label.
        if diffuses:
            self.time_embed = time_embedding(model_channels)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, style.emb_channels)

        # The two paths; every input block has a skip connection to an output block.
        self.input_blocks, skips = contracting_path(
            in_channels - (0 if diffuses else mask_channels),
            widths,
            num_res_blocks,
            attention_resolutions,
            style,
        )
        self.middle_block = middle_block(widths[-1], style.at_level(len(widths) - 1))
        self.output_blocks = _expanding_path(
            skips, widths, num_res_blocks, attention_resolutions, decoder_style
        )

        # The output starts at zero.
        self.out = nn.Sequential(
            GroupNorm32(widths[0]),
            nn.SiLU(),
            zeroed(nn.Conv2d(widths[0], out_channels, 3, padding=1)),
        )

    def encode(self, image: Tensor) -> Condition:
        """Compute what depends on the image alone.

        Args:
            image: [B, C, H, W]; H and W divisible by 2^(number of halvings). C may be 0.
        """
        weight, bias = self._stem
        if not image.shape[1]:  # torch leaves the result of such a convolution uninitialised
            return Condition(bias[:, None, None].expand(len(image), -1, *image.shape[2:]))
        return Condition(F.conv2d(image, weight[:, : image.shape[1]], bias, padding=1))

    def forward(
        self, x: Tensor, t: Tensor, condition: Condition, y: Tensor | None = None
    ) -> Output:
        """Predict from a noisy mask.

        Args:
            x: noisy mask [B, K, H, W].
            t: timesteps [B], fractional ones allowed.
            condition: of the B images, from :meth:`encode`.
            y: class labels int64 [B], or float [B, n] weights of the embeddings of the first n
                classes; for class-conditional networks only, and required by them.

        Raises:
            ValueError: ``y`` is missing or unexpected.
        """
        emb = self.embed(t, y)
        skips = self.contract(self.enter(x, condition), emb)
        return Output(self.expand(skips[-1], skips, emb))

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return published weights with neutral values for the tensors that they lack."""
        return dict(weights)

    def embed(self, t: Tensor, y: Tensor | None = None) -> Tensor | None:
        """Embed timesteps [B], and class labels, as [B, E]."""
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("class labels y are for class-conditional networks, which need them")
        weight, _ = self._stem
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(weight.dtype))
        return emb if y is None else emb + self._embedded(y)

    def enter(self, x: Tensor, condition: Condition) -> Tensor:
        """Compute the first feature map [B, C, H, W] of a noisy mask [B, K, H, W]."""
        weight, _ = self._stem
        return condition.stem + F.conv2d(x, weight[:, -x.shape[1] :], padding=1)

    def contract(self, h: Tensor, emb: Tensor | None) -> list[Tensor]:
        """Compute the outputs of all input blocks from the first one's, finest first."""
        skips = [h]
        for block in self.input_blocks[1:]:
            skips.append(block(skips[-1], emb))
        return skips

    def expand(self, h: Tensor, skips: Sequence[Tensor], emb: Tensor | None) -> Tensor:
        """Compute the raw prediction from the deepest feature map and the input blocks' outputs."""
        h = self.middle_block(h, emb)
        for block, skip in zip(self.output_blocks, reversed(skips), strict=True):
            h = block(torch.cat([h, skip], dim=1), emb)
        return cast(Tensor, self.out(h))

    def _embedded(self, y: Tensor) -> Tensor:
        if y.is_floating_point():
            weight = self.label_emb.weight
            return y.to(weight.dtype) @ weight[: y.shape[1]]
        return cast(Tensor, self.label_emb(y))

    @property
    def _stem(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the first convolution; image channels first, mask channels last."""
        first = "input_blocks.0.0"
        return self.get_parameter(f"{first}.weight"), self.get_parameter(f"{first}.bias")


class DirectUNet(UNetModel):
    """The same U-Net as a plain segmentation network: no time, no noisy mask, one evaluation.

    Its arguments are those of :class:`UNetModel`, so ``in_channels`` counts the mask channels too,
    and it is called alike, but what the noisy mask and the timestep are has no effect.
    """

    def __init__(self, *args: Any, num_classes: int | None = None, **options: Any) -> None:
        if num_classes is not None:
            raise ValueError("a plain segmentation network takes no class labels")
        super().__init__(*args, diffuses=False, **options)

    def embed(self, t: Tensor, y: Tensor | None = None) -> None:
        """Embed nothing."""

    def enter(self, x: Tensor, condition: Condition) -> Tensor:
        """Return the image's first feature map [B, C, H, W]; the noisy mask has no part in it."""
        return condition.stem


def _expanding_path(
    skips: Sequence[int],
    widths: Sequence[int],
    num_res_blocks: int,
    attention_ds: Collection[int],
    style: BlockStyle,
) -> nn.ModuleList:
    """Build the output blocks: one per skip connection, deepest first."""
    remaining = list(skips)
    channels = widths[-1]
    blocks = []
    for level, width in reversed(list(enumerate(widths))):
        own = style.at_level(level)
        for position in range(num_res_blocks + 1):
            layers: list[nn.Module] = [ResBlock(channels + remaining.pop(), width, own)]
            channels = width
            if 2**level in attention_ds:
                layers.append(AttentionBlock(width, own))
            if level and position == num_res_blocks:
                layers.append(
                    ResBlock(width, width, own, "up") if own.resblock_updown else Upsample(width)
                )
            blocks.append(TimestepEmbedSequential(*layers))
    return nn.ModuleList(blocks)


class EncodeAndPredict(nn.Module):
    """From image and noisy mask to prediction in one call, as distributed training needs it."""

    def __init__(self, net: UNetModel) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, image: Tensor, y: Tensor | None = None) -> Output:
        """Predict as :meth:`UNetModel.forward`, for ``image`` [B, C, H, W]."""
        return self.net(x, t, self.net.encode(image), y)
