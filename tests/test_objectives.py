"""The losses of the clean mask by hand, and Bayes' rule on one pixel, which every sampler obeys."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NETWORK, refused, script
from torch import Tensor
from torch.testing import assert_close

from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.inference.plan import sampling_levels
from guided_diffusion.losses import mask_cross_entropy, mask_probability
from guided_diffusion.nn import Output
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.objective import resolve_objective
from guided_diffusion.options.segmentation import SamplingOptions
from guided_diffusion.sampling import SAMPLERS, STOCHASTIC
from guided_diffusion.schedule import NoiseSchedule
from guided_diffusion.script_util import create_model_and_diffusion

Terms = dict[str, Tensor]
STEPS = 50
LAST = STEPS - 1


def process(**options: Any) -> GaussianDiffusion:
    """A diffusion of masks in {-1, 1} whose network predicts the clean mask."""
    given = {"predict_xstart": True, "mask_range": (-1.0, 1.0), **options}
    return GaussianDiffusion(schedule=NoiseSchedule.named("linear", STEPS), **given)


def masks(*shares: int, rows: int = 1) -> Tensor:
    """Masks [rows, K, 4, 5] in [0, 1]; class k has so many pixels, and no two classes overlap."""
    flat, start = torch.zeros(len(shares), 20, dtype=torch.float64), 0
    for channel, share in zip(flat, shares, strict=True):
        channel[start : start + share] = 1
        start += share
    return flat.unflatten(1, (4, 5)).expand(rows, -1, -1, -1)


def losses_of(
    diffusion: GaussianDiffusion,
    logits: list[float],
    mask: Tensor,
    *,
    t: int = 10,
    withheld: bool = False,
) -> tuple[Terms, Tensor]:
    """The terms of a network that gives every pixel these values, and their gradient [K]."""
    raw = torch.tensor(logits, dtype=torch.float64, requires_grad=True)

    def net(x: Tensor, *_: Any) -> Output:
        return Output(raw[None, :, None, None].expand_as(x))

    terms = diffusion.training_losses(
        net,
        diffusion.to_range(mask),
        torch.full((len(mask),), t),
        eps=torch.ones_like(mask),
        condition=None,
        withheld=torch.full((len(mask),), withheld),
    )
    (gradient,) = torch.autograd.grad(terms["loss"].sum(), raw)
    return {name: value.detach() for name, value in terms.items()}, gradient


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def dice_by_hand(p: float, share: int, pixels: int = 20) -> tuple[float, float]:
    """1 - Dice of a mask of the constant value p, and its derivative by p."""
    above, below = 2 * p * share + 1, pixels * p + share + 1
    return 1 - above / below, (above * pixels - 2 * share * below) / below**2


@pytest.mark.parametrize("withheld", [False, True])
def test_the_squared_error_by_hand(withheld: bool) -> None:
    terms, gradient = losses_of(process(), [0.3], masks(5), withheld=withheld)
    assert_close(terms["loss"].item(), (5 * 0.7**2 + 15 * 1.3**2) / 20)
    assert terms.keys() == {"loss", "mse"}
    assert_close(gradient.item(), 2 * (5 * -0.7 + 15 * 1.3) / 20)


@pytest.mark.parametrize("loss", ["bce", "dice_ce"])
@pytest.mark.parametrize("logit", [-1.5, 0.0, 2.0, 80.0])
def test_the_cross_entropy_of_one_class_by_hand(loss: str, logit: float) -> None:
    """It is finite where the probability rounds to 1; Dice counts nothing along the path."""
    terms, gradient = losses_of(process(mask_loss=loss), [logit], masks(5))
    entropy = -(5 * -math.log1p(math.exp(-logit)) + 15 * (-logit - math.log1p(math.exp(-logit))))
    assert_close(terms["loss"].item(), entropy / 20)
    assert_close(terms["ce"], terms["loss"])
    assert_close(gradient.item(), sigmoid(logit) - 5 / 20)


@pytest.mark.parametrize(("t", "withheld"), [(LAST, False), (10, True), (0, True), (LAST, True)])
@pytest.mark.parametrize("exclusive", [False, True])
def test_dice_counts_where_the_noisy_mask_tells_nothing(
    t: int, withheld: bool, exclusive: bool
) -> None:
    diffusion = process(mask_loss="dice_ce", exclusive=exclusive)
    terms, gradient = losses_of(diffusion, [0.4], masks(5), t=t, withheld=withheld)
    p = sigmoid(0.4)
    dice, slope = dice_by_hand(p, 5)
    assert_close(terms["dice"].item(), dice)
    assert_close(terms["loss"], terms["ce"] + terms["dice"])
    assert_close(gradient.item(), p - 5 / 20 + slope * p * (1 - p))


@pytest.mark.parametrize("t", [0, 10, LAST - 1])
def test_dice_is_reported_but_not_trained_along_the_path(t: int) -> None:
    terms, gradient = losses_of(process(mask_loss="dice_ce"), [0.4], masks(5), t=t)
    assert_close(terms["dice"].item(), dice_by_hand(sigmoid(0.4), 5)[0])
    assert_close(terms["loss"], terms["ce"])
    assert_close(gradient.item(), sigmoid(0.4) - 5 / 20)


def test_the_last_timestep_is_the_last_that_is_trained() -> None:
    diffusion = process(mask_loss="dice_ce", timesteps=(0, 10, 30))
    assert diffusion.last == 30
    counted = [
        bool(terms["loss"] > terms["ce"])
        for terms, _ in (losses_of(diffusion, [0.4], masks(5), t=t) for t in (0, 10, 30))
    ]
    assert counted == [False, False, True]


def test_bce_has_no_dice() -> None:
    terms, gradient = losses_of(process(mask_loss="bce"), [0.4], masks(5), withheld=True)
    assert terms.keys() == {"loss", "ce"}
    assert_close(gradient.item(), sigmoid(0.4) - 5 / 20)


def test_overlapping_classes_have_a_sigmoid_each() -> None:
    """The mean over two classes; the second one's mask is not below the background's."""
    terms, gradient = losses_of(process(mask_loss="dice_ce"), [0.4, -1.0], masks(5, 8), t=LAST)
    dice, grads, entropy = 0.0, [], 0.0
    for logit, share in ((0.4, 5), (-1.0, 8)):
        p = sigmoid(logit)
        value, slope = dice_by_hand(p, share)
        dice += value / 2
        entropy -= (share * math.log(p) + (20 - share) * math.log(1 - p)) / 40
        grads.append((p - share / 20 + slope * p * (1 - p)) / 2)
    assert_close(terms["ce"].item(), entropy)
    assert_close(terms["dice"].item(), dice)
    assert_close(terms["loss"].item(), entropy + dice)
    assert_close(gradient.tolist(), grads)


def test_exclusive_classes_share_a_softmax_with_the_background() -> None:
    """Background 7, 5 and 8 pixels; the background's logit is 0."""
    diffusion = process(mask_loss="dice_ce", exclusive=True)
    terms, gradient = losses_of(diffusion, [0.4, -1.0], masks(5, 8), t=LAST)
    weights = [math.exp(0.4), math.exp(-1.0)]
    p = [weight / (1 + sum(weights)) for weight in weights]
    entropy = -(5 * math.log(p[0]) + 8 * math.log(p[1]) + 7 * math.log(1 - sum(p))) / 20
    dices, slopes = zip(dice_by_hand(p[0], 5), dice_by_hand(p[1], 8), strict=True)
    assert_close(terms["ce"].item(), entropy)
    assert_close(terms["loss"].item(), entropy + sum(dices) / 2)
    for k, share in enumerate((5, 8)):
        own = slopes[k] / 2 * p[k] * (1 - p[k])
        other = -slopes[1 - k] / 2 * p[0] * p[1]
        assert_close(gradient[k].item(), p[k] - share / 20 + own + other)


