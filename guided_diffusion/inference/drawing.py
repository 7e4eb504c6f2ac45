"""Drawing the masks of some images, in batches of a fixed size.

The masks of a case are numbered over all networks: those of the first network, then of the second,
and so on; of each network first those of the image as it is, then those of the flipped one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from guided_diffusion.dist_util import autocast
from guided_diffusion.gaussian_diffusion import (
    Denoiser,
    GaussianDiffusion,
    Network,
    Prediction,
)
from guided_diffusion.inference.plan import SamplingPlan, batched, padded
from guided_diffusion.nn import Dropout, Output
from guided_diffusion.sampling import SAMPLERS, STOCHASTIC, MemberNoise, member_seed
from guided_diffusion.sampling import direct as direct_sampler
from guided_diffusion.schedule import NoiseLevel
from guided_diffusion.unet import Condition, UNetModel

StepCallback = Callable[[Tensor, NoiseLevel, Prediction], object]
"""Called with every network evaluation: the noisy masks, their level, and the prediction."""


class TrainedNetwork(NamedTuple):
    """A network on its device, the diffusion it was trained for, and how its masks are drawn.

    ``source`` says where its weights are from.
    """

    net: UNetModel
    diffusion: GaussianDiffusion
    plan: SamplingPlan
    source: str = ""


class Draws(NamedTuple):
    """What was drawn for some cases, at the network's size and on the CPU.

    Attributes:
        members: soft masks, float32 [B, E, K, h, w] in [0, 1].
        coarse: the coarse mask at the last evaluation, averaged over the members where they make
            it differ, float32 [B, K, h, w]; None where no network has one.
        direct: the answer without a noisy mask, soft, float32 [B, K, h, w] in [0, 1], or the mean
            of the first answers of a network that has none; None unless it is fused.
    """

    members: Tensor
    coarse: Tensor | None = None
    direct: Tensor | None = None

    def case(self, index: int) -> Draws:
        """What was drawn for one case, without the axis B."""
        coarse, direct = (
            None if part is None else part[index] for part in (self.coarse, self.direct)
        )
        return Draws(self.members[index], coarse, direct)

    def flipped(self) -> Draws:
        """All masks flipped left to right."""
        coarse, direct = (
            None if part is None else part.flip(-1) for part in (self.coarse, self.direct)
        )
        return Draws(self.members.flip(-1), coarse, direct)


def joined(parts: Sequence[Draws]) -> Draws:
    """Join what was drawn for several lots of cases."""
    coarse = [part.coarse for part in parts if part.coarse is not None]
    direct = [part.direct for part in parts if part.direct is not None]
    return Draws(
        torch.cat([part.members for part in parts]),
        torch.cat(coarse) if coarse else None,
        torch.cat(direct) if direct else None,
    )


def draw_all(
    networks: Sequence[TrainedNetwork],
    images: Tensor,
    names: Sequence[str],
    callback: StepCallback | None = None,
) -> Draws:
    """Draw the members of some cases by several networks: see :func:`draw`.

    The coarse masks, and the answers without a noisy mask, are averaged over networks and flips.
    """
    parts: list[Draws] = []
    first = 0
    for net, diffusion, plan, _ in networks:
        for flip in (False, True)[: 1 + plan.flip_members]:
            seen = images.flip(-1) if flip else images
            drawn = draw(net, diffusion, plan, seen, names, callback, first=first)
            parts.append(drawn.flipped() if flip else drawn)
            first += plan.num_ensemble
    return Draws(
        torch.cat([part.members for part in parts], dim=1),
        _average([part.coarse for part in parts]),
        _average([part.direct for part in parts]),
    )


def _average(masks: Sequence[Tensor | None]) -> Tensor | None:
    """The mean of those masks that there are."""
    found = [mask for mask in masks if mask is not None]
    return torch.stack(found).mean(dim=0) if found else None


@torch.inference_mode()
def draw(
    net: UNetModel,
    diffusion: GaussianDiffusion,
    plan: SamplingPlan,
    images: Tensor,
    names: Sequence[str],
    callback: StepCallback | None = None,
    *,
    first: int = 0,
) -> Draws:
    """Draw the members of some cases with one network.

    Args:
        net: on its device.
        diffusion: that it was trained for.
        plan: how masks are drawn.
        images: at the network's size, float32 [B, C, h, w].
        names: of the B cases; they seed the noise.
        callback: called with every network evaluation.
        first: number of the first member of each case, which seeds its noise.
    """
    device = next(net.parameters()).device
    with autocast(device, plan.precision):
        condition = net.encode(images.to(device))
    shape = (net.mask_channels, *images.shape[-2:])
    like = torch.empty(1, *shape, device=device)
    raw = None
    if plan.needs_direct and diffusion.mask_dropout:
        raw = _without_mask(net, diffusion, plan, condition, like.expand(len(images), *shape))
    walk = direct_sampler if plan.sampler == "direct" else SAMPLERS[plan.sampler]
    numbers = range(first, first + plan.num_ensemble)
    members = [(case, i) for case in range(len(images)) for i in numbers]
    masks, coarse, answers = [], [], []
    for chunk in batched(members, plan.inputs if plan.compile else plan.batch_size):
        inputs = padded(chunk, plan.inputs) if plan.compile else chunk
        noise = MemberNoise([member_seed(plan.seed, names[case], i) for case, i in inputs])
        cases = torch.tensor([case for case, _ in inputs], device=device)
        network: Network = net
        if plan.dropout_members:
            dropped = (member_seed(plan.seed, f"{names[case]}/dropout", i) for case, i in inputs)
            network = _WithDropout(net, [*dropped])
        denoise = diffusion.denoiser(
            network,
            condition.rows(cases),
            clip=plan.clip,
            direct=None if raw is None else raw[cases],
            guidance=1.0 if plan.sampler == "direct" else plan.mask_guidance,
        )
        observed = _Observed(denoise, callback)
        x = plan.temperature * noise(like.expand(len(inputs), *shape))
        options = plan.options | ({"randn_like": noise} if plan.sampler in STOCHASTIC else {})
        with autocast(device, plan.precision):
            x0 = walk(observed, x, plan.levels, **options)
        kept = slice(len(chunk))
        masks.append(diffusion.from_range(x0[kept]).float().cpu())
        if observed.coarse is not None:
            coarse.append(observed.coarse[kept].float().cpu())
        if observed.first is not None and plan.fusion == "direct" and raw is None:
            answers.append(diffusion.from_range(observed.first[kept]).float().cpu())

    def by_case(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([*parts]).unflatten(0, (len(images), plan.num_ensemble))

    direct = by_case(answers).mean(dim=1) if answers else None
    if raw is not None and plan.fusion == "direct":
        direct = diffusion.soft_mask(raw).float().cpu()
    return Draws(by_case(masks), by_case(coarse).mean(dim=1) if coarse else None, direct)


def _without_mask(
    net: UNetModel,
    diffusion: GaussianDiffusion,
    plan: SamplingPlan,
    condition: Condition,
    like: Tensor,
) -> Tensor:
    """Evaluate the network without a noisy mask, raw and of the shape of ``like`` [B, K, h, w]."""
    done = []
    for chunk in batched(range(len(like)), plan.inputs if plan.compile else plan.batch_size):
        rows = torch.tensor(padded(chunk, plan.inputs) if plan.compile else chunk)
        rows = rows.to(like.device)
        with autocast(like.device, plan.precision):
            raw = diffusion.direct(net, condition.rows(rows), like[rows])
        done.append(raw[: len(chunk)])
    return torch.cat(done)


class _WithDropout:
    """A network whose dropout layers stay active, with other masks at every call.

    The masks of a row follow from its seed and the number of the call alone. What a network's
    ``encode`` computes once for all members is without dropout.
    """

    def __init__(self, net: UNetModel, seeds: Sequence[int]) -> None:
        self.net = net
        self.layers = [layer for layer in net.modules() if isinstance(layer, Dropout)]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, y: Tensor | None) -> Output:
        count = (len(self.layers),)
        rows = [torch.randint(2**31, count, generator=own) for own in self.generators]
        keys = torch.stack(rows, dim=1).to(torch.int32).to(x.device)
        for layer, own in zip(self.layers, keys, strict=True):
            layer.keys = own
        try:
            return cast(Output, self.net(x, t, condition, y))
        finally:
            for layer in self.layers:
                layer.keys = None


class _Observed:
    """A denoiser that hands every prediction to a callback.

    It keeps the first clean mask, and the coarse mask of the last call.
    """

    def __init__(self, denoise: Denoiser, callback: StepCallback | None) -> None:
        self.denoise, self.callback = denoise, callback
        self.first: Tensor | None = None
        self.coarse: Tensor | None = None

    def __call__(self, x: Tensor, level: NoiseLevel) -> Prediction:
        prediction = self.denoise(x, level)
        self.first = prediction.x0 if self.first is None else self.first
        self.coarse = prediction.coarse
        if self.callback:
            self.callback(x, level, prediction)
        return prediction
