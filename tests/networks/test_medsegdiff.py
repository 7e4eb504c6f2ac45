"""MedSegDiff's networks by value: the highway's inputs, its parts, and what all versions share."""

import pytest
import torch
import torch.nn.functional as F
from golden.fill import fill
from helpers import refused, script
from small_networks import SMALL, VERSIONS, inputs, normals, predict, small
from torch import nn

from guided_diffusion.checkpoint import Checkpoint, adapt_weights, load_weights
from guided_diffusion.dist_util import place_model
from guided_diffusion.errors import UserError
from guided_diffusion.networks.highway import (
    BatchNorm32,
    ConvUnit,
    FFParser,
    Highway,
    interpolate_spectrum,
)
from guided_diffusion.networks.medsegdiff import HighwayUNet
from guided_diffusion.script_util import create_model_and_diffusion


@pytest.fixture(autouse=True)
def _narrow(narrow_highway):
    """The published widths are tested in test_medsegdiff_published."""


# incomplete published weights


def published_weights(net, *, gates):
    """Bare weights as those of a published network of version 1, with or without its gates."""
    drawn = ("highway_embedding.", *(() if gates else ("hwm.conv_trans_blocks_",)))
    return {
        name: value.clone()
        for name, value in net.state_dict().items()
        if not name.startswith(drawn)
    }


@pytest.mark.parametrize("gates", [True, False])
def test_weights_of_both_years_are_completed(gates):
    """What the published code draws at random in each call has mean zero, which is used instead."""
    source, net = small("1"), small("1")
    weights = published_weights(source, gates=gates)
    adapted = net.adapt_weights(weights)
    added = {name for name in adapted if name not in weights}
    assert {name.split(".")[0] for name in added} == {"highway_embedding"} | (
        set() if gates else {"hwm"}
    )
    load_weights(net, adapted, "published.pt")

    image, mask, t = inputs()
    with torch.no_grad():
        plain = fill(create_model_and_diffusion(**SMALL)[0]).eval()
        output = predict(net, image, mask, t)
        assert torch.equal(output.raw, predict(plain, image, mask, t).raw), "nothing is added"
        expected = predict(source, image, mask, t).coarse
        if not gates:
            for a in source.hwm.conv_trans_blocks_a:
                nn.init.zeros_(a.weight)
                nn.init.zeros_(a.bias)
            closed = predict(source, image, mask, t).coarse
            assert (closed - expected).abs().max() > 1e-4
            expected = closed
        assert torch.equal(output.coarse, expected)


def test_closed_gates_can_be_opened_by_training():
    net = small("1")
    load_weights(net, net.adapt_weights(published_weights(net, gates=False)), "published.pt")
    predict(net, *inputs()).coarse.square().mean().backward()
    assert all(a.weight.grad.abs().max() > 0 for a in net.hwm.conv_trans_blocks_a)


def test_training_continues_from_weights_without_gates():
    """Exactly closed gates give maps without variance, and gradients of normalisations explode."""
    torch.manual_seed(0)
    net = create_model_and_diffusion(**SMALL, version="1")[0]  # with biases of 0: the worst case
    bare = Checkpoint(options={}, step=0, model=published_weights(net, gates=False), ema={})

    def gradient(*, training):
        completed, lacking = adapt_weights(bare, net, training=training)
        assert len(lacking) == len(completed.model) - len(bare.model) > 2
        load_weights(net, completed.model, "published.pt")
        net.train().zero_grad()
        image, mask = normals(8, 3, 32, 32), normals(8, 1, 32, 32, seed=1)
        output = predict(net, image, mask, torch.arange(8))
        (output.raw.square().mean() + 10 * output.coarse.square().mean()).backward()
        return torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])

    assert gradient(training=True) < 100
    assert gradient(training=False) > 1e6


def test_filters_of_another_image_size_are_interpolated_on_loading():
    large, net = small("1", image_size=64, attention_resolutions="16"), small("1")
    adapted = net.adapt_weights(large.state_dict())
    load_weights(net, adapted, "published.pt")
    wide = large.hwm.ffparser[0].complex_weight
    assert torch.equal(net.hwm.ffparser[0].complex_weight, wide[:, ::2, ::2])