@pytest.mark.parametrize("exclusive", [False, True])
def test_soft_masks_are_matched_by_their_own_probabilities(exclusive: bool) -> None:
    """Where raters disagree the mask is a share of them, which is what the loss leads to."""
    mask = torch.tensor([0.25, 0.6], dtype=torch.float64)[None, :, None, None].expand(1, 2, 4, 5)
    rest = 0.15 if exclusive else 0.0
    logits = [math.log(m / (rest or 1 - m)) for m in (0.25, 0.6)]
    terms, gradient = losses_of(process(mask_loss="bce", exclusive=exclusive), logits, mask)
    assert_close(gradient.tolist(), [0.0, 0.0], rtol=0, atol=1e-12)
    parts = (0.25, 0.6, 0.15) if exclusive else (0.25, 0.75, 0.6, 0.4)
    entropy = -sum(m * math.log(m) for m in parts)
    assert_close(terms["loss"].item(), entropy if exclusive else entropy / 2)


def test_one_exclusive_class_is_one_that_overlaps_nothing() -> None:
    logits, mask = torch.randn(3, 1, 4, 5), masks(5, rows=3).float()
    for function in (mask_probability, lambda x, **o: mask_cross_entropy(x, mask, **o)):
        assert_close(function(logits, exclusive=True), function(logits, exclusive=False))


