"""Group normalisation in half precision, as CUDA devices compute it: values, gradients, memory.

Everything runs on the CPU, where networks are told to take the same path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loops import batch_of, make_loop
from small_networks import inputs, normals, predict, small
from torch import Tensor
from torch.testing import assert_close

from guided_diffusion.data.frames import Frame
from guided_diffusion.dpm_solver import solver_levels
from guided_diffusion.inference.plan import SamplingPlan
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.nn import GroupNorm32, _GroupNorm, single_precision
from guided_diffusion.train_util import TrainLoop

SHAPES = [(2, 64, 33, 20), (3, 64, 50), (2, 64, 3, 4, 5), (2, 64, 1, 1)]
LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}
HALVES = (torch.bfloat16, torch.float16)


def by_formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _GroupNorm.apply(x, weight, bias, 32, 1e-5)


def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition, in double precision."""
    return F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5)


def ordered(x: Tensor, order: str) -> Tensor:
    last = LAYOUT.get(x.ndim) if order == "channels last" else None
    return x.contiguous(memory_format=last or torch.contiguous_format)


def value_and_gradients(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    own = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*own)
    y.backward(normals(*y.shape, seed=4).to(y.dtype))
    return [y.detach(), *(tensor.grad for tensor in own if tensor.grad is not None)]


@pytest.fixture
def formula_for_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the norms of a network treat half precision on the CPU as on a CUDA device."""
    usual = GroupNorm32.forward

    def forward(self: GroupNorm32, x: Tensor) -> Tensor:
        if x.dtype not in HALVES or x.ndim < 3:
            return usual(self, x)
        with single_precision(x):
            return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)

    monkeypatch.setattr(GroupNorm32, "forward", forward)


def test_the_gradient_is_that_of_the_formula() -> None:
    x, weight, bias = 2 + normals(2, 32, 2, 2), normals(32, seed=1), normals(32, seed=2)
    own = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    assert torch.autograd.gradcheck(by_formula, own)
    assert_close(by_formula(*own), reference(*own))


@pytest.mark.parametrize("mean", [0, 50])
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_errs_by_its_rounding(
    dtype: torch.dtype, shape: tuple[int, ...], order: str, mean: int
) -> None:
    """Also where the mean is far above the deviation; order and dtype are kept."""
    x = ordered((mean + normals(*shape)).to(dtype), order)
    parameters = normals(64, seed=1), normals(64, seed=2)
    found = value_and_gradients(by_formula, x, *parameters)
    expected = value_and_gradients(reference, x, *parameters)
    for own, exact in zip(found, expected, strict=True):
        error = (own.double() - exact.double()).abs().max() / exact.abs().max()
        assert error < 2 * torch.finfo(dtype).eps
    assert [part.dtype for part in found] == [dtype, dtype, torch.float32, torch.float32]
    assert found[0].stride() == found[1].stride() == x.stride()


def test_single_precision_errs_by_its_rounding_too() -> None:
    parameters = normals(64, seed=1), normals(64, seed=2)
    for shape in SHAPES[:3]:
        found = value_and_gradients(by_formula, normals(*shape), *parameters)
        expected = value_and_gradients(reference, normals(*shape), *parameters)
        for own, exact in zip(found, expected, strict=True):
            assert_close(own.double(), exact.double(), rtol=1e-5, atol=1e-4)


def test_equal_values_are_normalised_to_the_bias() -> None:
    weight, bias = normals(64, seed=1), normals(64, seed=2)
    for x in (
        torch.full((2, 64, 4, 4), 30.0),
        normals(2, 64, 1, 1).repeat_interleave(2, 1)[:, :64],
    ):
        for dtype in (torch.float32, *HALVES):
            found = by_formula(x.to(dtype), weight, bias).float()
            assert_close(found, bias[:, None, None].expand_as(found), rtol=0.01, atol=0.02)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_backward_pass_keeps_the_input_alone(dtype: torch.dtype) -> None:
    kept: list[Tensor] = []
    x = normals(2, 64, 16, 16).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        by_formula(x, torch.ones(64), torch.zeros(64))
    large = [tensor for tensor in kept if tensor.numel() >= x.numel()]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


@pytest.mark.usefixtures("formula_for_half")
@pytest.mark.parametrize(
    ("version", "recompute"), [("plain", False), ("plain", True), ("new", False), ("2", False)]
)
def test_networks_stay_in_half_precision_and_in_order(version: str, recompute: bool) -> None:
    """Under autocast, and where activations are recomputed; predictions are those of float32."""
    net = small(version, use_checkpoint=recompute).to(memory_format=torch.channels_last)
    seen = []
    for layer in net.modules():
        if isinstance(layer, GroupNorm32):
            layer.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    exact = predict(net, *inputs()).raw.detach()
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = predict(net, *inputs()).raw
    assert seen and all(
        given.dtype == out.dtype == torch.bfloat16 and given.stride() == out.stride()
        for given, out in seen
        if given.ndim > 2 and given.dtype != torch.float32
    )
    assert sum(out.dtype == torch.bfloat16 for _, out in seen) > len(seen) / 2
    assert_close(found.float(), exact, rtol=0, atol=0.05 * float(exact.abs().max()))
    found.float().square().sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("formula_for_half")
def test_recomputing_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        net = small("plain", use_checkpoint=recompute)
        with torch.autocast("cpu", torch.bfloat16):
            loss = predict(net, *inputs()).raw.float().square().mean()
        loss.backward()
        gradients.append([p.grad for p in net.parameters()])
    assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.usefixtures("formula_for_half", "quiet")
def test_masks_in_half_precision_are_those_in_single(tmp_path: Path) -> None:
    """Of a network that has learned its discs; trained by the same path in bf16."""
    setup = make_loop(tmp_path, batch_size=6, lr=3e-3, ema_rate="0.9").setup
    loop = TrainLoop(replace(setup, run=replace(setup.run, precision="bf16")))
    losses = [float(loop.run_step(batch_of(6))) for _ in range(60)]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    levels = tuple(solver_levels(loop.diffusion.schedule, 5))
    images, names = batch_of(6).image, [str(index) for index in range(6)]
    masks = []
    for precision in ("fp32", "bf16"):
        plan = SamplingPlan("dpm_solver++", levels, num_ensemble=4, precision=precision)
        segmenter = Segmenter(loop.net, loop.diffusion, frame=Frame(16), plan=plan)
        masks.append(segmenter.draw(images, names).mean(dim=1) >= 0.5)
    exact, found = masks
    assert 0.05 < exact.float().mean() < 0.6
    assert 2 * (exact & found).sum() / (exact.sum() + found.sum()) >= 0.995
