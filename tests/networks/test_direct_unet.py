"""The plain U-Net is the diffusion's network without a noisy mask and without time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden.fill import fill
from small_networks import SMALL, VERSIONS, inputs, normals, predict, small
from torch import Tensor
from torch.testing import assert_close

from guided_diffusion.errors import UserError
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.unet import DirectUNet, UNetModel

FIRST = "input_blocks.0.0.weight"


def both(**flags: Any) -> tuple[UNetModel, UNetModel]:
    """The network of a diffusion whose time and noisy mask have no weight, and the plain U-Net."""
    plain, unet = small("plain", **flags), small("unet", **flags)
    weights = plain.state_dict()
    for name, value in weights.items():
        if "emb_layers" in name:
            value.zero_()
    masks = plain.mask_channels
    weights[FIRST][:, -masks:] = 0
    kept = {name: value for name, value in weights.items() if name in unet.state_dict()}
    unet.load_state_dict({**kept, FIRST: weights[FIRST][:, :-masks]})
    return plain, unet


@pytest.mark.parametrize("mask_labels", ["", "1,2"])
def test_it_has_the_same_encoder_and_decoder(mask_labels: str) -> None:
    flags = {**SMALL, "mask_labels": mask_labels, "in_ch": 5 if mask_labels else 4}
    plain, unet = (
        create_model_and_diffusion(**flags, version=version)[0].state_dict()
        for version in ("plain", "unet")
    )
    expected = {
        name: value.shape
        for name, value in plain.items()
        if not name.startswith("time_embed.") and ".emb_layers." not in name
    }
    width, _, *kernel = expected[FIRST]
    expected[FIRST] = torch.Size([width, 3, *kernel])
    assert {name: value.shape for name, value in unet.items()} == expected
    assert list(unet) == list(expected), "and in the same order"


@pytest.mark.parametrize(
    "flags", [{}, {"use_scale_shift_norm": False}, {"resblock_updown": True}], ids=str
)
def test_it_computes_what_the_diffusion_s_network_does_without_time(flags: dict[str, Any]) -> None:
    plain, unet = both(**flags)
    image, mask, t = inputs()
    assert_close(predict(unet, image, mask, t).raw, predict(plain, image, mask, t).raw)


def test_its_answer_depends_on_the_image_alone() -> None:
    net = small("unet")
    image, mask, t = inputs()
    answer = predict(net, image, mask, t).raw
    assert_close(predict(net, image, 5 * mask + 1, t + 90).raw, answer, rtol=0, atol=0)
    assert answer.shape == mask.shape and (predict(net, -image, mask, t).raw != answer).any()


@pytest.mark.parametrize("flags", [{}, {"use_scale_shift_norm": False}], ids=str)
def test_every_parameter_has_a_gradient(flags: dict[str, Any]) -> None:
    """Processes that average gradients would wait for one that never comes."""
    net = small("unet", **flags).train()
    image, mask, t = inputs()
    predict(net, image, mask, t).raw.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_checkpointing_changes_memory_only() -> None:
    grads: list[list[Tensor]] = []
    image, mask, t = inputs()
    for checkpointed in (False, True):
        net = small("unet", use_checkpoint=checkpointed).train()
        predict(net, image, mask, t).raw.square().mean().backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    assert_close(*grads)


def test_half_precision_is_close() -> None:
    net = fill(create_model_and_diffusion(**SMALL, version="unet")[0]).eval()
    image, mask, t = inputs()
    with torch.inference_mode():
        exact = predict(net, image, mask, t).raw
        with torch.autocast("cpu", torch.bfloat16):
            rough = predict(net, image, mask, t).raw
    assert rough.dtype == torch.bfloat16
    assert_close(rough.float(), exact, rtol=0, atol=0.03 * float(exact.abs().max()))


def test_it_takes_no_labels() -> None:
    with pytest.raises(ValueError, match="no class labels"):
        DirectUNet(16, 2, 32, 1, 1, (), num_classes=2)


def test_its_diffusion_is_that_of_a_network_that_never_sees_a_noisy_mask() -> None:
    diffusion = create_model_and_diffusion(**SMALL, version="unet")[1]
    assert (diffusion.mask_loss, diffusion.mask_dropout) == ("dice_ce", 1.0)
    assert diffusion.predict_xstart and diffusion.mask_range == (-1.0, 1.0)
    with pytest.raises(UserError, match=r"--learn_sigma True.*--version unet"):
        create_model_and_diffusion(**SMALL, version="unet", learn_sigma=True)


@pytest.mark.usefixtures("narrow_highway")
@pytest.mark.parametrize("version", ["plain", *VERSIONS])
def test_any_network_may_have_its_noisy_mask_withheld(version: str) -> None:
    """Where it always is, every parameter still takes part, as the averaging of gradients needs."""
    flags = {**SMALL, "version": version, "mask_loss": "dice_ce", "mask_dropout": 0.5}
    net, diffusion = create_model_and_diffusion(**flags)
    net = fill(net).eval()
    image, mask, t = inputs()
    x0, eps = 2 * (mask > 0).float() - 1, normals(*mask.shape, seed=2)

    def scored(x: Tensor, t: Tensor, condition: Tensor, y: None) -> Any:
        return net(x, t, net.encode(condition), y)

    rest = {"condition": image, "withheld": torch.ones(2, dtype=torch.bool)}
    terms = diffusion.training_losses(scored, x0, t, eps=eps, **rest)
    total = terms["loss"].sum() + (terms["coarse"].sum() if "coarse" in terms else 0)
    total.backward()
    assert total.isfinite()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
    again = diffusion.training_losses(scored, x0, t - 1, eps=-eps, **rest)
    assert_close(again["loss"], terms["loss"])
