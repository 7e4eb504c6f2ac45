"""The memory order of feature maps: a rule by device, processor and what is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import script, succeeded, training
from torch import nn

from guided_diffusion.dist_util import memory_order, place_model

CPU = torch.device("cpu")


def on_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)


@pytest.mark.parametrize(
    ("processor", "of_training", "of_sampling"),
    [
        ("AVX2", torch.contiguous_format, torch.channels_last),
        ("AVX512", torch.channels_last, torch.channels_last),
    ],
)
def test_networks_are_placed_by_the_rule(
    processor: str,
    of_training: torch.memory_format,
    of_sampling: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_processor(processor, monkeypatch)
    for trained, order in ((True, of_training), (False, of_sampling)):
        net = place_model(nn.Conv2d(8, 16, 3), CPU, training=trained)
        assert net.weight.is_contiguous(memory_format=order)
        assert net(torch.zeros(1, 8, 9, 9)).is_contiguous(memory_format=order)
    for device in ("cuda", "mps"):
        assert memory_order(torch.device(device), training=True) == torch.channels_last


@pytest.mark.parametrize(
    ("processor", "said"), [("AVX2", "are contiguous in memory"), ("AVX512", "channels-last order")]
)
def test_training_says_which_order_it_takes(
    processor: str, said: str, brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_processor(processor, monkeypatch)
    out = succeeded(script("segmentation_train", *training(brats, tmp_path), "--max_steps", 1))
    assert [said in line for line in out.splitlines() if "feature maps" in line] == [True]