@pytest.mark.parametrize("rescale", [False, True])
def test_what_the_network_sees_where_the_noisy_mask_is_withheld(rescale: bool) -> None:
    """Zeros at the last trained timestep; the other rows are as ever."""
    diffusion = process(mask_loss="bce", timesteps=(0, 10, 30), rescale_timesteps=rescale)
    x0, eps = diffusion.to_range(masks(5, rows=3)), torch.randn(3, 1, 4, 5, dtype=torch.float64)
    t, seen = torch.tensor([0, 10, 30]), []

    def net(x: Tensor, times: Tensor, *_: Any) -> Output:
        seen.append((x, times))
        return Output(torch.zeros_like(x))

    withheld = torch.tensor([True, False, False])
    diffusion.training_losses(net, x0, t, eps=eps, condition=None, withheld=withheld)
    ((x, times),) = seen
    assert_close(x[0], torch.zeros_like(x[0]))
    assert_close(x[1:], diffusion.schedule.add_noise(x0, t, eps)[1:])
    assert times.tolist() == [value * (20 if rescale else 1) for value in (30, 10, 30)]
    diffusion.direct(net, None, x0)
    assert_close(seen[1][0], torch.zeros_like(x0))
    assert seen[1][1].tolist() == [times[0]] * 3, "sampling tells the same time"


# Bayes' rule on one pixel

LINEAR = NoiseSchedule.named("linear", 1000)
PRIOR = 0.3
MEMBERS = 1500


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def exact(schedule: NoiseSchedule, *priors: float) -> Callable[..., Output]:
    """The network that knows Bayes' rule: the log-odds of a mask in {-1, 1} that is 1 with ``p``.

    N(x; alpha, sigma^2) / N(x; -alpha, sigma^2) = exp(2 alpha x / sigma^2). Of several exclusive
    classes the odds are those with the background, so that the last of them share what is left.
    """
    rest = 1 - sum(priors)
    logits = torch.tensor([math.log(p / rest) for p in priors], dtype=torch.float64)

    def net(x: Tensor, t: Tensor, *_: Any) -> Output:
        level = schedule.at(float(t[0]))
        return Output(logits[:, None, None] + 2 * level.alpha / level.sigma**2 * x)

    return net


def drawn(
    name: str,
    *,
    b: float = 1.0,
    guidance: float | None = None,
    priors: tuple[float, ...] = (PRIOR,),
    steps: int = 0,
) -> Tensor:
    """Soft masks [MEMBERS, K] of one pixel that a sampler draws from the exact network."""
    schedule = LINEAR if b == 1 else LINEAR.scaled(b)
    diffusion = GaussianDiffusion(
        schedule=schedule,
        predict_xstart=True,
        mask_range=(-1.0, 1.0),
        mask_loss="bce",
        mask_dropout=0.5,
        exclusive=len(priors) > 1,
    )
    net = exact(schedule, *priors)
    # Noise at evenly spaced quantiles, so that only a sampler's own noise is left to chance.
    ranks = (torch.arange(MEMBERS, dtype=torch.float64) + 0.5) / MEMBERS
    x = torch.distributions.Normal(0, 1).icdf(ranks)[:, None, None, None]
    if len(priors) > 1:
        torch.manual_seed(0)
        x = torch.randn(MEMBERS, len(priors), 1, 1, dtype=torch.float64)
    mixed: dict[str, Any] = {}
    if guidance is not None:
        mixed = {"direct": diffusion.direct(net, None, x), "guidance": guidance}
    denoise = diffusion.denoiser(net, None, **mixed)
    base = name.removesuffix("_singlestep")
    options = SamplingOptions(
        steps=steps or (400 if name in STOCHASTIC else 120),
        method="singlestep" if base != name else "multistep",
        skip_type="logSNR",
    )
    levels = sampling_levels(diffusion, base, options)
    torch.manual_seed(7)
    return diffusion.from_range(SAMPLERS[name](denoise, x, levels))[:, :, 0, 0]


