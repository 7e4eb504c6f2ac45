"""Losses, bounds and denoisers by value: golden numbers, perfect predictors, closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.nn import Output
from guided_diffusion.respace import space_timesteps
from guided_diffusion.sampling import ddim, ddpm
from guided_diffusion.schedule import CLEAN, NoiseSchedule
from guided_diffusion.script_util import create_model_and_diffusion

GOLDEN = Path(__file__).parent / "golden"
LINEAR = NoiseSchedule.named("linear", 1000)
SHORT = NoiseSchedule.named("linear", 50)


def normals(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def constant(raw):
    """A network that returns ``raw`` for every input."""
    return lambda x, t, condition, y: Output(raw)


def recording(raw, calls):
    """The same, appending the arguments of each call to ``calls``."""

    def net(x, t, condition, y):
        calls.append((x, t, condition, y))
        return Output(raw)

    return net


# golden numbers


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("loss_learn_sigma", {"learn_sigma": True}),
        (
            "loss_rescale_learned",
            {"learn_sigma": True, "diffusion_steps": 250, "rescale_learned_sigmas": True},
        ),
    ],
)
def test_training_losses_are_golden(name, flags):
    golden = {
        key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()
    }
    diffusion = create_model_and_diffusion(**flags, num_channels=32)[1]
    calls = []
    terms = diffusion.training_losses(
        recording(golden["raw"], calls),
        golden["mask"],
        golden["t"],
        eps=golden["noise"],
        condition=golden["image"],
    )
    assert sorted(terms) == ["loss", "mse", "vb"]
    for key, value in terms.items():
        torch.testing.assert_close(value, golden[f"term_{key}"], rtol=1e-5, atol=0)

    ((x_t, timesteps, image, y),) = calls
    torch.testing.assert_close(x_t, golden["model_input"][:, -1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(image, golden["model_input"][:, :-1], rtol=0, atol=0)
    assert timesteps.tolist() == golden["model_t"].tolist()
    assert y is None


@pytest.mark.parametrize(
    ("name", "learn_sigma", "respacing"),
    [
        ("step_learn_range", True, ""),
        ("step_fixed_large", False, ""),
        ("step_respaced_50", True, "50"),
    ],
)
def test_reverse_steps_are_golden(name, learn_sigma, respacing):
    golden = {
        key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{name}.npz").items()
    }
    diffusion = GaussianDiffusion(LINEAR, learn_sigma=learn_sigma)
    kept = sorted(space_timesteps(1000, respacing))
    for row, position in enumerate(golden["t"].tolist()):
        one = slice(row, row + 1)
        x, calls = golden["x"][one, -1:].double(), []
        denoise = diffusion.denoiser(recording(golden["raw"][one], calls), None)
        now = LINEAR.at(kept[position])
        step = [now, LINEAR.at(kept[position - 1]) if position else CLEAN]

        mean = ddpm(denoise, x, step, randn_like=torch.zeros_like)
        std = ddpm(denoise, x, step, randn_like=torch.ones_like) - mean
        expected = {
            "mean": mean,
            "pred_xstart": denoise(x, now).x0,
            "ddim_sample": ddim(denoise, x, step),
        }
        if position:
            expected |= {"variance": std**2, "log_variance": (std**2).log()}
        else:
            assert not std.any(), "no noise is added in the step to the clean mask"
        for key, value in expected.items():
            truth = golden[key][one].double()
            torch.testing.assert_close(value.expand_as(truth), truth, rtol=1e-5, atol=1e-7)
        assert all(t.tolist() == golden["model_t"][one].tolist() for _, t, _, _ in calls)


# losses


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("predict_xstart", [False, True])
def test_a_perfect_predictor_has_no_squared_error(predict_xstart, channels):
    diffusion = GaussianDiffusion(LINEAR, predict_xstart=predict_xstart)
    x0, eps = normals(4, channels, 6, 5), normals(4, channels, 6, 5, seed=1)
    t = torch.tensor([0, 3, 500, 999])
    truth = x0 if predict_xstart else eps
    terms = diffusion.training_losses(constant(truth), x0, t, eps=eps, condition=None)
    assert sorted(terms) == ["loss", "mse"]
    assert terms["loss"].tolist() == terms["mse"].tolist() == [0] * 4

    offset = torch.tensor([0.0, 0.5, 1, 2]).double()[:, None, None, None]
    terms = diffusion.training_losses(constant(truth + offset), x0, t, eps=eps, condition=None)
    torch.testing.assert_close(terms["loss"], torch.tensor([0, 0.25, 1, 4]).double())


def test_the_bound_trains_the_variance_only():
    diffusion = GaussianDiffusion(LINEAR, learn_sigma=True)
    x0, eps = normals(3, 1, 4, 4), normals(3, 1, 4, 4, seed=1)
    raw = normals(3, 2, 4, 4, seed=2).requires_grad_()
    t = torch.tensor([0, 10, 900])
    terms = diffusion.training_losses(constant(raw), x0, t, eps=eps, condition=None)
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])
    (grad,) = torch.autograd.grad(terms["loss"].sum(), raw)
    torch.testing.assert_close(grad[:, :1], 2 * (raw - eps)[:, :1] / 16)
    assert (grad[:, 1:].abs().flatten(1).sum(1) > 0).all()


def reverse_std(schedule, now, before, s):
    """Standard deviation of x at ``before`` given x at ``now``, for data of deviation ``s``."""
    ab, prev = (1.0 if i < 0 else schedule.alpha_bar[i].item() for i in (now, before))
    ratio = ab / prev
    total, total_prev = ab * s**2 + 1 - ab, prev * s**2 + 1 - prev
    return math.sqrt(total_prev * (1 - ratio * total_prev / total))


def exact_network(schedule, kept, mu, s, *, predict_xstart=False, learn_sigma=True):
    """An ideal network for data ~ N(mu, s^2), its variance included."""
    previous = dict(zip(kept, (-1, *kept), strict=False))

    def fraction(t):
        ab, prev = (1.0 if i < 0 else schedule.alpha_bar[i].item() for i in (t, previous[t]))
        first = (kept[0], kept[1]) if t == kept[0] else (previous[t], t)
        low_prev, low_ab = (schedule.alpha_bar[i].item() for i in first)
        beta = 1 - ab / prev
        low = (1 - low_ab / low_prev) * (1 - low_prev) / (1 - low_ab)
        wanted = reverse_std(schedule, t, previous[t], s) ** 2
        return (math.log(wanted) - math.log(low)) / (math.log(beta) - math.log(low))

    def net(x, t, condition, y):
        t = t.long()
        ab = schedule.alpha_bar[t][:, None, None, None]
        x0 = mu + ab.sqrt() * s**2 / (ab * s**2 + 1 - ab) * (x - ab.sqrt() * mu)
        value = x0 if predict_xstart else (x - ab.sqrt() * x0) / (1 - ab).sqrt()
        if not learn_sigma:
            return Output(value)
        fractions = torch.tensor([fraction(i) for i in t.tolist()]).double()[:, None, None, None]
        return Output(torch.cat([value, (2 * fractions - 1).expand_as(value)], dim=1))

    return net


@pytest.mark.parametrize("predict_xstart", [False, True])
@pytest.mark.parametrize("kept", [tuple(range(50)), (0, 7, 20, 30, 49), (3, 10, 49)])
def test_the_bound_of_an_exact_model_is_the_entropy_of_the_data(kept, predict_xstart):
    # On Gaussian data the reverse process is Gaussian over any stride, so that the variational
    # bound is tight: its terms and the prior's add up to the entropy of the data, here counted in
    # bins of 2/255. The sum would be wrong if a term used timestep t - 1 instead of the last kept
    # one, or if one variance were wrong.
    mu, s, pixels = 0.1, 0.15, 150 * 150
    diffusion = GaussianDiffusion(
        SHORT, timesteps=kept, learn_sigma=True, use_kl=True, predict_xstart=predict_xstart
    )
    net = exact_network(SHORT, kept, mu, s, predict_xstart=predict_xstart)
    x0 = mu + s * normals(len(kept), 1, 150, 150)
    terms = diffusion.training_losses(
        net, x0, torch.tensor(kept), eps=normals(*x0.shape, seed=1), condition=None
    )
    assert sorted(terms) == ["loss", "vb"]
    torch.testing.assert_close(terms["loss"], terms["vb"] * len(kept))

    ab = SHORT.alpha_bar[kept[-1]].item()
    prior = 0.5 * math.log((ab * s**2 + 1 - ab) / (1 - ab))
    entropy = 0.5 * math.log(2 * math.pi * math.e * s**2) - math.log(2 / 255)
    bits = (entropy - prior) / math.log(2)
    # every term is the mean of `pixels` draws with a deviation below 1 bit
    assert terms["vb"].sum().item() == pytest.approx(bits, abs=4 * math.sqrt(len(kept) / pixels))
    # and each term: KL(true reverse step || exact model) has the mean log(std / std of q)
    for before, now, vb in zip(kept, kept[1:], terms["vb"][1:].tolist(), strict=False):
        ratio = reverse_std(SHORT, now, before, s) / reverse_std(SHORT, now, before, 0)
        assert vb == pytest.approx(math.log(ratio, 2), abs=4 / math.sqrt(pixels), rel=0.06)


def test_the_bound_with_fixed_variance_in_closed_form():
    mu, s, kept = 0.1, 0.2, (20, 22, 30, 49)
    diffusion = GaussianDiffusion(SHORT, timesteps=kept, use_kl=True)
    net = exact_network(SHORT, kept, mu, s, learn_sigma=False)
    x0 = mu + s * normals(4, 1, 150, 150)
    terms = diffusion.training_losses(
        net, x0, torch.tensor(kept), eps=normals(*x0.shape, seed=1), condition=None
    )
    for before, now, vb in zip(kept, kept[1:], terms["vb"][1:].tolist(), strict=False):
        q, p = (reverse_std(SHORT, now, before, value) for value in (0, s))
        beta = 1 - (SHORT.alpha_bar[now] / SHORT.alpha_bar[before]).item()
        # the mean's error has variance p^2 - q^2, and the model's variance is beta
        nats = 0.5 * (math.log(beta / q**2) + q**2 / beta - 1 + (p**2 - q**2) / beta)
        assert vb == pytest.approx(nats / math.log(2), rel=0.05)
    # beta would be far too wide for the first term: the posterior of the second is used instead
    variance = reverse_std(SHORT, kept[1], kept[0], 0) ** 2
    error = reverse_std(SHORT, kept[0], -1, s) ** 2
    nats = 0.5 * math.log(2 * math.pi * variance) + error / (2 * variance) - math.log(2 / 255)
    assert terms["vb"][0].item() == pytest.approx(nats / math.log(2), rel=0.01)


def test_rescaled_bound_is_multiplied_by_steps_over_1000():
    x0, eps, raw = normals(2, 1, 4, 4), normals(2, 1, 4, 4, seed=1), normals(2, 2, 4, 4, seed=2)
    t, terms = torch.tensor([10, 40]), []
    for rescaled in (False, True):
        diffusion = GaussianDiffusion(SHORT, learn_sigma=True, rescale_learned_sigmas=rescaled)
        terms.append(diffusion.training_losses(constant(raw), x0, t, eps=eps, condition=None))
    torch.testing.assert_close(terms[1]["vb"], terms[0]["vb"] * 50 / 1000)
    torch.testing.assert_close(terms[1]["mse"], terms[0]["mse"])


def test_kl_by_hand_and_against_torch():
    zero, one = torch.zeros(()).double(), torch.ones(()).double()
    assert normal_kl(zero, zero, one, zero).item() == pytest.approx(0.5)
    wide = normal_kl(zero, zero, zero, math.log(4) * one).item()
    assert wide == pytest.approx(math.log(2) - 3 / 8)
    mean1, mean2, log_var1, log_var2 = normals(4, 100)
    torch.testing.assert_close(
        normal_kl(mean1, log_var1, mean2, log_var2),
        kl_divergence(Normal(mean1, (log_var1 / 2).exp()), Normal(mean2, (log_var2 / 2).exp())),
    )


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (0.9, 0.05), (-1.2, 1.0)])
def test_discretised_likelihood_is_a_distribution_over_256_bins(mean, std):
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_std = torch.tensor(std).double().log()
    likelihood = discretized_gaussian_log_likelihood(x, torch.tensor(mean), log_std).exp()
    # probabilities are clamped at 1e-12
    assert likelihood.sum().item() == pytest.approx(1, abs=1e-9)
    edges = Normal(mean, std).cdf((x[1:] + x[:-1]) / 2)
    exact = torch.cat([edges, torch.ones(1)]) - torch.cat([torch.zeros(1), edges])
    # the tanh approximation of the CDF is good to 3e-4 on either side of a bin
    torch.testing.assert_close(likelihood, exact.double(), atol=6e-4, rtol=0)


def test_discretised_likelihood_by_hand():
    # bin of half width 1/255 around the mean, deviation 1/255: 2 Phi(1) - 1
    log_std = torch.tensor(1 / 255).double().log()
    zero = torch.zeros(()).double()
    value = discretized_gaussian_log_likelihood(zero, zero, log_std).exp().item()
    assert value == pytest.approx(0.682689, abs=5e-4)
    far = discretized_gaussian_log_likelihood(zero, zero + 1, log_std).item()
    assert far == pytest.approx(math.log(1e-12))


# the input of the network, and the interpretation of its output


@pytest.mark.parametrize(("rescale", "scaled"), [(False, [0, 100, 249]), (True, [0, 400, 996])])
def test_timesteps_are_rescaled_in_training_and_in_sampling(rescale, scaled):
    schedule = NoiseSchedule.named("linear", 250)
    diffusion = GaussianDiffusion(schedule, rescale_timesteps=rescale)
    x0, t, calls = normals(3, 1, 2, 2, dtype=torch.float32), torch.tensor([0, 100, 249]), []
    net = recording(x0, calls)
    diffusion.training_losses(net, x0, t, eps=x0, condition=None)
    assert calls.pop()[1].tolist() == scaled

    for time, expected in zip(t.tolist(), scaled, strict=True):
        diffusion.denoiser(net, None)(x0, schedule.at(time))
        assert calls.pop()[1].tolist() == [expected] * 3
    diffusion.denoiser(net, None)(x0, schedule.at(10.25))
    assert calls.pop()[1].tolist() == [41.0 if rescale else 10.25] * 3


def test_respaced_training_and_sampling_use_original_timesteps():
    kept = sorted(space_timesteps(1000, "10"))
    diffusion = GaussianDiffusion(LINEAR, timesteps=tuple(kept), learn_sigma=True)
    assert diffusion.kept == (0, 111, 222, 333, 444, 555, 666, 777, 888, 999)
    assert GaussianDiffusion(SHORT).kept == tuple(range(50))
    x0, calls = normals(10, 1, 2, 2), []
    net = recording(normals(10, 2, 2, 2), calls)
    diffusion.training_losses(net, x0, torch.tensor(kept), eps=x0, condition=None)
    assert calls.pop()[1].tolist() == kept

    ddim(diffusion.denoiser(net, None), x0, LINEAR.levels(kept[::-1]))
    assert [t[0].item() for _, t, _, _ in calls] == kept[::-1]


def test_condition_and_labels_reach_the_network():
    condition, y, x0, calls = object(), torch.tensor([1]), normals(1, 1, 2, 2), []
    net = recording(x0, calls)
    diffusion = GaussianDiffusion(SHORT)
    diffusion.training_losses(net, x0, torch.tensor([4]), eps=x0, condition=condition, y=y)
    diffusion.denoiser(net, condition, y=y)(x0, SHORT.at(4))
    assert len(calls) == 2
    assert all(call[2] is condition and call[3] is y for call in calls)


def test_predicted_noise_is_converted_to_the_clean_mask_and_clipped():
    schedule = NoiseSchedule(torch.tensor([0.64], dtype=torch.float64))  # alpha 0.8, sigma 0.6
    diffusion, level = GaussianDiffusion(schedule), schedule.at(0)
    x = torch.tensor([1.0, -2.0, 0.5]).double()[None, None, None]
    eps = torch.tensor([0.5, 1.0, 0.0]).double()[None, None, None]
    x0 = torch.tensor([(1 - 0.3) / 0.8, (-2 - 0.6) / 0.8, 0.625]).double()[None, None, None]
    for clip in (None, (-1, 1), (0, 1)):
        prediction = diffusion.denoiser(constant(eps), None, clip=clip)(x, level)
        torch.testing.assert_close(prediction.x0, x0.clamp(*clip) if clip else x0)
        assert prediction.var_frac is None
        assert prediction.coarse is None
    default = diffusion.denoiser(constant(eps), None)(x, level)
    torch.testing.assert_close(default.x0, x0.clamp(-1, 1))


def test_a_predicted_clean_mask_is_used_unchanged():
    diffusion = GaussianDiffusion(SHORT, predict_xstart=True)
    raw = torch.tensor([-3.0, 0.25, 3.0])[None, None, None]
    x = torch.zeros_like(raw)
    unclipped = diffusion.denoiser(constant(raw), None, clip=None)(x, SHORT.at(20))
    assert unclipped.x0.flatten().tolist() == [-3, 0.25, 3]
    clipped = diffusion.denoiser(constant(raw), None, clip=(0, 1))(x, SHORT.at(20))
    assert clipped.x0.flatten().tolist() == [0, 0.25, 1]


def test_learned_variance_is_a_fraction_of_its_bounds():
    diffusion = GaussianDiffusion(SHORT, learn_sigma=True)
    x, v = normals(2, 3, 4, 5), normals(2, 3, 4, 5, seed=1) * 3
    coarse = torch.rand(2, 1, 4, 5)
    net = lambda *inputs: Output(torch.cat([x, v], dim=1), coarse)  # noqa: E731
    prediction = diffusion.denoiser(net, None)(x, SHORT.at(7))
    torch.testing.assert_close(prediction.var_frac, (v + 1) / 2)
    assert prediction.x0.shape == x.shape
    assert prediction.coarse is coarse


@pytest.mark.parametrize(("learn_sigma", "channels"), [(False, 2), (True, 1), (True, 3)])
def test_an_output_of_the_wrong_width_is_refused(learn_sigma, channels):
    diffusion, x = GaussianDiffusion(SHORT, learn_sigma=learn_sigma), torch.zeros(1, 1, 2, 2)
    net = constant(torch.zeros(1, channels, 2, 2))
    with pytest.raises(
        ValueError, match=f"returned {channels} channels instead of {1 + learn_sigma}"
    ):
        diffusion.denoiser(net, None)(x, SHORT.at(3))
    with pytest.raises(ValueError, match=f"returned {channels} channels"):
        diffusion.training_losses(net, x, torch.tensor([3]), eps=x, condition=None)


@pytest.mark.parametrize("mask_range", [(0.0, 1.0), (-1.0, 1.0), (-0.5, 2.0)])
def test_mask_range_round_trip(mask_range):
    diffusion = GaussianDiffusion(SHORT, mask_range=mask_range)
    assert diffusion.to_range(torch.tensor([0.0, 1.0])).tolist() == list(mask_range)
    mask = torch.linspace(0, 1, 11)
    torch.testing.assert_close(diffusion.from_range(diffusion.to_range(mask)), mask)
    assert diffusion.from_range(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]


# v-prediction and loss weights


@pytest.mark.parametrize("channels", [1, 3])
def test_a_perfect_predictor_of_v(channels):
    """v = alpha eps - sigma x0; with it, x0 = alpha x - sigma v and eps = sigma x + alpha v."""
    diffusion = GaussianDiffusion(LINEAR, predict_v=True)
    x0, eps = normals(4, channels, 6, 5), normals(4, channels, 6, 5, seed=1)
    t = torch.tensor([0, 3, 500, 999])
    alpha_bar = LINEAR.alpha_bar[t][:, None, None, None]
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    terms = diffusion.training_losses(constant(v), x0, t, eps=eps, condition=None)
    assert terms["loss"].tolist() == terms["mse"].tolist() == [0] * 4
    terms = diffusion.training_losses(constant(v + 0.5), x0, t, eps=eps, condition=None)
    torch.testing.assert_close(terms["mse"], torch.full((4,), 0.25).double())

    for row, time in enumerate(t.tolist()):
        level = LINEAR.at(time)
        x = level.alpha * x0[row] + level.sigma * eps[row]
        truth = level.alpha * eps[row] - level.sigma * x0[row]
        found = diffusion.denoiser(constant(truth[None]), None, clip=None)(x[None], level).x0
        torch.testing.assert_close(found[0], x0[row])


@pytest.mark.parametrize("flags", [{"learn_sigma": True}, {"use_kl": True}])
def test_the_bound_does_not_depend_on_what_is_predicted(flags):
    x0, eps = normals(3, 1, 4, 4), normals(3, 1, 4, 4, seed=1)
    t = torch.tensor([0, 10, 900])
    alpha_bar = LINEAR.alpha_bar[t][:, None, None, None]
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    guess = x0 + 0.3 * normals(3, 1, 4, 4, seed=2)
    x_t = signal * x0 + noise * eps
    values = {
        "predict_xstart": guess,
        "predict_v": (signal * x_t - guess) / noise,
        "": (x_t - signal * guess) / noise,
    }
    bounds = []
    for name, value in values.items():
        diffusion = GaussianDiffusion(LINEAR, **flags, **({name: True} if name else {}))
        raw = torch.cat([value, 0.1 * normals(3, 1, 4, 4, seed=3)], 1)
        net = constant(raw if "learn_sigma" in flags else value)
        bounds.append(diffusion.training_losses(net, x0, t, eps=eps, condition=None)["vb"])
    torch.testing.assert_close(bounds[1], bounds[0])
    torch.testing.assert_close(bounds[2], bounds[0])


@pytest.mark.parametrize("kind", ["predict_xstart", "predict_v", ""])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_the_weight_of_a_loss_is_the_capped_signal_to_noise_ratio(kind, gamma):
    flags = {kind: True} if kind else {}
    plain = GaussianDiffusion(LINEAR, **flags)
    weighted = GaussianDiffusion(LINEAR, **flags, min_snr_gamma=gamma)
    x0, eps = normals(5, 1, 4, 4), normals(5, 1, 4, 4, seed=1)
    t, raw = torch.tensor([0, 50, 200, 600, 999]), normals(5, 1, 4, 4, seed=2)
    mse = plain.training_losses(constant(raw), x0, t, eps=eps, condition=None)["loss"]
    terms = weighted.training_losses(constant(raw), x0, t, eps=eps, condition=None)
    for i, time in enumerate(t.tolist()):
        level = LINEAR.at(time)
        snr = level.alpha**2 / level.sigma**2
        weight = min(snr, gamma) / {"predict_xstart": 1, "predict_v": snr + 1, "": snr}[kind]
        assert float(terms["loss"][i]) == pytest.approx(float(mse[i]) * weight, rel=1e-9)
    torch.testing.assert_close(terms["mse"], mse)


def test_weighted_losses_of_an_error_in_x0_do_not_depend_on_what_is_predicted():
    x0, eps = normals(3, 1, 4, 4), normals(3, 1, 4, 4, seed=1)
    t = torch.tensor([5, 100, 900])
    alpha_bar = LINEAR.alpha_bar[t][:, None, None, None]
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t, guess = signal * x0 + noise * eps, x0 + normals(3, 1, 4, 4, seed=2)
    answers = {
        "predict_xstart": guess,
        "predict_v": (signal * x_t - guess) / noise,
        "": (x_t - signal * guess) / noise,
    }
    losses = [
        GaussianDiffusion(
            LINEAR, min_snr_gamma=5.0, **({name: True} if name else {})
        ).training_losses(constant(value), x0, t, eps=eps, condition=None)["loss"]
        for name, value in answers.items()
    ]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


@pytest.mark.parametrize(
    "flags",
    [{"predict_v": True, "predict_xstart": True}, {"min_snr_gamma": 5.0, "use_kl": True}],
)
def test_flags_that_exclude_each_other_are_refused(flags):
    first, second = flags
    message = f"--{first} {flags[first]}: cannot be combined with --{second} True"
    with pytest.raises(UserError, match=message):
        create_model_and_diffusion(**flags, num_channels=32)