# the inputs of the highway


@pytest.mark.parametrize(("version", "name"), [("new", "hwm"), ("2", "condition_net")])
def test_the_condition_network_reads_the_image_alone_and_once(version, name):
    net, (image, mask, t) = small(version), inputs()
    calls = []
    getattr(net, name).register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        condition = net.encode(image)
        before = [value.clone() for value in condition]
        first, second = net(mask, t, condition), net(mask + 1, t, condition)
        assert len(calls) == 1 and len(before) == {"new": 2, "2": 4}[version]
        assert torch.equal(first.coarse, second.coarse)
        assert torch.equal(first.coarse, condition.coarse)
        assert all(map(torch.equal, condition, before))
        net.input_blocks[0][0].weight[:, -1] += 1
        assert all(map(torch.equal, net.encode(image), before)), "no weight of the mask is used"


def test_the_first_level_of_the_highway_of_1_reads_the_image_alone():
    net, (image, mask, t) = small("1"), inputs()
    with torch.no_grad():
        condition = net.encode(image)
        before = [value.clone() for value in condition]
        first, second = net(mask, t, condition), net(mask + 1, t, condition)
        assert all(map(torch.equal, condition, before))
        assert (first.coarse - second.coarse).abs().max() > 1e-5, "but the mask opens its gates"
        expected = net.hwm.conv_blocks_context[0](image)
        assert torch.equal(condition.first, expected)


def test_anchors_are_the_concatenated_maps_of_the_highway():
    """At 128 channels, 32 + 32 + 64 upsampled maps of the decoder are added to the first map."""
    net, (image, _, _) = small("new", num_channels=128, channel_mult="1"), inputs()
    with torch.no_grad():
        stem = F.conv2d(image, net.input_blocks[0][0].weight[:, :3], padding=1)
        stem = stem + net.input_blocks[0][0].bias[:, None, None]
        decoded = net.hwm(net.hwm.enter(image)).decoded
        half, quarter = decoded[3], decoded[2]
        assert half.shape[1:] == (32, 16, 16) and quarter.shape[1:] == (64, 8, 8)
        expected = torch.cat(
            [
                F.interpolate(half, scale_factor=2, mode="bilinear"),
                F.interpolate(half, scale_factor=2, mode="bilinear"),
                F.interpolate(quarter, scale_factor=4, mode="bilinear"),
            ],
            dim=1,
        )
        torch.testing.assert_close(net.encode(image).stem - stem, expected, rtol=1e-4, atol=1e-4)


def test_a_gate_by_the_formula():
    net = Highway(3, gate_channels=(32, 32), image_size=32)
    x, feature = normals(2, 32, 16, 16), normals(2, 32, 16, 16, seed=1)
    a, b = net.conv_trans_blocks_a[0], net.conv_trans_blocks_b[0]
    with torch.no_grad():
        net.ffparser[0].complex_weight.copy_(torch.tensor([1.0, 0.0]))
        g = torch.einsum("oi,bihw->bohw", a.weight[..., 0, 0], feature)
        per_pixel = torch.einsum("i,bihw->bhw", b.weight[0, :, 0, 0], g)[:, None]
        expected = x * per_pixel * g.flatten(2).mean(-1)[..., None, None]
        torch.testing.assert_close(net.gate(x, feature, 0), expected, rtol=1e-4, atol=1e-5)


def test_the_projected_bottleneck_is_added_to_the_deepest_map():
    """The U-Net has three levels and the highway six, so the highway's map is upsampled."""
    net, (image, mask, t) = small("1"), inputs()
    plain = fill(create_model_and_diffusion(**SMALL)[0]).eval()
    deepest = []
    for one in (net, plain):
        one.middle_block.register_forward_pre_hook(lambda _, given: deepest.append(given[0]))
    with torch.no_grad():
        condition = net.encode(image)
        predict(plain, image, mask, t)
        net(mask, t, condition)
        skips = net.contract(net.enter(mask, condition), net.embed(t))
        bottleneck = net.hwm(condition.first, [skips[2], skips[4]]).bottleneck
    (without, added) = deepest
    assert bottleneck.shape[-2:] == (1, 1), "so that upsampling repeats it"
    expected = net.highway_embedding(bottleneck).expand_as(without)
    torch.testing.assert_close(added - without, expected, rtol=1e-4, atol=1e-4)


