"""A step keeps its device busy: what is read ahead, what is waited for, and when."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import Discs, batch_of, equal, make_loop
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion import train_util
from guided_diffusion.data.batches import training_batches
from guided_diffusion.data.datasets import Case
from guided_diffusion.errors import UserError
from guided_diffusion.training import checkpoints

DRAWS: dict[str, Any] = {
    "dropout": 0.3,
    "mask_loss": "dice_ce",
    "mask_dropout": 0.3,
    "schedule_sampler": "loss-second-moment",
    "diffusion_steps": 2,
    "microbatch": 3,
}


def test_reading_ahead_changes_no_draw(quiet: None, tmp_path: Path) -> None:
    """Images, times, noise and dropout are those of steps that are taken one after the other."""
    ahead = make_loop(tmp_path, max_steps=12, **DRAWS)
    ahead.run_loop()
    plain = make_loop(tmp_path, max_steps=12, **DRAWS)
    batches = training_batches(Discs(), 4, seed=1)
    for _ in range(12):
        plain.run_step(next(batches))
    assert equal(dict(ahead.net.state_dict()), dict(plain.net.state_dict()))
    seen: Any = ahead.schedule_sampler.state_dict()["seen"]
    assert int(seen.max()) == 10, "its history decides on later draws"
    assert equal(ahead.schedule_sampler.state_dict(), plain.schedule_sampler.state_dict())


def test_the_next_batch_is_ready_before_the_device_is_waited_for(
    quiet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Noted(Discs):
        def __getitem__(self, index: int) -> Case:
            if events[-1:] != ["read"]:
                events.append("read")
            return super().__getitem__(index)

    loop = make_loop(tmp_path, max_steps=3)
    loop.setup = replace(loop.setup, dataset=Noted())
    prepare, usable = loop.reader.prepare, loop._usable

    def noted(name: str, function: Any) -> Any:
        return lambda *arguments: (events.append(name), function(*arguments))[1]

    monkeypatch.setattr(loop.reader, "prepare", noted("draw", prepare))
    monkeypatch.setattr(loop, "_usable", noted("wait", usable))
    loop.run_loop()
    assert events == ["read", "draw", "read", "draw", "wait", "read", "draw", "wait", "wait"]


class Copies(TorchDispatchMode):
    """Notes every copy between devices, and whether it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.name() in ("aten::_to_copy", "aten::copy_"):
            source = args[func.name() == "aten::copy_"]
            waits = not (kwargs or {}).get("non_blocking", args[2] if len(args) > 2 else False)
            if source.device != out.device:
                self.seen.append((source.device.type, out.device.type, waits))
        return out


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"learn_sigma": True},
        {"mask_loss": "dice_ce", "mask_dropout": 0.5, "batch_size": 8},
        {"microbatch": 2},
    ],
)
def test_the_loss_waits_for_no_copy(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which is another one than the CPU, as CUDA is, and has no values."""
    monkeypatch.setattr(train_util, "autocast", lambda *_: nullcontext())
    loop = make_loop(tmp_path, **flags)
    loop.device = torch.device("meta")
    loop.parameters = list(loop.net.to("meta").parameters())
    with Copies() as copies:
        loop.forward_backward(batch_of(loop.options.batch_size))
    assert len(copies.seen) >= 5
    assert set(copies.seen) == {("cpu", "meta", False)}
    assert all(parameter.grad is not None for parameter in loop.parameters)


def test_the_backward_pass_is_outside_of_autocast(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)
    loop.run = replace(loop.run, precision="bf16")
    seen, inside = [], []
    loop.parameters[0].register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
    loop.net.register_forward_hook(
        lambda *_: inside.append(torch.is_autocast_enabled("cpu"))  # type: ignore[func-returns-value]
    )
    loop.forward_backward(batch_of(2))
    assert (inside, seen) == ([True], [False])


def test_one_copy_of_the_weights_is_written_at_a_time(
    quiet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, copies, plain = threading.Event(), [], checkpoints.plain

    def counted(weights: Any) -> Any:
        copies.append(gate.is_set())
        return plain(weights)

    def slow(*_: Any, **__: Any) -> None:
        assert gate.wait(30)

    monkeypatch.setattr(checkpoints, "plain", counted)
    monkeypatch.setattr(checkpoints, "save_checkpoint", slow)
    loop = make_loop(tmp_path)
    loop.save()
    threading.Timer(0.3, gate.set).start()
    loop.save()
    loop.checkpoints.wait()
    assert copies == [False, True]


def test_cuda_graphs_are_refused_by_the_loop_too(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, microbatch=2)
    options = replace(loop.options, microbatch=2)
    for mode in ("reduce-overhead", "max-autotune"):
        with pytest.raises(UserError, match=f"--compile {mode}: does not work with --microbatch 2"):
            train_util.refuse_graphs(mode, options, cuda=True)
        train_util.refuse_graphs(mode, options, cuda=False)
        train_util.refuse_graphs(mode, replace(options, microbatch=-1), cuda=True)
    train_util.refuse_graphs("default", options, cuda=True)
