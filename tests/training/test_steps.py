"""What a step draws: by row, so that any number of processes draws the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import batch_of, make_loop
from torch import Tensor
from torch.testing import assert_close

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.resample import (
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
)
from guided_diffusion.sampling import MemberNoise
from guided_diffusion.schedule import NoiseSchedule
from guided_diffusion.training import steps
from guided_diffusion.training.steps import Draw, draw

TIMES = (3, 10, 40)


def process(mask_dropout: float = 0.0, noise_share: float = 0.0) -> GaussianDiffusion:
    return GaussianDiffusion(
        NoiseSchedule.named("linear", 50),
        timesteps=TIMES,
        predict_xstart=True,
        mask_dropout=mask_dropout,
        noise_share=noise_share,
    )


def learned() -> ScheduleSampler:
    """A sampler that prefers the last of three timesteps."""
    sampler = LossSecondMomentResampler(3, history=1)
    sampler.update(torch.arange(3), torch.tensor([1.0, 2.0, 5.0]))
    return sampler


def drawn(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    *,
    rank: int = 0,
    world: int = 1,
    mask_dropout: float = 0.5,
    noise_share: float = 0.0,
    step: int = 7,
    sampler: ScheduleSampler | None = None,
) -> Draw:
    monkeypatch.setattr(steps, "rank", lambda: rank)
    monkeypatch.setattr(steps, "world_size", lambda: world)
    shape = torch.Size((rows, 2, 4, 4))
    diffusion = process(mask_dropout, noise_share)
    return draw(sampler or learned(), diffusion, shape, 1, step)


@pytest.mark.parametrize("mask_dropout", [0.0, 0.5])
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_draw_what_one_draws(
    world: int, mask_dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drawn(monkeypatch, 8, mask_dropout=mask_dropout)
    parts = [
        drawn(monkeypatch, 8 // world, rank=rank, world=world, mask_dropout=mask_dropout)
        for rank in range(world)
    ]
    for name, value in whole._asdict().items():
        if name == "positions":  # all processes learn from those of all
            own = [part.positions for part in parts]
            assert_close(torch.cat(own), value)
            continue
        assert_close(torch.cat([getattr(part, name) for part in parts]), value, rtol=0, atol=0)
    assert whole.t.tolist() == [TIMES[position] for position in whole.positions]
    assert len({*whole.eps.flatten().tolist()}) == whole.eps.numel(), "no two rows are alike"


def test_the_noise_of_a_row_follows_from_its_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = drawn(monkeypatch, 2), drawn(monkeypatch, 6, mask_dropout=0.0)
    assert_close(few.eps, many.eps[:2], rtol=0, atol=0)
    other = drawn(monkeypatch, 2, step=8).eps
    assert not torch.isin(other, few.eps).any()


def test_a_process_draws_its_own_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64 processes the noise of all took most of a step."""
    seeds: list[int] = []

    def noise(own: list[int]) -> MemberNoise:
        seeds.extend(own)
        return MemberNoise(own)

    monkeypatch.setattr(steps, "MemberNoise", noise)
    drawn(monkeypatch, 2, rank=5, world=64)
    assert len(seeds) == 2


def test_the_noise_is_standard_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    eps = torch.cat([drawn(monkeypatch, 50, step=step).eps for step in range(20)])
    assert eps.mean().item() == pytest.approx(0, abs=4 / eps.numel() ** 0.5)
    assert eps.std().item() == pytest.approx(1, abs=4 / (2 * eps.numel()) ** 0.5)
    rows = eps.flatten(1)
    apart = torch.corrcoef(rows)[~torch.eye(len(rows)).bool()]
    assert apart.std().item() == pytest.approx(rows.shape[1] ** -0.5, rel=0.02), "independent rows"


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_rows_without_a_noisy_mask(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "MemberNoise", lambda _: torch.zeros_like)
    many = [drawn(monkeypatch, 100, mask_dropout=share, step=step) for step in range(40)]
    withheld = torch.cat([one.withheld for one in many])
    chance = 4 * (share * (1 - share) / len(withheld)) ** 0.5
    assert withheld.double().mean().item() == pytest.approx(share, abs=chance)
    positions = torch.cat([one.positions for one in many]).double()
    apart = torch.corrcoef(torch.stack([positions, withheld.double()]))[0, 1]
    assert not 0 < share < 1 or abs(apart.item()) < 4 / len(withheld) ** 0.5, "times are as ever"