# the FF-Parser


def identity(channels, size):
    parser = FFParser(channels, size)
    nn.init.zeros_(parser.complex_weight)
    parser.complex_weight.data[..., 0] = 1
    return parser


@pytest.mark.parametrize("size", [(8, 8), (12, 12), (4, 4), (6, 10), (7, 5)])
def test_a_filter_of_ones_is_the_identity_at_any_size(size):
    x = normals(2, 3, *size)
    torch.testing.assert_close(identity(3, 8)(x), x, rtol=1e-5, atol=1e-5)


def test_filtering_is_a_circular_convolution():
    kernel, x, parser = normals(2, 8, 8, seed=1), normals(1, 2, 8, 8), FFParser(2, 8)
    with torch.no_grad():
        parser.complex_weight.copy_(torch.view_as_real(torch.fft.rfft2(kernel)))
        expected = torch.zeros_like(x)
        for row in range(8):
            for column in range(8):
                moved = torch.roll(x, (row, column), dims=(-2, -1))
                expected += kernel[:, row, column, None, None] * moved
        torch.testing.assert_close(parser(x), expected, rtol=1e-4, atol=1e-4)


def test_a_smooth_filter_keeps_its_shape_between_its_frequencies():
    """The response of a one-pixel shift, cos f - i sin f, at sizes it was not made for."""

    def response(size):
        shift = torch.zeros(1, size, size)
        shift[0, 1, 0] = 1
        return torch.view_as_real(torch.fft.rfft2(shift))

    fine = response(64)
    for size in (32, 64):
        torch.testing.assert_close(
            interpolate_spectrum(fine, (size, size)), response(size), rtol=0, atol=1e-6
        )
    torch.testing.assert_close(
        interpolate_spectrum(fine, (48, 48)), response(48), rtol=0, atol=2e-3
    )
    assert interpolate_spectrum(fine, (64, 64)) is fine


def test_the_filter_works_in_channels_last_order():
    parser, x = fill(FFParser(4, 8)), normals(2, 4, 8, 8)
    expected = parser(x)
    parser.to(memory_format=torch.channels_last)
    assert not parser.complex_weight.is_contiguous()
    torch.testing.assert_close(parser(x), expected, rtol=0, atol=0)


# batch normalisation


def test_batch_statistics_are_used_in_training_only():
    norm, x = fill(BatchNorm32(4)), normals(3, 4, 5, 5) * 2 + 1
    known = norm.running_mean.clone(), norm.running_var.clone()
    shape = (1, 4, 1, 1)
    scale, shift = norm.weight.view(shape), norm.bias.view(shape)
    own = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(norm(x), (x - own[0]) / (own[1] + 1e-5).sqrt() * scale + shift)
    torch.testing.assert_close(norm.running_mean, 0.9 * known[0] + 0.1 * x.mean((0, 2, 3)))
    running = norm.running_mean.view(shape), norm.running_var.view(shape)
    expected = (x - running[0]) / (running[1] + 1e-5).sqrt() * scale + shift
    torch.testing.assert_close(norm.eval()(x), expected)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_a_single_value_is_normalised_by_the_running_statistics():
    norm, x = fill(BatchNorm32(4)), normals(1, 4, 1, 1)
    expected = fill(BatchNorm32(4)).eval()(x)
    torch.testing.assert_close(norm.train()(x), expected)


# all versions


