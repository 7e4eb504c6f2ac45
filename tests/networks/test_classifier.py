"""Classifiers by value: golden logits and gradients, published tensor names, timesteps."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill
from torch.testing import assert_close

from guided_diffusion.checkpoint import load_weights
from guided_diffusion.errors import UserError
from guided_diffusion.networks.classifier import POOLS, EncoderUNetModel
from guided_diffusion.networks.resnet import ResNet50
from guided_diffusion.nn import timestep_embedding
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.network import DiffusionOptions
from guided_diffusion.options.weak import ImageNetworkOptions
from guided_diffusion.script_util import create_classifier, create_model

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = json.loads((GOLDEN / "weak_state_dicts.json").read_text())
SMALL = {"image_size": 16, "classifier_width": 32, "classifier_depth": 1}


def test_logits_and_gradients_are_golden():
    golden = json.loads((GOLDEN / "classifier_attention_pool.json").read_text())
    values = np.load(GOLDEN / "classifier_attention_pool.npz")
    net = fill(create_classifier(**golden["flags"])).eval()
    assert {name: list(v.shape) for name, v in net.state_dict().items()} == golden["state_dict"]
    generator = np.random.Generator(np.random.PCG64(golden["input_seed"]))
    x = torch.from_numpy(generator.standard_normal(golden["input_shape"]).astype(np.float32))

    x.requires_grad_()
    logits = net(x, torch.tensor(golden["timesteps"]))
    rows = torch.arange(len(x)), torch.tensor(golden["labels"])
    (gradient,) = torch.autograd.grad(logits.log_softmax(dim=1)[rows].sum(), x)
    assert_close(logits.detach(), torch.from_numpy(values["output"]), atol=1e-4, rtol=0)
    atol = 1e-3 * float(np.abs(values["gradient"]).max())
    assert_close(gradient, torch.from_numpy(values["gradient"]), atol=atol, rtol=0)


def build(kind, flags):
    if kind == "encoder":
        return EncoderUNetModel(**flags)
    if kind == "classifier":
        return create_classifier(**flags)
    diffusion = Flags(given=flags).group(DiffusionOptions)
    return create_model(Flags(given=flags).group(ImageNetworkOptions), diffusion, of_images=True)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_weights_fit_by_name_order_and_shape(name):
    published = PUBLISHED[name]
    with torch.device("meta"):
        net = build(published["kind"], published["flags"])
    state = [[key, list(value.shape)] for key, value in net.state_dict().items()]
    rows = 998 if published["flags"].get("class_cond") else 0  # 1000 classes there, 2 here
    given = [[key, [1000, shape[1]] if rows and key == "label_emb.weight" else shape]
             for key, shape in state]  # fmt: skip
    surplus = rows * 4 * published["flags"].get("num_channels", 0)
    assert len(state) == published["tensors"]
    assert sum(p.numel() for p in net.parameters()) + surplus == published["parameters"]
    assert hashlib.sha256(json.dumps(given).encode()).hexdigest() == published["sha256"]


def test_of_a_thousand_classes_the_first_rows_are_used():
    network = ImageNetworkOptions(
        image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,2", class_cond=True
    )
    net = fill(create_model(network, DiffusionOptions(), of_images=True)).eval()
    rows = torch.randn(1000, 128)
    load_weights(net, {**net.state_dict(), "label_emb.weight": rows}, "model.pt")
    assert torch.equal(net.label_emb.weight, rows[:2])
    with pytest.raises(
        UserError, match=r"model\.pt: tensor label_emb\.weight has shape \(1, 128\)"
    ):
        load_weights(net, {**net.state_dict(), "label_emb.weight": rows[:1]}, "model.pt")


# ---------------------------------------------------------------------------------------- pools


def by_hand(net, maps):
    """The logits of each pool from the maps, written out."""
    deepest = maps[-1]  # after normalisation and activation, but for the spatial pools
    if net.pool == "adaptive":
        *_, conv, _ = net.out
        return deepest.mean((2, 3)) @ conv.weight[..., 0, 0].T + conv.bias
    if net.pool == "attention":
        pool = net.out[2]
        x = deepest.flatten(2)
        x = torch.cat([x.mean(2, keepdim=True), x], 2) + pool.positional_embedding
        q, k, v = pool.qkv_proj(x).unflatten(1, (3, pool.num_heads, -1)).unbind(1)
        weight = (torch.einsum("bhcn,bhcm->bhnm", q, k) / q.shape[2] ** 0.5).softmax(-1)
        token = torch.einsum("bhnm,bhcm->bhcn", weight, v)[..., 0].flatten(1)
        return token @ pool.c_proj.weight[..., 0].T + pool.c_proj.bias
    means = torch.cat([h.mean((2, 3)) for h in maps], 1)
    first, last = net.out[0], net.out[-1]
    hidden = first(means)
    if net.pool == "spatial":
        return last(hidden.relu())
    groups = hidden.unflatten(1, (32, -1))
    normal = (groups - groups.mean(2, keepdim=True)) / (
        groups.var(2, keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    return last(torch.nn.functional.silu(normal.flatten(1) * net.out[1].weight + net.out[1].bias))


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool_agrees_with_its_formula(pool):
    net = fill(create_classifier(**SMALL, classifier_pool=pool, num_classes=3)).eval()
    x, t = (
        torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([5, 70]),
    )
    with torch.no_grad():
        assert_close(net(x, t), by_hand(net, net.features(x, t)), atol=1e-5, rtol=1e-5)
        assert_close(net(x), net(x, torch.zeros(2)))
        assert (net(x) - net(x, t)).abs().min() > 1e-4


def test_an_impossible_width_is_refused():
    with pytest.raises(UserError, match="--classifier_width 40: must be a multiple of 32"):
        create_classifier(image_size=16, classifier_width=40)


# ----------------------------------------------------------------------------------- ResNet-50


def test_a_resnet_agrees_with_its_formula():
    net = fill(ResNet50(1, 2, embed_time=False)).eval()
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    block = net.layer2[0]
    h = torch.randn(1, 256, 8, 8, generator=torch.Generator().manual_seed(1))

    def normal(bn, y):
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return (y - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]

    conv = torch.nn.functional.conv2d
    with torch.no_grad():
        deep = normal(block.bn1, conv(h, block.conv1.weight)).relu()
        deep = normal(block.bn2, conv(deep, block.conv2.weight, stride=2, padding=1)).relu()
        deep = normal(block.bn3, conv(deep, block.conv3.weight))
        short = normal(block.downsample[1], conv(h[..., ::2, ::2], block.downsample[0].weight))
        assert_close(block(h), (deep + short).relu(), atol=1e-4, rtol=1e-4)
        maps = net.features(x)
        assert [tuple(m.shape[1:]) for m in maps] == [
            (256, 8, 8), (512, 4, 4), (1024, 2, 2), (2048, 1, 1)
        ]  # fmt: skip
        assert_close(net(x), maps[-1][..., 0, 0] @ net.fc.weight.T + net.fc.bias)
        assert torch.equal(net(x), net(x, torch.tensor([3, 900]))), "timesteps are ignored"


def test_a_time_conditioned_resnet_starts_as_an_unconditioned_one():
    torch.manual_seed(0)
    conditioned = ResNet50(1, 2).eval()
    plain = ResNet50(1, 2, embed_time=False).eval()
    own = {k: v for k, v in conditioned.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(own)
    x, t = torch.randn(2, 1, 32, 32), torch.tensor([3, 900])
    with torch.no_grad():
        assert torch.equal(conditioned(x, t), plain(x))
        shift = torch.nn.Linear(256, 64)
        conditioned.emb_layers[0].load_state_dict(shift.state_dict())
        emb = conditioned.time_embed(timestep_embedding(t, 64))
        stem = conditioned.maxpool(conditioned.bn1(conditioned.conv1(x)).relu())
        first = conditioned.layer1(stem + shift(emb)[:, :, None, None])
        assert_close(conditioned.features(x, t)[0], first)


# ------------------------------------------------------------- a diffusion without a condition


def test_images_are_denoised_without_a_condition_and_classes_can_be_mixed():
    flags = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
    network = ImageNetworkOptions(**flags, in_ch=2, class_cond=True)
    net = fill(create_model(network, DiffusionOptions(learn_sigma=True), of_images=True)).eval()
    x, t = torch.randn(3, 2, 16, 16), torch.tensor([0, 5, 50])
    with torch.no_grad():
        condition = net.encode(x[:, :0])
        assert torch.equal(
            condition.stem, net.input_blocks[0][0].bias[:, None, None].expand(3, -1, 16, 16)
        )
        assert torch.equal(condition.rows(torch.tensor([2, 0])).stem, condition.stem[:2])
        hard = net(x, t, condition, torch.tensor([1, 0, 1])).raw
        assert hard.shape == (3, 4, 16, 16)
        soft = net(x, t, condition, torch.tensor([[0.0, 1], [1, 0], [0, 1]])).raw
        assert_close(soft, hard)
        mixed = net(x, t, condition, torch.tensor([[0.25, 0.75]] * 3)).raw
        weight = net.label_emb.weight
        weight[0] = 0.25 * weight[0] + 0.75 * weight[1]
        assert_close(mixed, net(x, t, condition, torch.tensor([0, 0, 0])).raw)
        assert (mixed - hard).abs().max() > 1e-3