@pytest.mark.parametrize("b", [1.0, 0.2])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_draws_coins_of_the_right_odds(name: str, b: float) -> None:
    members = drawn(name, b=b)
    chance = 4 * math.sqrt(PRIOR * (1 - PRIOR) / MEMBERS) if name in STOCHASTIC else 0.01
    assert members.mean().item() == pytest.approx(PRIOR, abs=chance)
    assert (members > 0.5).double().mean().item() == pytest.approx(PRIOR, abs=chance)
    undecided = (members > 0.01) & (members < 0.99)
    assert undecided.double().mean().item() < 0.01


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_exclusive_classes_are_drawn_by_their_priors(name: str) -> None:
    """No pixel has two classes, and the background has the rest."""
    members = drawn(name, priors=(0.5, 0.2))
    for k, prior in enumerate((0.5, 0.2)):
        chance = 4 * math.sqrt(prior * (1 - prior) / MEMBERS)
        assert members[:, k].mean().item() == pytest.approx(prior, abs=chance)
    assert members.sum(dim=1).max() <= 1 + 1e-9
    assert ((members > 0.01) & (members < 0.99)).double().mean().item() < 0.01


@pytest.mark.parametrize("b", [1.0, 0.2])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_guidance_of_one_is_none_and_of_zero_is_the_prior(name: str, b: float) -> None:
    """The answer without a noisy mask is the prior, and with w = 0 every mask is that answer."""
    assert_close(drawn(name, b=b, guidance=1.0), drawn(name, b=b), rtol=0, atol=0)
    members = drawn(name, b=b, guidance=0.0)
    assert_close(members, torch.full_like(members, PRIOR), rtol=0, atol=1e-12)


@pytest.mark.parametrize("b", [1.0, 0.2])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_guidance_moves_the_odds_of_the_coin(name: str, b: float) -> None:
    """With w the log-odds are logit(p) + 2 w alpha x / sigma^2: the evidence of x counts w times.

    Below 1 the prior weighs more, so that members side with the likelier value more often than
    they should; above 1 it weighs less, towards a fair coin.
    """
    chance = 2 * math.sqrt(0.25 / MEMBERS) if name in STOCHASTIC else 0.01
    shares = [float((drawn(name, b=b, guidance=w) > 0.5).double().mean()) for w in (0.5, 1.0, 2.0)]
    assert shares[0] < shares[1] - 2 * chance < shares[1] + 2 * chance < shares[2] < 0.5 + chance


def test_one_evaluation_from_noise_is_the_posterior_of_that_noise() -> None:
    members = drawn("ddim", steps=1)
    level, ranks = LINEAR.at(999), (torch.arange(MEMBERS, dtype=torch.float64) + 0.5) / MEMBERS
    x = torch.distributions.Normal(0, 1).icdf(ranks)
    assert_close(members[:, 0], torch.sigmoid(logit(PRIOR) + 2 * level.alpha / level.sigma**2 * x))


def test_guidance_needs_the_direct_answer() -> None:
    with pytest.raises(ValueError, match="without the noisy mask"):
        process(mask_loss="bce").denoiser(exact(LINEAR, PRIOR), None, guidance=2.0)


def test_guidance_of_the_squared_error_mixes_clean_masks() -> None:
    """Without logits the clean masks are mixed, then clipped to the range of the mask."""

    def net(x: Tensor, *_: Any) -> Output:
        return Output(0.2 + 0.5 * x)

    diffusion, x = process(), torch.tensor([-3.0, -1.0, 0.0, 1.0])[:, None, None, None]
    direct = diffusion.direct(net, None, x)
    x0 = diffusion.denoiser(net, None, direct=direct, guidance=2.0)(x, LINEAR.at(10)).x0
    assert_close(x0.flatten(), torch.tensor([-1.0, -0.8, 0.2, 1.0]))


