"""The training loop: right gradients, bit-equal resumption, averages, limits, the log."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_csv, refused, script, succeeded, training
from loops import Discs, batch_of, equal, make_loop, resumed
from torch import Tensor, nn
from torch.testing import assert_close

from guided_diffusion import logger
from guided_diffusion.checkpoint import LATEST, load_checkpoint
from guided_diffusion.data.batches import Batch, training_batches
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.ema import ExponentialAverage
from guided_diffusion.training.step_log import StepLog


def gradient(loop: TrainLoop, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(3)
    loss = loop.forward_backward(batch)
    return loss, [parameter.grad for parameter in loop.parameters if parameter.grad is not None]


@pytest.fixture(autouse=True)
def _quiet(quiet: None) -> None:
    """No test of this file logs to the console, unless it configures the log itself."""


# ------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
@pytest.mark.parametrize("microbatch", [1, 3, 4, 9])
def test_microbatches_give_the_gradient_of_the_batch(
    microbatch: int, sampler: str, tmp_path: Path
) -> None:
    options = {"diffusion_steps": 3, "schedule_sampler": sampler}
    loss, full = gradient(make_loop(tmp_path, **options), batch_of(4))
    same, parts = gradient(make_loop(tmp_path, microbatch=microbatch, **options), batch_of(4))
    assert_close(same, loss)
    assert len(full) == len(parts) > 20
    largest = max(float(part.abs().max()) for part in full)
    for one, other in zip(parts, full, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6 * largest)


def test_the_first_microbatch_alone_has_another_gradient(tmp_path: Path) -> None:
    _, full = gradient(make_loop(tmp_path), batch_of(4))
    _, first = gradient(make_loop(tmp_path), batch_of(1))
    one, other = (torch.cat([part.flatten() for part in parts]) for parts in (first, full))
    assert (one - other).norm() > 0.3 * other.norm()


def test_the_loss_weights_of_timesteps_are_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a full history the resampler weighs a loss by 1 / (T p(t))."""
    loop = make_loop(tmp_path, schedule_sampler="loss-second-moment", diffusion_steps=2)
    for _ in range(10):
        loop.schedule_sampler.update(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
    weighted: list[Tensor] = []
    losses = GaussianDiffusion.training_losses

    def recording(diffusion: Any, net: Any, x0: Tensor, t: Tensor, **rest: Any) -> dict[str, Any]:
        terms = losses(diffusion, net, x0, t, **rest)
        weighted.append((terms["loss"].detach() * torch.where(t == 0, 2.0, 2 / 3)).mean())
        return terms

    monkeypatch.setattr(GaussianDiffusion, "training_losses", recording)
    loss, _ = gradient(loop, batch_of(6))
    assert_close(loss, weighted[0], rtol=2e-3, atol=0)


def test_a_batch_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="masks"):
        make_loop(tmp_path).forward_backward(batch_of(2)._replace(mask=None))


# ------------------------------------------------------------------------------ resumption


def test_equal_compares_nested_values() -> None:
    assert equal({"a": [torch.ones(2), 1]}, {"a": [torch.ones(2), 1]})
    assert not equal({"a": [torch.ones(2), 1]}, {"a": [torch.ones(2) + 1e-7, 1]})
    assert not equal({"a": 1}, {"a": 1, "b": 2})
    assert not equal([torch.ones(2)], [torch.ones(2, dtype=torch.float64)])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", ["uniform", "loss-second-moment"])
def test_resumed_training_is_bit_equal(sampler: str, workers: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "schedule_sampler": sampler,
        "num_workers": workers,
        "dropout": 0.3,
        "microbatch": 3,
        "weight_decay": 0.1,
        "diffusion_steps": 2,
        "batch_size": 8,
    }
    (tmp_path / "at once").mkdir()
    (tmp_path / "in two").mkdir()
    at_once = make_loop(tmp_path / "at once", max_steps=8, **options).run_loop()

    half = make_loop(tmp_path / "in two", max_steps=4, **options).run_loop()
    torch.rand(7)  # the resumed process is another one
    second = resumed(make_loop(tmp_path / "in two", max_steps=8, **options), half)
    if sampler != "uniform":
        probabilities = second.schedule_sampler.probabilities  # type: ignore[attr-defined]
        assert probabilities[0] != probabilities[1]
    in_two = second.run_loop()

    one, other = load_checkpoint(at_once), load_checkpoint(in_two)
    assert (one.step, other.step, half.name) == (8, 8, "savedmodel000004.pt")
    for part in ("model", "ema", "training", "options"):
        assert equal(getattr(one, part), getattr(other, part)), part
    assert not equal(one.model, load_checkpoint(half).model)
    assert one.training["optimizer"]["state"][0]["step"] == 8


