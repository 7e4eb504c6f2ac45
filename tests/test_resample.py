"""Schedule samplers: probabilities and weights by hand, no bias, state across a restart."""

import pytest
import torch

from guided_diffusion.resample import (
    SCHEDULE_SAMPLERS,
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)


def updated(count, history, losses, **options):
    """A resampler that was updated with the losses of each timestep, oldest first."""
    sampler = LossSecondMomentResampler(count, history, **options)
    for position, values in enumerate(losses):
        sampler.update(torch.full((len(values),), position), torch.tensor(values))
    return sampler


def test_probabilities_by_hand():
    sampler = updated(3, 2, [[3, 4], [0, 1], [2, 2]], uniform_share=0.1)
    rms = torch.tensor([12.5, 0.5, 4.0]).double().sqrt()
    expected = 0.9 * rms / rms.sum() + 0.1 / 3
    torch.testing.assert_close(sampler.probabilities, expected)
    assert sampler.probabilities.sum().item() == pytest.approx(1)


def test_only_the_last_losses_count():
    sampler = updated(2, 2, [[100, 3, 4], [1, 1]], uniform_share=0.0)
    rms = torch.tensor([12.5, 1.0]).double().sqrt()
    torch.testing.assert_close(sampler.probabilities, rms / rms.sum())


def test_uniform_until_every_timestep_has_a_full_history():
    sampler = updated(4, 3, [[5, 5, 5], [1, 1, 1], [9, 9, 9], [2, 2]])
    assert sampler.probabilities.tolist() == [0.25] * 4
    _, weights = sampler.sample(50)
    assert weights.tolist() == [1] * 50
    sampler.update(torch.tensor([3]), torch.tensor([2.0]))
    assert sampler.probabilities.tolist() != [0.25] * 4


def test_defaults_are_the_published_ones():
    sampler = updated(2, 10, [[1.0] * 10, [3.0] * 10])
    default = LossSecondMomentResampler(2)
    default.load_state_dict(sampler.state_dict())
    expected = [0.999 * 0.25 + 0.0005, 0.999 * 0.75 + 0.0005]
    assert default.probabilities.tolist() == pytest.approx(expected)
    assert not updated(2, 10, [[1.0] * 9, [3.0] * 10]).probabilities.diff().any()
    assert LossSecondMomentResampler(2)._losses.shape == (2, 10)


def test_zero_losses_keep_it_uniform():
    assert updated(2, 2, [[0, 0], [0, 0]]).probabilities.tolist() == [0.5, 0.5]


def test_weights_keep_the_expected_loss_unbiased():
    sampler = updated(3, 1, [[1], [2], [5]], uniform_share=0.04)
    torch.manual_seed(0)
    positions, weights = sampler.sample(60_000)
    assert (positions.dtype, weights.dtype) == (torch.int64, torch.float32)
    probabilities = sampler.probabilities
    torch.testing.assert_close(weights, (1 / (3 * probabilities[positions])).float())

    counts = torch.bincount(positions, minlength=3) / 60_000
    torch.testing.assert_close(counts, probabilities.float(), rtol=0, atol=0.01)
    losses = torch.tensor([1.0, 20.0, -3.0])
    assert (losses[positions] * weights).mean().item() == pytest.approx(6.0, abs=0.25)


@pytest.mark.parametrize("name", SCHEDULE_SAMPLERS)
def test_state_round_trip(name):
    sampler = create_named_schedule_sampler(name, 5)
    for step in range(60):
        positions = torch.tensor([step % 5, (step + 2) % 5])
        sampler.update(positions, positions + 0.1 * step)
    other = create_named_schedule_sampler(name, 5)
    state = sampler.state_dict()
    other.load_state_dict(state)

    for one in (sampler, other):  # both continue alike, and the saved state does not change
        one.update(torch.tensor([3, 3]), torch.tensor([7.0, 8.0]))
    drawn = []
    for one in (sampler, other):
        torch.manual_seed(1)
        drawn.append(one.sample(40))
    torch.testing.assert_close(drawn[0], drawn[1])
    third = create_named_schedule_sampler(name, 5)
    third.load_state_dict(state)
    torch.testing.assert_close(third.state_dict(), state)
    if state:
        assert not torch.equal(sampler.state_dict()["losses"], state["losses"])


def test_uniform_draws_every_timestep_with_weight_one():
    sampler = create_named_schedule_sampler("uniform", 6)
    assert isinstance(sampler, UniformSampler)
    torch.manual_seed(0)
    positions, weights = sampler.sample(6000)
    assert weights.tolist() == [1] * 6000
    counts = torch.bincount(positions, minlength=6)
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 5 * 30


def test_samplers_by_name():
    assert isinstance(
        create_named_schedule_sampler("loss-second-moment", 3), LossSecondMomentResampler
    )
    assert SCHEDULE_SAMPLERS == ("uniform", "loss-second-moment")
