"""Networks by value: golden outputs and tensor names, the condition, gradients, attention."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden.fill import fill
from torch import nn

from guided_diffusion.errors import UserError
from guided_diffusion.nn import (
    AttentionBlock,
    BlockStyle,
    Downsample,
    GroupNorm32,
    ResBlock,
    Upsample,
    attend,
    timestep_embedding,
)
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.unet import UNetModel

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {
    "image_size": 16,
    "num_channels": 64,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "num_heads": 2,
    "learn_sigma": True,
}


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(**flags):
    """A network of milliseconds whose every layer does something."""
    return fill(create_model_and_diffusion(**{**SMALL, **flags})[0]).eval()


def predict(net, image, mask, t, y=None):
    return net(mask, t, net.encode(image), y=y)


INPUTS = normals(2, 4, 16, 16), normals(2, 1, 16, 16, seed=1), torch.tensor([3, 700])


# golden numbers


@pytest.mark.parametrize("name", ["plain", "crop224", "class_cond_heads4", "scale_shift_updown"])
def test_outputs_and_tensor_names_are_golden(name):
    golden = json.loads((GOLDEN / f"unet_{name}.json").read_text())
    net = create_model_and_diffusion(**golden["flags"])[0]
    shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
    assert list(shapes.items()) == list(golden["state_dict"].items())

    generator = np.random.Generator(np.random.PCG64(golden["input_seed"]))
    x = torch.from_numpy(generator.standard_normal(golden["input_shape"]).astype(np.float32))
    y = torch.tensor(golden["y"]) if golden.get("y") else None
    net = fill(net).eval()
    with torch.no_grad():
        output = predict(net, x[:, :-1], x[:, -1:], torch.tensor(golden["timesteps"]), y)
    expected = torch.from_numpy(np.load(GOLDEN / f"unet_{name}.npz")["output"])
    torch.testing.assert_close(output.raw, expected, rtol=0, atol=1e-4)
    assert output.coarse is None


PUBLISHED = json.loads((GOLDEN / "state_dicts.json").read_text())


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_weights_fit_by_name_order_and_shape(name):
    published = PUBLISHED[name]
    with torch.device("meta"):
        net = create_model_and_diffusion(**{**published["flags"], "learn_sigma": True})[0]
    state = [[key, list(value.shape)] for key, value in net.state_dict().items()]
    assert len(state) == published["tensors"]
    assert sum(parameter.numel() for parameter in net.parameters()) == published["parameters"]
    assert [key for key, _ in state] == [key for key, _ in net.named_parameters()]
    assert hashlib.sha256(json.dumps(state).encode()).hexdigest() == published["sha256"]


def test_sizes_of_the_two_best_known_networks():
    assert PUBLISHED["readme_256"]["parameters"] == 113_674_370
    assert PUBLISHED["defaults_64"]["parameters"] == 92_026_882


@pytest.mark.parametrize(
    ("resolutions", "blocks"),
    [
        ("16,8", {4, 5, 7, 8}),  # the levels halved to 32 / 2 and 32 / 4
        ("17", {1, 2}),  # 32 // 17 is 1, as in published networks
        ("12", {4, 5}),
        ("3", set()),  # 32 // 3 is not a power of two
    ],
)
def test_attention_levels_follow_from_integer_division(resolutions, blocks):
    with torch.device("meta"):
        net = create_model_and_diffusion(
            image_size=32, channel_mult="1,2,2", attention_resolutions=resolutions
        )[0]
    blocks_with = {
        number
        for number, block in enumerate(net.input_blocks)
        if any(isinstance(layer, AttentionBlock) for layer in block)
    }
    assert blocks_with == blocks


# the condition


def test_encoding_once_equals_a_convolution_over_the_concatenation():
    net, (image, mask, t) = small(), INPUTS
    with torch.no_grad():
        emb = net.time_embed(timestep_embedding(t, 64))
        h, skips = torch.cat([image, mask], dim=1), []
        for block in net.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = net.middle_block(h, emb)
        for block in net.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        expected = net.out(h)
        torch.testing.assert_close(predict(net, *INPUTS).raw, expected, rtol=1e-4, atol=1e-5)


def test_the_condition_depends_on_the_image_alone():
    net, (image, mask, t) = small(), INPUTS
    stem = net.input_blocks[0][0].weight
    with torch.no_grad():
        condition = net.encode(image)
        before = [value.clone() for value in condition]
        net(mask, t, condition)
        net(mask + 1, t, condition)
        assert all(map(torch.equal, condition, before)), "predicting leaves the condition alone"
        stem[:, -1] += 1
        assert all(map(torch.equal, net.encode(image), before)), "no weight of the mask is used"
        stem[:, 0] += 1
        assert not torch.equal(net.encode(image).stem, before[0])


def test_mask_image_timestep_and_label_change_the_prediction():
    net, (image, mask, t) = small(class_cond=True), INPUTS
    y = torch.tensor([0, 1])
    with torch.no_grad():
        base = predict(net, image, mask, t, y).raw
        for changed in (
            predict(net, image + normals(1, 4, 1, 1), mask, t, y),
            predict(net, image, mask + 1, t, y),
            predict(net, image, mask, t + 50, y),
            predict(net, image, mask, t + 0.5, y),
            predict(net, image, mask, t, 1 - y),
        ):
            assert ((changed.raw - base).abs().flatten(1).amax(1) > 1e-4).all()


def test_conditions_are_picked_by_row():
    net, (image, mask, t) = small(), INPUTS
    index = torch.tensor([1, 0, 1])
    with torch.no_grad():
        picked = net(mask[index], t[index], net.encode(image).rows(index)).raw
        torch.testing.assert_close(
            picked, predict(net, image, mask, t).raw[index], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("class_cond", "y"), [(False, torch.tensor([0, 1])), (True, None)])
def test_labels_are_for_class_conditional_networks(class_cond, y):
    with pytest.raises(ValueError, match="class labels"):
        predict(small(class_cond=class_cond), *INPUTS, y)


def test_several_mask_channels_and_oblong_images():
    net = fill(
        UNetModel(
            image_size=16,
            in_channels=5,
            model_channels=32,
            out_channels=6,
            num_res_blocks=1,
            attention_resolutions=(2,),
            channel_mult=(1, 2),
            mask_channels=3,
        )
    ).eval()
    with torch.no_grad():
        output = predict(net, normals(2, 2, 8, 20), normals(2, 3, 8, 20), torch.tensor([1, 5]))
        assert output.raw.shape == (2, 6, 8, 20)
        x = torch.cat([normals(2, 2, 8, 20), normals(2, 3, 8, 20)], dim=1)
        stem = F.conv2d(x, *net.input_blocks[0][0].parameters(), padding=1)
    grown = net.encode(x[:, :2]).stem + F.conv2d(
        x[:, 2:], net.input_blocks[0][0].weight[:, 2:], padding=1
    )
    torch.testing.assert_close(grown, stem, rtol=1e-4, atol=1e-5)


# evaluation, training, memory


def test_two_calls_in_evaluation_are_equal():
    net = small(dropout=0.5)
    with torch.no_grad():
        first, second = predict(net, *INPUTS).raw, predict(net, *INPUTS).raw
        assert torch.equal(first, second)
        net.train()
        assert not torch.equal(predict(net, *INPUTS).raw, first), "dropout works in training"


def test_a_new_network_starts_at_zero():
    net = create_model_and_diffusion(**SMALL)[0]
    assert not predict(net, *INPUTS).raw.any()
    x, emb = normals(1, 64, 4, 4), normals(1, 256)
    assert torch.equal(net.input_blocks[1][0](x, emb), x), "and its blocks as identities"
    x = normals(1, 128, 4, 4)
    assert torch.equal(net.middle_block[1](x), x)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"use_scale_shift_norm": False, "class_cond": True},
        {"resblock_updown": True, "use_new_attention_order": True},
    ],
)
def test_every_parameter_gets_a_gradient(flags):
    net = small(**flags).train()
    y = torch.tensor([0, 1]) if flags.get("class_cond") else None
    predict(net, *INPUTS, y).raw.square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-6, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"use_checkpoint": True}, 6),
        ({"checkpoint_levels": "all"}, 6),
        ({"use_checkpoint": True, "checkpoint_levels": "all"}, 6),
        ({"checkpoint_levels": "fine"}, 5),
        ({"checkpoint_levels": "none"}, 3),
    ],
)
def test_checkpointing_changes_memory_only(flags, expected, updown):
    results = []
    for chosen in ({}, flags):
        wide = {"channel_mult": "1,1,2", "resblock_updown": updown}
        net, calls = small(**wide, **chosen).train(), []
        first, second = net.input_blocks[1][0], net.output_blocks[-1][0]
        for block in (first.in_layers[2], second.out_layers[0], net.middle_block[1].norm):
            block.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        raw = predict(net, *INPUTS).raw
        raw.square().mean().backward()
        results.append((raw.detach(), [p.grad for p in net.parameters()], len(calls)))
    (plain, gradients, calls), (saving, same, recalls) = results
    torch.testing.assert_close(saving, plain, rtol=0, atol=0)
    torch.testing.assert_close(same, gradients)
    assert (calls, recalls) == (3, expected), "blocks of these levels ran again"


def test_levels_to_checkpoint_that_contradict_the_parents_flag_are_refused():
    for levels in ("fine", "none"):
        with pytest.raises(UserError, match=f"--checkpoint_levels {levels}: contradicts"):
            small(use_checkpoint=True, checkpoint_levels=levels)


# building blocks


def naive_attention(qkv, heads, *, heads_first):
    """Attention by its formula, for one head and one image after another."""
    batch, width, positions = qkv.shape
    channels = width // 3 // heads
    out = torch.empty(batch, heads * channels, positions, dtype=qkv.dtype)
    for row in range(batch):
        for head in range(heads):
            parts = []
            for part in range(3):
                block = head * 3 + part if heads_first else part * heads + head
                parts.append(qkv[row, block * channels : (block + 1) * channels])
            q, k, v = parts
            weight = torch.einsum("ct,cs->ts", q, k) / math.sqrt(channels)
            attended = torch.einsum("ts,cs->ct", weight.softmax(dim=-1), v)
            out[row, head * channels : (head + 1) * channels] = attended
    return out


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_agrees_with_its_formula_in_either_order(heads, heads_first):
    qkv = normals(2, 3 * 8, 5).double() * 2
    torch.testing.assert_close(
        attend(qkv, heads, heads_first=heads_first),
        naive_attention(qkv, heads, heads_first=heads_first),
    )


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_block_by_the_formula(new_order):
    style = BlockStyle(emb_channels=1, num_head_channels=16, use_new_attention_order=new_order)
    block, x = fill(AttentionBlock(64, style)).eval(), normals(2, 64, 3, 5)
    flat = x.reshape(2, 64, 15)
    qkv = block.qkv(F.group_norm(flat, 32, block.norm.weight, block.norm.bias))
    attended = naive_attention(qkv, 4, heads_first=not new_order)
    expected = (flat + block.proj_out(attended)).reshape(2, 64, 3, 5)
    torch.testing.assert_close(block(x), expected)


def test_the_two_orders_differ():
    outputs = [
        predict(small(use_new_attention_order=new_order), *INPUTS).raw
        for new_order in (False, True)
    ]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_the_expanding_path_may_have_other_heads():
    net = small(num_heads=2, num_heads_upsample=4)
    heads = [m.num_heads for m in net.modules() if isinstance(m, AttentionBlock)]
    assert heads == [2, 2, 4, 4]
    assert [m.num_heads for m in small().modules() if isinstance(m, AttentionBlock)] == [2] * 4


def test_timestep_embedding_by_hand():
    embedding = timestep_embedding(torch.tensor([0.0, 1.0, 2.5]), 4)
    rows = [[math.cos(t), math.cos(t / 100), math.sin(t), math.sin(t / 100)] for t in (0, 1, 2.5)]
    torch.testing.assert_close(embedding, torch.tensor(rows))
    odd = timestep_embedding(torch.tensor([7]), 5)
    torch.testing.assert_close(odd[:, :4], timestep_embedding(torch.tensor([7]), 4))
    assert odd[0, 4] == 0
    frequencies = timestep_embedding(torch.tensor([1]), 8)[0, 4:].asin()
    torch.testing.assert_close(frequencies, torch.tensor([1, 0.1, 0.01, 0.001]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_normalisation_is_computed_in_float32(dtype):
    norm, x = fill(GroupNorm32(64)), (3 + normals(1, 64, 4, 4)).to(dtype)
    expected = F.group_norm(x.float(), 32, norm.weight, norm.bias).to(dtype)
    assert torch.equal(norm(x), expected)
    assert norm(x).dtype == dtype


def test_a_group_of_one_value_is_normalised_to_the_bias():
    norm = fill(GroupNorm32(32))
    for x in (normals(1, 32, 1, 1), normals(1, 32)):
        torch.testing.assert_close(norm(x).flatten(), norm.bias, atol=1e-3, rtol=0)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("resample", ["none", "down", "up"])
def test_residual_block_by_the_formula(resample, scale_shift):
    style = BlockStyle(emb_channels=6, use_scale_shift_norm=scale_shift)
    block = fill(ResBlock(32, 64, style, resample)).eval()
    x, emb = normals(2, 32, 4, 6), normals(2, 6, seed=1)
    change = {
        "none": lambda x: x,
        "down": lambda x: x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean(dim=(-3, -1)),
        "up": lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2),
    }[resample]

    h = F.silu(F.group_norm(x, 32, block.in_layers[0].weight, block.in_layers[0].bias))
    h = block.in_layers[2](change(h))
    shift = block.emb_layers[1](F.silu(emb))[..., None, None]
    norm = block.out_layers[0]
    if scale_shift:
        h = F.group_norm(h, 32, norm.weight, norm.bias) * (1 + shift[:, :64]) + shift[:, 64:]
    else:
        h = F.group_norm(h + shift, 32, norm.weight, norm.bias)
    h = block.out_layers[3](F.silu(h))
    torch.testing.assert_close(
        block(x, emb), block.skip_connection(change(x)) + h, rtol=1e-4, atol=1e-5
    )


def test_resampling_layers_halve_and_double():
    x = normals(1, 32, 4, 6)
    down, up = Downsample(32), Upsample(32)
    torch.testing.assert_close(
        down(x), F.conv2d(x, down.op.weight, down.op.bias, stride=2, padding=1)
    )
    doubled = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(up(x), F.conv2d(doubled, up.conv.weight, up.conv.bias, padding=1))


# impossible options


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"image_size": 60},
            "--image_size 60: must be a multiple of 8, as the network halves it 3 times. "
            "Use --image_size 64",
        ),
        ({"image_size": 100}, "--image_size 100: must be a multiple of 16"),
        ({"image_size": 0}, "--image_size 0: must be a multiple of 8"),
        ({"num_channels": 48}, "--num_channels 48: makes a level 48 channels wide"),
        ({"num_channels": 16}, "--num_channels 16: makes a level 16 channels wide"),
        ({"channel_mult": "1,1.7"}, "--num_channels 128: makes a level 217.6 channels wide"),
        ({"channel_mult": "1;2"}, "--channel_mult '1;2': is not a list of numbers"),
        (
            {"attention_resolutions": "0"},
            "--attention_resolutions 0: must be sizes of feature maps",
        ),
        ({"num_heads": 5}, "--num_heads 5: must divide"),
        ({"mask_range": "1,0"}, "--mask_range 1,0: must be two increasing numbers"),
    ],
)
def test_impossible_networks_are_refused(flags, message):
    with torch.device("meta"), pytest.raises(UserError) as error:
        create_model_and_diffusion(**flags)
    assert message in str(error.value)


def test_an_unknown_flag_is_refused():
    with pytest.raises(TypeError, match="num_chanels"):
        create_model_and_diffusion(num_chanels=32)


def test_every_module_of_a_network_belongs_to_its_state():
    net = create_model_and_diffusion(**SMALL)[0]
    assert not list(net.buffers())
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Conv1d | nn.Linear)]
    assert all(m.bias is not None for m in convolutions)