def test_the_share_of_rows_at_the_last_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.2 withheld, 0.5 at the last of three timesteps, and a third of the other 0.3."""
    monkeypatch.setattr(steps, "MemberNoise", lambda _: torch.zeros_like)
    sampler = UniformSampler(3)
    many = [
        drawn(monkeypatch, 100, mask_dropout=0.2, noise_share=0.5, step=step, sampler=sampler)
        for step in range(40)
    ]
    withheld, t = (torch.cat([getattr(one, name) for one in many]) for name in ("withheld", "t"))
    assert withheld.double().mean().item() == pytest.approx(0.2, abs=0.03)
    last = t[~withheld] == t.max()
    assert last.double().mean().item() == pytest.approx((0.5 + 0.1) / 0.8, abs=0.03)
    assert set(t.tolist()) == set(t[withheld].tolist()), "withheld rows keep the times they drew"


def test_nothing_is_drawn_for_a_network_that_never_sees_a_noisy_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(steps, "MemberNoise", None)
    one = drawn(monkeypatch, 4, mask_dropout=1.0)
    assert one.withheld.all() and not one.eps.any()
    assert one.weights.tolist() == [1] * 4


def test_rows_without_a_noisy_mask_have_the_weight_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights undo that some timesteps are drawn more often; these rows have none."""
    sampler = learned()
    one = drawn(monkeypatch, 200, sampler=sampler)
    assert isinstance(sampler, LossSecondMomentResampler)
    expected = (1 / (3 * sampler.probabilities[one.positions])).float()
    assert_close(one.weights, torch.where(one.withheld, 1.0, expected))
    assert (expected != 1).all() and one.withheld.any() and not one.withheld.all()


def test_a_sampler_of_timesteps_learns_from_rows_with_a_noisy_mask(
    quiet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(
        tmp_path,
        batch_size=6,
        microbatch=4,
        mask_dropout=0.5,
        mask_loss="dice_ce",
        diffusion_steps=2,
        schedule_sampler="loss-second-moment",
    )
    learnt: list[tuple[Tensor, Tensor]] = []
    update = loop.schedule_sampler.update

    def noted(positions: Tensor, losses: Tensor) -> None:
        learnt.append((positions, losses))
        update(positions, losses)

    monkeypatch.setattr(loop.schedule_sampler, "update", noted)
    count = torch.zeros(2, dtype=torch.int64)
    for step in range(4):
        one = draw(loop.schedule_sampler, loop.diffusion, torch.Size((6, 1, 16, 16)), 1, step)
        count += torch.bincount(one.positions[~one.withheld], minlength=2)
        loop.run_step(batch_of(6))
        assert torch.equal(learnt[-1][1].isnan(), one.withheld)
        assert torch.equal(learnt[-1][0], one.positions)
    assert 0 < int(count.sum()) < 24
    seen: Any = loop.schedule_sampler.state_dict()["seen"]
    assert seen.tolist() == count.tolist()


def test_the_log_tells_the_losses_without_a_noisy_mask_apart(quiet: None, tmp_path: Path) -> None:
    loop = make_loop(tmp_path, batch_size=6, mask_dropout=0.5, mask_loss="dice_ce")
    loop.schedule_sampler = UniformSampler(100)
    sizes = []
    for step in range(3):
        one = draw(loop.schedule_sampler, loop.diffusion, torch.Size((6, 1, 16, 16)), 1, step)
        sizes.append(int(one.withheld.sum()))
        loop.run_step(batch_of(6))
    means = loop.log.means(loop.parameters)
    parts = [means.get(f"loss_q{quarter}", 0.0) for quarter in range(4)]
    assert {"loss_direct", "ce_direct", "dice_direct"} < means.keys() and any(parts)
    assert means["loss_direct"] == pytest.approx(means["ce_direct"] + means["dice_direct"])
    noisy = 18 - sum(sizes)
    rest = (18 * means["ce"] - sum(sizes) * means["ce_direct"]) / noisy
    quarters = [means[f"ce_q{q}"] for q in range(4) if f"ce_q{q}" in means]
    assert min(quarters) - 1e-6 <= rest <= max(quarters) + 1e-6
