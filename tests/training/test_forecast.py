"""What a run will take: operations, memory and time, said before and soon after it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import make_loop
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import logger
from guided_diffusion.options.segmentation import TrainingOptions
from guided_diffusion.script_util import NETWORKS, create_model_and_diffusion
from guided_diffusion.training import forecast
from guided_diffusion.training.cost import HALF, ImageCost, image_cost
from guided_diffusion.training.estimates import training_gib
from guided_diffusion.training.forecast import StepNeed, TimeForecast, announce_need
from guided_diffusion.unet import EncodeAndPredict, UNetModel

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "image_size": 64,
    "in_ch": 4,
    "num_channels": 32,
    "channel_mult": "1,2,2,2",
    "num_res_blocks": 1,
    "num_heads": 2,
}


def network(**flags: Any) -> UNetModel:
    return create_model_and_diffusion(**{**SMALL, **flags})[0]


@pytest.mark.parametrize("version", NETWORKS)
def test_the_operations_are_those_that_torch_counts(version: str) -> None:
    net = network(version=version)
    unfused = sdpa_kernel(SDPBackend.MATH)  # torch does not count the CPU's fused attention
    with torch.no_grad(), unfused, FlopCounterMode(display=False) as counter:
        x, image = torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64)
        EncodeAndPredict(net.eval())(x, torch.zeros(1), image)
    cost = image_cost(net)
    assert cost.flop == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_the_network_itself_is_left_as_it_is() -> None:
    net = network().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    image_cost(net)
    assert not net.training and all(p.grad is None for p in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) and value.device == CPU


class Layers(nn.Sequential):
    """A stand-in for a U-Net whose memory can be worked out by hand."""

    image_size, in_channels, mask_channels, num_classes = 64, 2, 1, None

    def __init__(self, depth: int) -> None:
        super().__init__(*(nn.Identity() for _ in range(depth)))
        self.weight = nn.Parameter(torch.ones(1))

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def forward(self, x: Any, t: Any, condition: Any, y: Any = None) -> Any:
        for _ in self:
            x = torch.sigmoid(x * self.weight)
        return (x,)


@pytest.mark.parametrize("depth", [1, 4, 9])
def test_the_memory_is_what_is_alive_at_once(depth: int) -> None:
    """A product keeps its input and a sigmoid its output: a map each; backward adds a few."""
    width = 4 * 64 * 64 / 2**30
    maps = image_cost(Layers(depth)).gib / width  # type: ignore[arg-type]
    assert depth + 2 <= maps <= depth + 6


@pytest.mark.parametrize("version", ["plain", "1"])
def test_the_memory_is_four_times_that_of_half_the_size(version: str) -> None:
    one, two = (image_cost(network(version=version, image_size=n)).gib for n in (64, 128))
    assert two == pytest.approx(4 * one, rel=0.15)


@pytest.mark.parametrize("version", ["plain", "2"])
def test_recomputed_levels_need_less_memory(version: str) -> None:
    none, fine, every = (
        image_cost(network(version=version, checkpoint_levels=levels)).gib
        for levels in ("none", "fine", "all")
    )
    assert every < fine < 0.75 * none


def test_a_step_needs_what_it_holds_and_its_images() -> None:
    cost = ImageCost(flop=1e9, gib=2.0)
    options = TrainingOptions(batch_size=8, microbatch=3, ema_rate="0.9,0.99")
    need = StepNeed.of(cost, options, parameters=2**28, precision="fp32")
    assert (need.held, need.copied, need.image, need.together) == (6, 5, 2, 3)
    assert need.held + need.copied == training_gib(2**28, 2)
    assert need.total == 12
    half = StepNeed.of(cost, options, parameters=2**28, precision="bf16")
    assert half.image == 2 * HALF


def test_what_fits_is_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "total_gib", lambda _: 40.0)
    assert StepNeed(6, 5, 2, 3).fitting(CPU) == 14
    assert StepNeed(60, 5, 2, 3).fitting(CPU) == 0


def test_a_run_says_what_its_steps_take(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    logger.configure()
    net = network()
    cost = image_cost(net)
    options = TrainingOptions(batch_size=4)
    assert announce_need(net, options, "fp32", CPU) > 4
    said = capsys.readouterr().out
    assert f"a step takes {3 * cost.flop / 1e9:,.0f} GFLOP an image" in said
    assert "4 images at a time" in said and "GiB" in said
    assert announce_need(nn.Linear(1, 1), options, "fp32", CPU) == 0


@pytest.mark.parametrize(
    ("each", "last", "device", "expected", "preset"),
    [
        (2.0, 100_011, "cpu", "the 100,000 steps that are left take about 2 days here", True),
        (20.0, 100_011, "cpu", "take about 23 days here", True),
        (0.1, 100_011, "cpu", "take about 3 hours here", False),
        (0.1, 111, "cpu", "take about 10 seconds here", False),
        (20.0, 100_011, "cuda", "take about 23 days here", False),
        (20.0, 11, "cpu", "", False),
        (20.0, 0, "cpu", "", False),
    ],
)
def test_the_time_of_a_run_is_told_after_ten_steps(
    each: float,
    last: int,
    device: str,
    expected: str,
    preset: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([0.0, 10 * each])
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: next(now))
    times = TimeForecast(0, last, torch.device(device))
    told = [times.after(step) for step in range(1, 14)]
    assert [bool(text) for text in told].count(True) == bool(expected)
    assert not any(told[:10]) and expected in told[10]
    assert ("--preset small" in told[10]) == preset


def test_a_resumed_run_tells_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0])
    monkeypatch.setattr(forecast.time, "perf_counter", lambda: next(now))
    times = TimeForecast(500, 700, CPU)
    (text,) = filter(None, [times.after(step) for step in range(501, 520)])
    assert "the 189 steps that are left" in text and "3 minutes" in text


def test_the_loop_tells_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger.configure()
    make_loop(tmp_path, max_steps=14).run_loop()
    assert capsys.readouterr().out.count("10 steps took") == 1
