"""Schedules and respacing by value: golden numbers, hand values, moments, inverses, refusals."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.errors import UserError
from guided_diffusion.respace import space_timesteps
from guided_diffusion.schedule import CLEAN, NoiseSchedule, get_named_beta_schedule
from guided_diffusion.script_util import create_model_and_diffusion

GOLDEN = Path(__file__).parent / "golden"
LINEAR = NoiseSchedule.named("linear", 1000)


@pytest.mark.parametrize("steps", [50, 1000])
def test_linear_schedule_is_golden(steps):
    golden = np.load(GOLDEN / f"schedule_linear{steps}.npz")
    np.testing.assert_allclose(
        get_named_beta_schedule("linear", steps), golden["betas"], rtol=1e-10
    )
    np.testing.assert_allclose(
        NoiseSchedule.named("linear", steps).alpha_bar, golden["alphas_cumprod"], rtol=1e-10
    )


def test_linear_betas_by_hand():
    assert get_named_beta_schedule("linear", 1000)[[0, -1]] == pytest.approx([1e-4, 0.02])
    assert get_named_beta_schedule("linear", 100)[[0, -1]] == pytest.approx([1e-3, 0.2])
    assert get_named_beta_schedule("linear", 21)[-1] == pytest.approx(20 / 21)
    middle = get_named_beta_schedule("linear", 101)[50]
    assert middle == pytest.approx(1000 / 101 * (1e-4 + 0.02) / 2)


def test_cosine_schedule_by_hand():
    # alpha_bar[t] = f((t + 1) / T) / f(0), f(u) = cos^2((u + 0.008) / 1.008 * pi / 2): the first
    # trained time already has noise, the last beta is cut to 0.999.
    schedule = NoiseSchedule.named("cosine", 1000)
    assert schedule.alpha_bar[0].item() == pytest.approx(0.9999587158, rel=1e-9)
    assert schedule.alpha_bar[499].item() == pytest.approx(0.4938435904, rel=1e-9)
    assert schedule.alpha_bar[-1] / schedule.alpha_bar[-2] == pytest.approx(0.001)
    # T = 2 by hand: cos^2 of 0.508 / 1.008 * 90 degrees over cos^2 of 0.008 / 1.008 * 90 degrees
    first = (math.cos(math.radians(45.357142857)) / math.cos(math.radians(0.714285714))) ** 2
    assert get_named_beta_schedule("cosine", 2) == pytest.approx([1 - first, 0.999])


@pytest.mark.parametrize(
    ("alpha_bar", "b", "scaled"),
    [
        (0.5, 0.5, 0.2),  # 1/4 to 1 of noise
        (0.9, 1 / 3, 0.5),  # 9 to 1 becomes 1 to 1
        (0.8, 2, 16 / 17),
        (0.04, 0.2, 1 / 601),  # 1/24 becomes 1/600
        (0.3, 1, 0.3),
    ],
)
def test_a_scaled_schedule_by_hand(alpha_bar, b, scaled):
    """The signal-to-noise ratio becomes b^2 times what it was."""
    schedule = NoiseSchedule(torch.tensor([alpha_bar], dtype=torch.float64)).scaled(b)
    assert schedule.alpha_bar.item() == pytest.approx(scaled, rel=1e-12)


@pytest.mark.parametrize("b", [0.1, 0.2, 3.0])
def test_a_scaled_schedule_at_some_times(b):
    scaled = LINEAR.scaled(b)
    assert (scaled.alpha_bar.diff() < 0).all() and scaled.alpha_bar.dtype == torch.float64
    for t in (0, 100, 500, 999):
        share = LINEAR.alpha_bar[t].item()
        level = scaled.at(t)
        assert level.alpha**2 == pytest.approx(b**2 * share / (1 - share + b**2 * share))
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1)
        assert level.log_snr == pytest.approx(LINEAR.at(t).log_snr + math.log(b))
        assert scaled.at_log_snr(level.log_snr).t == pytest.approx(t, abs=1e-6)


def test_a_scaled_schedule_noises_a_scaled_mask_and_divides_by_its_deviation():
    x0 = torch.randint(2, (4, 1, 8, 8)).double() * 2 - 1  # of variance 1
    eps, t, b = torch.randn(4, 1, 8, 8).double(), torch.tensor([0, 99, 600, 999]), 0.2
    share = LINEAR.alpha_bar[t][:, None, None, None]
    noisy = LINEAR.add_noise(b * x0, t, eps) / (b**2 * share + 1 - share).sqrt()
    torch.testing.assert_close(LINEAR.scaled(b).add_noise(x0, t, eps), noisy)
    process = create_model_and_diffusion(input_scale=b, num_channels=32)[1]
    torch.testing.assert_close(process.schedule.alpha_bar, LINEAR.scaled(b).alpha_bar)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [21, 250, 1000])
def test_alpha_bar_is_the_cumulative_product_of_one_minus_beta(name, steps):
    betas = get_named_beta_schedule(name, steps)
    alpha_bar = NoiseSchedule.named(name, steps).alpha_bar
    assert alpha_bar.dtype == torch.float64
    np.testing.assert_allclose(alpha_bar, np.cumprod(1 - betas), rtol=1e-12)
    assert ((betas > 0) & (betas < 1)).all()
    assert (alpha_bar.diff() < 0).all()


@pytest.mark.parametrize("steps", [1, 5, 19, 20])
def test_short_linear_schedule_is_refused(steps):
    with pytest.raises(
        UserError, match=rf"--diffusion_steps {steps}: .*at least 21 steps.*{20 / steps:.3g}"
    ):
        get_named_beta_schedule("linear", steps)
    assert NoiseSchedule.named("cosine", steps).alpha_bar.min() > 0


def test_impossible_schedules_are_refused():
    with pytest.raises(UserError, match=r"--noise_schedule sine: .*Choose linear or cosine\."):
        get_named_beta_schedule("sine", 1000)
    with pytest.raises(UserError, match="--diffusion_steps 0: must be at least 1"):
        get_named_beta_schedule("cosine", 0)


def test_add_noise_has_the_moments_of_the_forward_process():
    t, pixels, x0 = torch.tensor([0, 400, 999]), 200 * 150, 0.7
    eps = torch.randn(3, 1, 200, 150, generator=torch.Generator().manual_seed(1))
    x_t = LINEAR.add_noise(torch.full_like(eps, x0), t, eps)
    assert x_t.dtype == torch.float32
    for row, alpha_bar in zip(x_t, LINEAR.alpha_bar[t].tolist(), strict=True):
        variance = 1 - alpha_bar
        assert row.mean().item() == pytest.approx(
            math.sqrt(alpha_bar) * x0, abs=4 * math.sqrt(variance / pixels)
        )
        assert row.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / pixels))


def test_add_noise_uses_the_timestep_of_each_row():
    x0, eps = torch.ones(2, 3, 1, 2), torch.full((2, 3, 1, 2), 2.0)
    schedule = NoiseSchedule(torch.tensor([0.64, 0.36], dtype=torch.float64))
    x_t = schedule.add_noise(x0, torch.tensor([1, 0]), eps)
    torch.testing.assert_close(x_t[0], torch.full((3, 1, 2), 0.6 + 0.8 * 2))
    torch.testing.assert_close(x_t[1], torch.full((3, 1, 2), 0.8 + 0.6 * 2))


def test_levels_of_integer_timesteps():
    for t in (0, 1, 400, 999):
        level = LINEAR.at(t)
        assert level.t == t
        assert level.alpha**2 == pytest.approx(LINEAR.alpha_bar[t].item(), rel=1e-12)
        assert level.sigma**2 == pytest.approx(1 - LINEAR.alpha_bar[t].item(), rel=1e-10)
        assert level.log_snr == pytest.approx(math.log(level.alpha / level.sigma), rel=1e-12)
    assert CLEAN == (-1, 1, 0)
    assert CLEAN.log_snr == math.inf


def test_log_alpha_is_linear_between_timesteps():
    schedule = NoiseSchedule(torch.tensor([0.64, 0.01], dtype=torch.float64))
    level = schedule.at(0.5)
    assert level.t == 0.5
    assert level.alpha == pytest.approx(math.sqrt(0.8 * 0.1))
    assert level.sigma == pytest.approx(math.sqrt(1 - 0.8 * 0.1))
    assert schedule.at(0.25).alpha == pytest.approx(0.8**0.75 * 0.1**0.25)


@settings(deadline=None)
@given(st.floats(0, 999))
def test_at_log_snr_inverts_at(t):
    level = LINEAR.at(t)
    back = LINEAR.at_log_snr(level.log_snr)
    assert back.t == pytest.approx(t, abs=1e-6)
    assert back.alpha == pytest.approx(level.alpha, rel=1e-10)
    assert back.sigma == pytest.approx(level.sigma, rel=1e-8)
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("t", [-0.001, 999.001, math.nan])
def test_timesteps_outside_the_schedule_are_refused(t):
    with pytest.raises(ValueError, match="outside the schedule"):
        LINEAR.at(t)


def test_levels_follow_the_given_timesteps_and_end_clean():
    levels = LINEAR.levels([999, 500.5, 0])
    assert [level.t for level in levels] == [999, 500.5, 0, -1]
    assert levels[-1] == CLEAN
    assert LINEAR.levels([999, 0], end=None) == [LINEAR.at(999), LINEAR.at(0)]


@pytest.mark.parametrize("spec", ["10,15,20", "ddim25"])
def test_respacing_is_golden(spec):
    golden = np.load(GOLDEN / f"respace_{spec.replace(',', '_')}.npz")
    kept = sorted(space_timesteps(1000, spec))
    assert kept == golden["timestep_map"].tolist()

    alphas = [1.0] + [LINEAR.at(t).alpha for t in kept]
    np.testing.assert_allclose(np.square(alphas[1:]), golden["alphas_cumprod"], rtol=1e-10)
    betas = [1 - (now / before) ** 2 for before, now in pairwise(alphas)]
    np.testing.assert_allclose(betas, golden["betas"], rtol=1e-10)


def test_respacing_by_hand():
    assert space_timesteps(10, "") == set(range(10))
    assert space_timesteps(10, "1") == {0}
    assert space_timesteps(10, "4") == space_timesteps(10, [4]) == {0, 3, 6, 9}
    assert space_timesteps(11, "3,2") == {0, 2, 5, 6, 10}  # sections 0..5 and 6..10; 2.5 -> 2
    assert space_timesteps(10, "ddim4") == {0, 3, 6, 9}
    assert space_timesteps(10, "ddim5") == {0, 2, 4, 6, 8}


def test_respacing_adds_its_stride_up():
    # 999 / 20 * 10 is 499.5, which rounds to the even 500; added up ten times, 999 / 20 falls short
    # of the half. A floating-point error decides for the other counts, too.
    assert 499 in space_timesteps(1000, "21")
    for count in range(2, 1001, 7):
        position, kept = 0.0, set()
        for _ in range(count):
            kept.add(round(position))
            position += 999 / (count - 1)
        assert space_timesteps(1000, [count]) == kept


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 500))
def test_sections_keep_their_counts_and_their_ends(counts, spare):
    steps = max(counts) * len(counts) + spare
    kept = space_timesteps(steps, ",".join(map(str, counts)))
    sizes = [steps // len(counts) + (i < steps % len(counts)) for i in range(len(counts))]
    for count, size, start in zip(counts, sizes, np.cumsum([0, *sizes]), strict=False):
        section = sorted(t - start for t in kept if start <= t < start + size)
        assert len(section) == count
        assert section[0] == 0
        assert count == 1 or section[-1] == size - 1
        gaps = np.diff(section)
        assert count < 3 or gaps.max() - gaps.min() <= 1
    assert len(kept) == sum(counts)


@settings(deadline=None)
@given(st.integers(2, 2000), st.integers(1, 50))
def test_ddim_spacing_is_a_constant_stride_from_zero(steps, stride):
    count = len(range(0, steps, stride))
    kept = sorted(space_timesteps(steps, f"ddim{count}"))
    assert len(kept) == count
    assert kept[0] == 0
    assert kept[-1] < steps
    assert len(set(np.diff(kept))) <= 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("11", ": a section of 10 trained steps cannot give 11, but 1 to 10 steps"),
        ("6,2", ": a section of 5 trained steps cannot give 6, but 1 to 5 steps"),
        ("0", ": a section of 10 trained steps cannot give 0, but 1 to 10 steps"),
        ("ddim7", " ddim7: no constant stride through 10 steps gives 7"),
        ("ddim0", " ddim0: no constant stride through 10 steps gives 0"),
        ("ddim", "'ddim' is not a list of counts. Write whole numbers separated by commas"),
        ("ten", "'ten' is not a list of counts"),
        ("5,,5", "'5,,5' is not a list of counts"),
        ("-5", "'-5' is not a list of counts"),
        ("2.5", "'2.5' is not a list of counts"),
    ],
)
def test_impossible_respacing_is_refused(spec, message):
    with pytest.raises(UserError, match="--timestep_respacing") as error:
        space_timesteps(10, spec)
    assert message in str(error.value)