@pytest.mark.parametrize("version", VERSIONS)
def test_two_calls_in_evaluation_are_equal(version):
    net = small(version, dropout=0.5)
    with torch.no_grad():
        first, second = predict(net, *inputs()), predict(net, *inputs())
        assert torch.equal(first.raw, second.raw) and torch.equal(first.coarse, second.coarse)
        assert 0 < first.coarse.min() < first.coarse.max() < 1


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "shape", [{}, {"num_res_blocks": 2, "channel_mult": "1,1,1,1,1,1"}, {"resblock_updown": True}]
)
def test_every_parameter_gets_a_gradient(version, shape):
    net = small(version, image_size=64, learn_sigma=True, **shape).train()
    output = predict(net, *inputs(64))
    (output.raw.square().mean() + output.coarse.square().mean()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_the_diffusion_loss_does_not_reach_the_highway_of_new():
    net = small("new")
    predict(net, *inputs()).raw.square().mean().backward()
    touched = {name for name, p in net.named_parameters() if p.grad is not None}
    assert not [name for name in touched if name.startswith("hwm.")]
    assert "project_anchors.weight" in touched
    net = small("1")
    predict(net, *inputs()).raw.square().mean().backward()
    assert net.hwm.conv_blocks_context[0].blocks[0].conv.weight.grad is not None


@pytest.mark.parametrize("version", VERSIONS)
def test_conditions_are_picked_by_row(version):
    net, (image, mask, t) = small(version), inputs()
    index = torch.tensor([1, 0, 1])
    with torch.no_grad():
        picked = net(mask[index], t[index], net.encode(image).rows(index))
        whole = predict(net, image, mask, t)
    torch.testing.assert_close(picked.raw, whole.raw[index], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(picked.coarse, whole.coarse[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_mask_of_several_classes_has_a_coarse_mask_of_several(version):
    net, image = small(version, mask_labels="1,2,4", in_ch=6), normals(2, 3, 64, 32)
    with torch.no_grad():
        output = predict(net, image, normals(2, 3, 64, 32, seed=1), torch.tensor([1, 5]))
    assert output.raw.shape == output.coarse.shape == (2, 3, 64, 32)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_single(version, dtype):
    net = small(version)
    with torch.no_grad():
        single = predict(net, *inputs())
        with torch.autocast("cpu", dtype):
            half = predict(net, *inputs())
    scale = single.raw.abs().max()
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    assert (half.raw.float() - single.raw).abs().max() < tolerance * scale
    assert (half.coarse - single.coarse).abs().max() < tolerance
    assert half.coarse.dtype == torch.float32


@pytest.mark.parametrize("version", VERSIONS)
def test_every_gradient_is_finite_in_half_precision(version):
    net = small(version)
    with torch.autocast("cpu", torch.bfloat16):
        output = predict(net.train(), *inputs())
        (output.raw.float().square().mean() + output.coarse.square().mean()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_filters_are_interpolated_in_single_precision():
    parser, x = fill(FFParser(4, 8)), normals(2, 4, 12, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = parser(x)
    torch.testing.assert_close(half, parser(x), rtol=0, atol=0)


@pytest.mark.parametrize("version", VERSIONS)
def test_checkpointing_changes_memory_only(version):
    results = []
    for levels in ("none", "fine", "all"):
        net = small(version, checkpoint_levels=levels).train()
        torch.manual_seed(0)
        output = predict(net, *inputs())
        (output.raw.square().mean() + output.coarse.square().mean()).backward()
        results.append(
            (output.raw.detach(), [p.grad for p in net.parameters()], dict(net.named_buffers()))
        )
    for saving in results[1:]:
        torch.testing.assert_close(saving[0], results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(saving[1:], results[0][1:])


@pytest.mark.parametrize("version", VERSIONS)
def test_channels_last_order_changes_nothing(version):
    net = small(version)
    with torch.no_grad():
        expected = predict(net, *inputs())
        placed = predict(place_model(net, torch.device("cpu")), *inputs())
    torch.testing.assert_close(placed.raw, expected.raw, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(placed.coarse, expected.coarse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_compiling_finds_no_graph_break(version):
    """The part that runs once per image and the part that runs in every step are one graph each."""
    net, (image, mask, t) = small(version, channel_mult="1,1"), inputs()
    with torch.no_grad():
        expected = predict(net, image, mask, t)
        encode = torch.compile(net.encode, backend="eager", fullgraph=True)
        step = torch.compile(net, backend="eager", fullgraph=True)
        raw = step(mask, t, encode(image)).raw
    torch.testing.assert_close(raw, expected.raw, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", ["new", "1"])
def test_impossible_sizes_are_refused(version):
    with torch.device("meta"), pytest.raises(UserError) as error:
        create_model_and_diffusion(**{**SMALL, "version": version, "image_size": 48})
    assert "--image_size 48: must be a multiple of 32" in str(error.value)
    assert "Use --image_size 64." in str(error.value)


def test_an_image_that_cannot_be_halved_is_refused():
    for version in ("new", "1"):
        with pytest.raises(ValueError, match="cannot be halved 5 times"):
            small(version).encode(normals(1, 3, 40, 32))


@pytest.mark.parametrize(
    ("version", "step"),
    [("plain", 16), ("2", 16), ("new", 32), ("1", 32)],
)
def test_a_crop_that_cannot_be_halved_is_refused(version, step, brats, tmp_path):
    """Slices of 40 pixels are cropped by 8 on every side."""
    flags = ["--crop", "wolleb", "--image_size", 64, "--channel_mult", "1,1,1,1,1"]
    command = ["--data_dir", brats / "training", "--out_dir", tmp_path, "--version", version]
    error = refused(script("segmentation_train", *command, *flags))
    assert "--crop: the cropped images are 24 x 24, but the network" in error
    assert f"needs multiples of {step}. Use --crop none" in error


def test_shallow_networks_have_fewer_gates():
    with torch.device("meta"):
        nets = {
            mult: create_model_and_diffusion(**{**SMALL, "version": "1", "channel_mult": mult})[0]
            for mult in ("1", "1,2", "1,2,2,2,2,2")
        }
    assert all(isinstance(net, HighwayUNet) for net in nets.values())
    widths = [
        [a.in_channels for a in getattr(net.hwm, "conv_trans_blocks_a", [])]
        for net in nets.values()
    ]
    assert widths == [[], [32], [32, 64, 64, 64]]


# a new highway


def test_only_the_encoder_has_dropout():
    net = Highway(3)
    down, up = (
        [unit for unit in part.modules() if isinstance(unit, ConvUnit)]
        for part in (net.conv_blocks_context, net.conv_blocks_localization)
    )
    assert [unit.dropout for unit in down] == [0.5] * 12
    assert [unit.dropout for unit in up] == [0.0] * 10


def test_half_of_the_channels_are_dropped_in_training_only():
    unit, x = ConvUnit(3, 512, 0.5), normals(2, 3, 8, 8)
    kept = unit.eval()(x)
    unit.instnorm = nn.Identity()
    unit.train()
    dropped = (unit(x).flatten(2) == 0).all(2)
    assert 0.4 < dropped.float().mean() < 0.6
    assert not (kept.flatten(2) == 0).all(2).any()


def test_convolutions_have_the_initial_variance_for_leaky_relu():
    """He et al. (2015): variance 2 / (1 + slope^2) over the number of inputs, and zero bias."""
    layers = [layer for layer in Highway(3).modules() if isinstance(layer, nn.Conv2d)]
    large = [layer for layer in layers if layer.weight.numel() > 4000]
    assert len(large) > 5
    for layer in large:
        spread = float(layer.weight.detach().var()) * layer.weight[0].numel()
        assert spread == pytest.approx(2 / 1.0001, rel=0.1)
    assert not any(layer.bias.any() for layer in layers if layer.bias is not None)


def test_a_new_filter_passes_nearly_everything():
    """With noise alone, as published networks start, the gate would be almost closed."""
    x = normals(2, 4, 32, 32)
    torch.manual_seed(0)
    with torch.no_grad():
        error = (FFParser(4, 32)(x) - x).square().mean() / x.square().mean()
    assert 1e-5 < error < 1e-2