# what excludes what


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        *(
            ({**cause, name: value}, [f"--{name} {value}", text])
            for cause, text in (
                ({"mask_loss": "bce"}, "--mask_loss bce"),
                ({"mask_loss": "dice_ce"}, "--mask_loss dice_ce"),
                ({"mask_dropout": 0.5, "predict_xstart": True}, "--mask_dropout 0.5"),
                ({"version": "unet"}, "--version unet"),
            )
            for name, value in (
                ("learn_sigma", True),
                ("predict_v", True),
                ("use_kl", True),
                ("min_snr_gamma", 5.0),
            )
        ),
        (
            {"mask_loss": "bce", "predict_xstart": False},
            ["--predict_xstart False", "--mask_loss bce"],
        ),
        ({"mask_loss": "bce", "mask_range": "0,1"}, ["--mask_range 0,1", "--mask_loss bce"]),
        ({"version": "unet", "mask_range": "0,1"}, ["--mask_range 0,1", "--version unet"]),
        ({"version": "unet", "mask_loss": "mse", "predict_xstart": False}, ["--version unet"]),
        ({"version": "unet", "mask_dropout": 0.5}, ["--mask_dropout 0.5", "--version unet"]),
        ({"mask_dropout": 1.0}, ["--mask_dropout 1", "--version unet"]),
        ({"mask_dropout": 0.5}, ["--mask_dropout 0.5", "--predict_xstart True"]),
        ({"mask_dropout": 1.5}, ["--mask_dropout 1.5", "between 0 and 1"]),
        ({"mask_dropout": 0.5, "noise_share": 0.5}, ["--mask_dropout 0.5 --noise_share 0.5"]),
        ({"noise_share": 1.0}, ["--noise_share 1", "no draw"]),
        ({"input_scale": 0.0}, ["--input_scale 0.0"]),
        ({"mask_loss": "dice"}, ["--mask_loss", "'dice_ce'"]),
        ({"version": "unet", "coarse_loss": "mse"}, ["--coarse_loss mse", "unet"]),
        ({"version": "unet", "class_cond": True}, ["--class_cond True", "--version unet"]),
    ],
    ids=str,
)
def test_what_excludes_each_other_is_one_message(flags: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        create_model_and_diffusion(num_channels=32, **flags)
    message = str(error.value)
    assert all(text in message for text in named) and "\n" not in message, message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ("mse", False, "0,1", 0.0)),
        ({"version": "new"}, ("mse", False, "0,1", 0.0)),
        ({"mask_loss": "bce"}, ("bce", True, "-1,1", 0.0)),
        ({"mask_loss": "bce", "mask_range": "-1.0,1"}, ("bce", True, "-1,1", 0.0)),
        ({"mask_loss": "dice_ce", "mask_dropout": 0.5}, ("dice_ce", True, "-1,1", 0.5)),
        ({"predict_xstart": True, "mask_dropout": 0.5}, ("mse", True, "0,1", 0.5)),
        ({"version": "unet"}, ("dice_ce", True, "-1,1", 1.0)),
        ({"version": "unet", "mask_loss": "mse"}, ("mse", True, "-1,1", 1.0)),
    ],
    ids=str,
)
def test_what_an_objective_implies(flags: dict[str, Any], expected: tuple[Any, ...]) -> None:
    names = ("mask_loss", "predict_xstart", "mask_range", "mask_dropout")
    options = resolve_objective(Flags(given=flags), flags.get("version", "plain"))
    assert tuple(getattr(options, name) for name in names) == expected
    again = resolve_objective(Flags(resolved=vars(options)), flags.get("version", "plain"))
    assert again == options, "a checkpoint records what it was completed to"


def test_the_script_of_training_refuses_in_one_line(brats: Path, tmp_path: Path) -> None:
    command = ["--data_dir", brats / "training", "--out_dir", tmp_path / "out", *NETWORK]
    error = refused(script("segmentation_train", *command, "--mask_loss", "bce", "--use_kl", True))
    assert "--use_kl True: cannot be combined with --mask_loss bce" in error
    assert not list(tmp_path.rglob("*.pt"))