@pytest.mark.parametrize("change", [{"seed": 2}, {"dropout": 0.3}, {"batch_size": 5}])
def test_other_settings_give_other_weights(change: dict[str, Any], tmp_path: Path) -> None:
    one = load_checkpoint(make_loop(tmp_path, max_steps=2).run_loop())
    other = load_checkpoint(make_loop(tmp_path, max_steps=2, **change).run_loop())
    assert not equal(one.model, other.model)


def test_random_draws_depend_on_the_step_alone(tmp_path: Path) -> None:
    losses = []
    for noise in (1, 2):
        loop = make_loop(tmp_path, dropout=0.3)
        torch.manual_seed(noise)
        losses.append([float(loop.run_step(batch_of(4))) for _ in range(3)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_the_script_resumes_bit_equal(brats: Path, trained: Path, tmp_path: Path) -> None:
    command = training(brats, tmp_path / "run")
    succeeded(script("segmentation_train", *command, "--max_steps", 2))
    said = succeeded(script("segmentation_train", *command, "--max_steps", 4, "--resume", "auto"))
    assert f"resuming {tmp_path / 'run' / LATEST} at step 2" in said

    one, other = load_checkpoint(trained / LATEST), load_checkpoint(tmp_path / "run" / LATEST)
    assert equal({**vars(one), "run": {}}, {**vars(other), "run": {}})


def test_dropout_is_recorded_and_may_change_on_the_way(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    """Masks are drawn with the rate of training, which is not known otherwise."""
    assert load_checkpoint(trained / LATEST).options["dropout"] == 0.1
    command = training(brats, tmp_path)
    place = command.index("--dropout")
    start = [*("--resume_checkpoint", trained), "--max_steps", 5]
    for given, expected in ((["--dropout", 0.3], 0.3), ([], 0.1)):
        own = [*command[:place], *given, *command[place + 2 :]]
        succeeded(script("segmentation_train", *own, *start))
        assert load_checkpoint(tmp_path / LATEST).options["dropout"] == expected


def test_any_checkpoint_can_be_continued_elsewhere(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    path = trained / "savedmodel000002.pt"
    command = [*training(brats, tmp_path / "new"), "--resume_checkpoint", path, "--max_steps", 4]
    assert f"resuming {path} at step 2" in succeeded(script("segmentation_train", *command))
    assert equal(
        load_checkpoint(trained / LATEST).model, load_checkpoint(tmp_path / "new" / LATEST).model
    )


def test_resuming_needs_no_network_flags(brats: Path, trained: Path, tmp_path: Path) -> None:
    succeeded(
        script(
            "segmentation_train",
            *("--data_dir", brats / "training", "--out_dir", tmp_path / "new", "--max_steps", 5),
            *("--resume_checkpoint", trained, "--batch_size", 2, "--ema_rate", "0.9"),
        )
    )
    continued, start = load_checkpoint(tmp_path / "new" / LATEST), load_checkpoint(trained / LATEST)
    assert continued.step == 5
    assert continued.options == start.options


@pytest.mark.parametrize(
    ("first", "then"), [("uniform", "loss-second-moment"), ("loss-second-moment", "uniform")]
)
def test_another_schedule_sampler_starts_its_history_anew(
    first: str, then: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_loop(tmp_path, max_steps=2, schedule_sampler=first).run_loop()
    logger.configure()
    resumed(make_loop(tmp_path, schedule_sampler=first), path)
    assert "anew" not in capsys.readouterr().out
    other = make_loop(tmp_path, max_steps=3, schedule_sampler=then)
    resumed(other, path)
    assert "--schedule_sampler is not the checkpoint's" in capsys.readouterr().out
    assert not any(value.any() for value in other.schedule_sampler.state_dict().values())
    assert load_checkpoint(other.run_loop()).step == 3


def test_a_checkpoint_without_a_loss_scale_continues_with_one(tmp_path: Path) -> None:
    path = make_loop(tmp_path, max_steps=2).run_loop()
    scaled = make_loop(tmp_path, max_steps=3)
    scaled.scaler = scaled.checkpoints.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    path = resumed(scaled, path).run_loop()
    again = make_loop(tmp_path)
    again.scaler = again.checkpoints.scaler = torch.amp.GradScaler("cpu")
    assert resumed(again, path).scaler.get_scale() == 2, "a scale that was kept goes on"
    assert resumed(make_loop(tmp_path), path).step == 3


def test_an_average_that_starts_anew_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_loop(tmp_path, max_steps=2).run_loop()
    logger.configure()
    resumed(make_loop(tmp_path), path)
    assert "--ema_rate" not in capsys.readouterr().out
    resumed(make_loop(tmp_path, ema_rate="0.9,0.95,0.5"), path)
    assert "--ema_rate 0.95,0.5: the checkpoint has no such average" in capsys.readouterr().out


def test_a_run_that_would_be_overwritten_is_mentioned(brats: Path, tmp_path: Path) -> None:
    command = [*training(brats, tmp_path), "--max_steps", 1]
    assert "--resume auto" not in succeeded(script("segmentation_train", *command))
    said = succeeded(script("segmentation_train", *command))
    assert f"{tmp_path / LATEST} exists" in said and "--resume auto" in said
    never = script("segmentation_train", *command, "--in_ch", 4)
    assert "--in_ch" in refused(never) and never.out == ""


def test_resume_auto_starts_a_new_run_in_an_empty_folder(brats: Path, tmp_path: Path) -> None:
    command = [*training(brats, tmp_path / "new"), "--max_steps", 1, "--resume", "auto"]
    assert "steps 0 to 1" in succeeded(script("segmentation_train", *command))


# ------------------------------------------------------------------------------ averages


def test_the_average_warms_up() -> None:
    """From 0 towards a constant 1 the distance is the product of the rates: n! 9! / (n + 9)!."""
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.zero_()
    fast, slow = ExponentialAverage(net, 0.3), ExponentialAverage(net, 0.9999)
    net.weight.data.fill_(1.0)
    distance = 1.0
    for step in range(30):
        fast.update(step)
        slow.update(step)
        distance *= min(0.3, (1 + step) / (10 + step))
        assert 1 - float(fast.values[0]) == pytest.approx(distance, rel=1e-4, abs=1e-6)
        closed = math.factorial(step + 1) * math.factorial(9) / math.factorial(step + 10)
        assert 1 - float(slow.values[0]) == pytest.approx(closed, rel=1e-4, abs=1e-6)


def test_a_warm_average_decays_at_its_rate() -> None:
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.zero_()
    average = ExponentialAverage(net, 0.99)
    net.weight.data.fill_(1.0)
    for step in range(5000, 5100):
        average.update(step)
    assert 1 - float(average.values[0]) == pytest.approx(0.99**100, rel=1e-4)


def test_buffers_are_not_averaged() -> None:
    net = nn.BatchNorm1d(2)
    average = ExponentialAverage(net, 0.9)
    net.running_mean.fill_(5.0)
    net.weight.data.fill_(3.0)
    average.update(0)
    state = average.state_dict()
    assert state.keys() == net.state_dict().keys()
    assert_close(state["running_mean"], torch.full((2,), 5.0))
    assert_close(state["weight"], torch.full((2,), 1 * 0.1 + 3 * 0.9))


def test_an_average_continues_from_its_state() -> None:
    net = nn.Linear(2, 2)
    average = ExponentialAverage(net, 0.9)
    net.weight.data += 1
    average.update(50)
    copy = ExponentialAverage(nn.Linear(2, 2), 0.9)
    copy.load(average.state_dict())
    assert_close(copy.values, average.values, rtol=0, atol=0)


def test_every_rate_is_saved(tmp_path: Path) -> None:
    saved = load_checkpoint(make_loop(tmp_path, max_steps=3).run_loop())
    assert saved.ema.keys() == {"0.9", "0.99"}
    assert not equal(saved.ema["0.9"], saved.model)


# ------------------------------------------------------------------------------ learning, limits


def test_the_loss_falls(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, lr=3e-3, batch_size=6)
    losses = [float(loop.run_step(batch_of(6))) for _ in range(40)]
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


def test_the_learning_rate_anneals_to_zero_and_the_run_ends(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, lr=0.5, lr_anneal_steps=8, max_steps=100)
    assert loop.last_step == 8
    for step in range(1, 8):
        loop.run_step(batch_of(2))
        assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * (1 - step / 8))


def test_the_learning_rate_is_constant_without_annealing(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, lr=0.5, max_steps=2)
    loop.run_loop()
    assert loop.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("flags", "end"),
    [
        ({"max_steps": 3}, 3),
        ({"lr_anneal_steps": 3}, 3),
        ({"lr_anneal_steps": 2, "max_steps": 5}, 2),
        ({"lr_anneal_steps": 5, "max_steps": 2}, 2),
        ({"lr_anneal_steps": 3, "max_steps": 0}, 3),
    ],
)
def test_when_a_run_ends(flags: dict[str, int], end: int, brats: Path, tmp_path: Path) -> None:
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    said = succeeded(script("segmentation_train", *training(brats, tmp_path), *words))
    assert f"steps 0 to {end}\n" in said
    assert load_checkpoint(tmp_path / LATEST).step == end


def test_annealing_can_be_longer_than_the_default_limit(tmp_path: Path) -> None:
    """In the parents' scripts --lr_anneal_steps alone ends a run."""
    loop = make_loop(tmp_path, lr_anneal_steps=300_000, max_steps=300_000)
    assert loop.last_step == 300_000


class Enough(Exception):
    """Ends a run that would not end."""


@pytest.mark.parametrize("max_steps", [0, 5])
def test_max_steps_0_sets_no_limit(
    max_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(tmp_path, max_steps=max_steps)

    def run_step(batch: Batch) -> Tensor:
        loop.step += 1
        loop.log.losses(torch.tensor([0]), {"loss": torch.zeros(1)})
        loop.log.grad_norms.append(torch.zeros(()))
        if loop.step == 200:
            raise Enough
        return torch.zeros(())

    monkeypatch.setattr(loop, "run_step", run_step)
    if max_steps:
        loop.run_loop()
        assert loop.step == max_steps
    else:
        assert loop.last_step == 0
        with pytest.raises(Enough):
            loop.run_loop()


def test_a_finished_run_is_left_at_its_step(brats: Path, trained: Path, tmp_path: Path) -> None:
    command = [*training(brats, tmp_path), "--resume_checkpoint", trained, "--max_steps", 4]
    succeeded(script("segmentation_train", *command))
    assert load_checkpoint(tmp_path / LATEST).step == 4


# ------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("batch_size", [1, 4, 6, 9])
def test_every_case_comes_once_in_an_epoch(batch_size: int) -> None:
    batches = list(islice(training_batches(Discs(6), batch_size, seed=1), 18))
    assert all(len(batch.names) == batch_size for batch in batches)
    names = [name for batch in batches for name in batch.names]
    epochs = [names[start : start + 6] for start in range(0, len(names) - 5, 6)]
    assert len(epochs) >= 3
    assert all(sorted(epoch) == [f"disc{i}" for i in range(6)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs[:3]}) == 3


def test_the_order_depends_on_the_seed() -> None:
    def names(seed: int) -> list[list[str]]:
        return [batch.names for batch in islice(training_batches(Discs(9), 2, seed=seed), 9)]

    assert names(1) == names(1)
    assert names(1) != names(2)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_can_start_at_any_step(workers: int) -> None:
    full = [batch.names for batch in islice(training_batches(Discs(7), 3, seed=1), 12)]
    for first in (1, 2, 5, 11):
        rest = training_batches(Discs(7), 3, seed=1, first_step=first, workers=workers)
        assert [batch.names for batch in islice(rest, 12 - first)] == full[first:]


def test_orders_are_evenly_mixed() -> None:
    first = Counter(next(training_batches(Discs(4), 1, seed=seed)).names[0] for seed in range(200))
    assert len(first) == 4 and min(first.values()) > 25


def test_the_last_image_is_drawn_as_often_as_the_others(tmp_path: Path) -> None:
    batch = next(training_batches(Discs(3), 3, seed=1))
    for image, name in zip(batch.image, batch.names, strict=True):
        assert_close(image, Discs()[int(name.removeprefix("disc"))].image, rtol=0, atol=0)


# ------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize(
    ("interval", "end", "steps"),
    [(2, 5, [2, 4, 5]), (2, 4, [2, 4]), (100, 3, [3]), (1, 2, [1, 2])],
)
def test_checkpoints_of_a_run(interval: int, end: int, steps: list[int], tmp_path: Path) -> None:
    last = make_loop(tmp_path, max_steps=end, save_interval=interval).run_loop()
    names = [f"savedmodel{step:06d}.pt" for step in steps]
    assert {path.name for path in tmp_path.iterdir()} == {LATEST, *names}
    assert last.name == names[-1]
    assert (tmp_path / LATEST).read_bytes() == last.read_bytes()


def test_the_log_of_a_run(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "config.yaml",
        "curves.png",
        "log.txt",
        "progress.csv",
        "progress.json",
        "savedmodel000002.pt",
        "savedmodel000004.pt",
        LATEST,
    }
    text = (trained / "log.txt").read_text("utf-8")
    assert text.startswith(f"Logging to {trained}\n")
    assert "--fp16_scale_growth has no effect" in text
    assert "4 BRATS cases, 4 channels" in text and "steps 0 to 4" in text
    table = read_csv(trained / "progress.csv")
    assert [row["step"] for row in table] == ["2", "4"]
    assert [row["samples"] for row in table] == ["4", "8"]
    for row in table:
        assert float(row["lr"]) == pytest.approx(3e-3)
        assert float(row["loss"]) == pytest.approx(float(row["mse"])) and float(row["loss"]) > 0
        assert all(float(row[key]) > 0 for key in ("grad_norm", "param_norm", "steps_per_s"))
    lines = (trained / "progress.json").read_text("utf-8").splitlines()
    for line, row in zip(lines, table, strict=True):
        assert {key: str(value) for key, value in json.loads(line).items()} == {
            key: value for key, value in row.items() if value
        }


def test_log_lines_are_appended_over_a_resume(brats: Path, tmp_path: Path) -> None:
    command = [*training(brats, tmp_path), "--log_interval", 1]
    succeeded(script("segmentation_train", *command, "--max_steps", 1))
    before = (tmp_path / "log.txt").read_text("utf-8")
    succeeded(script("segmentation_train", *command, "--max_steps", 3, "--resume", "auto"))
    assert (tmp_path / "log.txt").read_text("utf-8").startswith(before)
    assert [row["step"] for row in read_csv(tmp_path / "progress.csv")] == ["1", "2", "3"]
    assert len((tmp_path / "progress.json").read_text("utf-8").splitlines()) == 3


def test_a_new_key_adds_a_column_to_the_csv(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    for row in ({"a": 1, "b": 2}, {"a": 3}, {"b": 5, "c": "x,y"}, {"a": 7}):
        logger.append_row(path, row)
    assert path.read_text("utf-8").splitlines()[0] == "a,b,c"
    assert read_csv(path) == [
        {"a": "1", "b": "2", "c": ""},
        {"a": "3", "b": "", "c": ""},
        {"a": "", "b": "5", "c": "x,y"},
        {"a": "7", "b": "", "c": ""},
    ]


def test_losses_are_sorted_by_quarters_of_time() -> None:
    log = StepLog(8)
    log.losses(torch.tensor([0, 1, 2]), {"loss": torch.tensor([1.0, 3.0, 10.0])})
    log.losses(torch.tensor([7]), {"loss": torch.tensor([6.0])})
    parameters = [nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))]
    for scale in (1.0, 3.0):
        for parameter, value in zip(parameters, (6.0, 8.0), strict=True):
            parameter.grad = torch.tensor([scale * value])
        log.gradient(parameters)
    means = log.means(parameters)
    assert means.pop("steps_per_s") > 0
    assert means == {
        "loss": 5.0,
        "loss_q0": 2.0,
        "loss_q1": 10.0,
        "loss_q3": 6.0,
        "grad_norm": pytest.approx(20.0),
        "skipped": 0.0,
        "param_norm": pytest.approx(5.0),
    }
    log.losses(torch.tensor([3]), {"loss": torch.tensor([0.5])})
    log.gradient(parameters)
    assert log.means(parameters)["loss"] == 0.5


@pytest.mark.parametrize(("t", "quarter"), [(0, 0), (24, 0), (25, 1), (74, 2), (75, 3), (99, 3)])
def test_losses_at_the_borders_of_the_quarters(t: int, quarter: int) -> None:
    log = StepLog(100)
    log.losses(torch.tensor([t]), {"vb": torch.ones(1)})
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    log.gradient([parameter])
    means = log.means([parameter])
    assert [key for key in means if key.startswith("vb_")] == [f"vb_q{quarter}"]


def test_a_table_of_numbers() -> None:
    assert logger.table({"loss": 0.123456, "step": 12}) == "\n".join(
        ["-----------------", "| loss | 0.1235 |", "| step | 12     |", "-----------------"]
    )


def test_the_log_has_the_bound_of_a_learned_variance(brats: Path, tmp_path: Path) -> None:
    command = [*training(brats, tmp_path), "--learn_sigma", True, "--max_steps", 2]
    succeeded(script("segmentation_train", *command))
    (row,) = read_csv(tmp_path / "progress.csv")
    assert float(row["loss"]) == pytest.approx(float(row["mse"]) + float(row["vb"]), rel=1e-4)


def test_compilation_does_not_change_a_run(
    brats: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, *, mode: modes.append(mode))
    command = [*training(brats, tmp_path), "--max_steps", 4, "--compile", "default"]
    assert succeeded(script("segmentation_train", *command)).count("compiled in") == 1
    assert modes == ["default"]
    one, other = load_checkpoint(trained / LATEST), load_checkpoint(tmp_path / LATEST)
    assert all(torch.equal(one.model[name], value) for name, value in other.model.items())


def test_the_first_compiled_step_has_no_speed(
    brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    command = [*training(brats, tmp_path), "--compile", "default", "--log_interval", 1]
    succeeded(script("segmentation_train", *command, "--max_steps", 2))
    first, second = read_csv(tmp_path / "progress.csv")
    assert not first["steps_per_s"] and not first["minutes_left"]
    assert float(second["steps_per_s"]) > 0 and float(second["minutes_left"]) == 0


def test_a_missing_compiler_is_reported(
    brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[RuntimeError] = []

    def broken(*_: object) -> None:
        raise raised[-1]

    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(TrainLoop, "forward_backward", broken)
    command = [*training(brats, tmp_path), "--max_steps", 1]
    raised.append(RuntimeError("no C++ compiler\nlong trace"))
    error = refused(script("segmentation_train", *command, "--compile", "default"))
    assert "--compile: the compiler does not work (no C++ compiler)." in error
    assert "omit --compile" in error.lower()
    with pytest.raises(RuntimeError, match="no C"):
        script("segmentation_train", *command)
    raised.append(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    error = refused(script("segmentation_train", *command, "--compile", "default"))
    assert "more memory is needed than there is in step 1" in error and "--compile" not in error


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(precision: str, tmp_path: Path, brats: Path) -> None:
    flags = ["--use_fp16", True] if precision == "fp16" else ["--precision", precision]
    command = [*training(brats, tmp_path), "--max_steps", 2, *flags]
    assert f", {precision};" in succeeded(script("segmentation_train", *command))
    saved = load_checkpoint(tmp_path / LATEST)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in saved.model.values())
