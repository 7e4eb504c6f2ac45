"""MedSegDiff-V2, equation by equation, in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import inputs, normals, predict, small
from torch import nn

from guided_diffusion.networks.medsegdiff_v2 import (
    ConditionUNet,
    UncertainSpatialAttention,
    constrain,
    gaussian_blur,
)
from guided_diffusion.networks.ss_former import (
    NeuralBandPass,
    SpectrumAttention,
    SSFormerBlock,
    adaptive_instance_norm,
    affinity,
    coordinates,
    inverse_spectrum,
    mix_spectrum,
    pass_band,
    spectrum,
)
from guided_diffusion.script_util import create_model_and_diffusion

ONE = torch.ones(1)


# uncertain spatial attention


def test_a_gaussian_of_no_width_changes_nothing():
    x = normals(2, 3, 6, 5)
    torch.testing.assert_close(gaussian_blur(x, torch.full((3,), 0.05)), x)


def test_each_channel_is_blurred_by_its_own_gaussian():
    x = torch.zeros(1, 2, 9, 9)
    x[:, :, 4, 4] = 1
    width = torch.tensor([0.8, 1.5])
    offsets = torch.arange(-3.0, 4.0)
    for channel, blurred in enumerate(gaussian_blur(x, width)[0]):
        line = torch.exp(-(offsets**2) / (2 * width[channel] ** 2))
        line = line / line.sum()
        expected = torch.zeros(9, 9)
        expected[1:8, 1:8] = line[:, None] * line
        torch.testing.assert_close(blurred, expected)
    constant = torch.full((1, 2, 4, 4), 3.0)
    torch.testing.assert_close(gaussian_blur(constant, width), constant)


def test_the_anchor_is_the_maximum_of_blurred_and_sharp():
    attention, x = UncertainSpatialAttention(2), torch.zeros(1, 2, 7, 7)
    x[:, :, 3, 3] = 1
    blurred = gaussian_blur(x, torch.ones(2))
    expected = blurred.clone()
    expected[:, :, 3, 3] = 1
    torch.testing.assert_close(attention.relax(x), expected)
    assert (attention.relax(-x) <= 0).all() and attention.relax(-x)[0, 0, 3, 3] == -blurred[
        0, 0, 3, 3
    ]

    with torch.no_grad():
        attention.reduce.weight.fill_(2.0)
        attention.reduce.bias.fill_(-1.0)
    torch.testing.assert_close(attention(x), torch.sigmoid(4 * expected[:, :1] - 1))


def test_the_gated_feature_is_added_to_the_feature():
    feature, gate = normals(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    gate[0] = 0.5
    gate[1, 0, 1, 2] = 1
    constrained = constrain(feature, gate)
    torch.testing.assert_close(constrained[0], 1.5 * feature[0])
    expected = feature[1].clone()
    expected[:, 1, 2] *= 2
    torch.testing.assert_close(constrained[1], expected)


# spectra


def test_a_spectrum_keeps_energy_and_can_be_inverted():
    x = normals(2, 3, 4, 6)
    spectra = spectrum(x)
    assert spectra.shape == (2, 24, 3)
    torch.testing.assert_close(spectra.abs().square().sum(), x.square().sum())
    torch.testing.assert_close(inverse_spectrum(spectra, (4, 6)), x)


def test_a_wave_has_two_frequencies():
    column = torch.arange(8.0)
    wave = torch.cos(2 * math.pi * column / 4).expand(1, 1, 4, 8)
    power = spectrum(wave).abs()[0, :, 0].reshape(4, 8)
    expected = torch.zeros(4, 8)
    expected[0, 2] = expected[0, 6] = math.sqrt(32) / 2
    torch.testing.assert_close(power, expected, rtol=1e-5, atol=1e-5)


def test_affinity_element_by_element():
    q, k, w = spectrum(normals(1, 3, 2, 4)), spectrum(normals(1, 3, 2, 4, seed=1)), 1.7
    m = affinity(q, k, w * ONE)
    for row in range(8):
        for column in range(8):
            product = sum((a * b.conj()).real for a, b in zip(q[0, row], k[0, column], strict=True))
            torch.testing.assert_close(m[0, row, column], torch.sin(w * product / math.sqrt(3)))
    assert not affinity(q, k, 0 * ONE).any(), "without a period nothing attends"


def test_an_affinity_of_each_frequency_to_itself_passes_the_value():
    value = normals(2, 3, 4, 6)
    identity = math.sqrt(24) * torch.eye(24).expand(2, 24, 24)
    torch.testing.assert_close(mix_spectrum(identity, value), value, rtol=1e-4, atol=1e-5)
    assert not mix_spectrum(torch.zeros(2, 24, 24), value).any()


def test_mixing_is_a_matrix_on_the_spectrum():
    """All frequencies get the coefficient of the mean: a flat spectrum is a peak at the corner."""
    value = torch.full((1, 1, 4, 4), 2.0)
    m = torch.zeros(1, 16, 16)
    m[:, :, 0] = 1
    expected = torch.zeros(1, 1, 4, 4)
    expected[..., 0, 0] = 8.0  # the mean's coefficient is 2 * 4; its 16 copies add up to 16 * 8
    torch.testing.assert_close(mix_spectrum(m, value), expected * 16 / (4 * 4))


def test_the_filter_multiplies_the_gains_of_both_frequencies():
    m, gain = normals(2, 3, 3), torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 0.0]])
    filtered = pass_band(m, gain)
    assert torch.equal(filtered[0], m[0]), "gains of one change nothing"
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.25, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(filtered[1], m[1] * weights)


# the neural band-pass filter


def test_coordinates_are_frequencies():
    down, across, distance = coordinates((4, 8), ONE)
    torch.testing.assert_close(down[:, 0], torch.tensor([0.0, 0.5, -1.0, -0.5]))
    torch.testing.assert_close(across[0, :5], torch.tensor([0.0, 0.25, 0.5, 0.75, -1.0]))
    torch.testing.assert_close(distance, (down**2 + across**2).sqrt())


def test_adaptive_instance_normalisation():
    x, scale, shift = 3 + 2 * normals(1, 2, 4, 4), normals(3, 2, 1, 1), normals(3, 2, 1, 1, seed=1)
    y = adaptive_instance_norm(x, scale, shift)
    torch.testing.assert_close(y, F.instance_norm(x) * (1 + scale) + shift)
    torch.testing.assert_close(y.mean((2, 3)), shift[..., 0, 0], rtol=1e-4, atol=1e-4)


def test_the_gains_depend_on_timestep_and_frequency():
    band, emb = NeuralBandPass(16), normals(2, 16)
    gains = band(emb, (4, 6))
    assert gains.shape == (2, 24) and gains.min() > 0 and gains.max() < 1
    assert (gains[0] - gains[1]).abs().max() > 1e-3
    assert gains.std(dim=1).min() > 1e-3
    with torch.no_grad():
        band.write.weight.zero_()
    torch.testing.assert_close(band(emb, (1, 1)), torch.full((2, 1), 1 / (1 + math.exp(-2))))


# the block


def test_an_attention_by_its_equations():
    attention, emb = SpectrumAttention(32, 16), normals(2, 16)
    query, key, value = (normals(2, 32, 4, 4, seed=seed) for seed in range(3))
    q, k, v = (
        torch.einsum("oc,bchw->bohw", p.weight[..., 0, 0], norm(x))
        for p, norm, x in zip(
            attention.projections, attention.norms, (query, key, value), strict=True
        )
    )
    m = pass_band(affinity(spectrum(q), spectrum(k), attention.period), attention.band(emb, (4, 4)))
    refined = value + mix_spectrum(m, v)
    expected = refined + attention.mlp(refined)
    torch.testing.assert_close(attention(query, key, value, emb), expected, rtol=1e-4, atol=1e-5)


def test_projecting_channels_commutes_with_the_transform():
    x, project = normals(1, 8, 4, 4), nn.Conv2d(8, 8, 1, bias=False)
    weight = project.weight[..., 0, 0].to(torch.complex64)
    torch.testing.assert_close(spectrum(project(x)), spectrum(x) @ weight.T, rtol=1e-4, atol=1e-5)


def test_a_block_blends_and_then_carries():
    block, emb = SSFormerBlock(32, 16), normals(1, 16)
    c, e = normals(1, 32, 4, 4), normals(1, 32, 4, 4, seed=1)
    blended = block.blend(c, e, c, emb)
    torch.testing.assert_close(block(c, e, emb), block.carry(blended, e, e, emb))
    with torch.no_grad():
        for attention in (block.blend, block.carry):
            attention.period.zero_()
            attention.mlp[-1].weight.zero_()
            attention.mlp[-1].bias.zero_()
    assert torch.equal(block(c, e, emb), e), "without period and MLP the noise is unchanged"


# the network


def test_gate_and_embedding_change_the_prediction():
    net, (image, mask, t) = small("2"), inputs()
    with torch.no_grad():
        condition = net.encode(image)
        raw = net(mask, t, condition).raw
        for name in ("gate", "deepest"):
            changed = type(condition)(
                **{**vars(condition), name: torch.zeros_like(getattr(condition, name))}
            )
            assert (net(mask, t, changed).raw - raw).abs().max() > 1e-3, name


def test_a_new_network_starts_without_the_condition_embedding():
    net = create_model_and_diffusion(image_size=32, in_ch=4, num_channels=32, version="2")[0]
    assert not any(parameter.any() for parameter in net.join.parameters())


def test_the_number_of_blocks_follows_its_flag():
    with torch.device("meta"):
        nets = [
            create_model_and_diffusion(image_size=32, num_channels=32, version="2", ss_blocks=n)[0]
            for n in (1, 3)
        ]
    assert [len(net.ss_former) for net in nets] == [1, 3]


def test_the_diffusion_loss_reaches_the_condition_network():
    net = small("2")
    predict(net, *inputs()).raw.square().mean().backward()
    assert net.condition_net.contracting[0].layers[0].weight.grad.abs().max() > 0
    assert net.condition_net.out.weight.grad is None, "the coarse mask has its own loss"


@pytest.mark.parametrize("widths", [(32,), (32, 64), (32, 64, 32)])
def test_the_condition_network_has_the_levels_of_the_diffusion_network(widths):
    net = ConditionUNet(3, 2, widths)
    output = net(normals(1, 3, 16, 8))
    halvings = 2 ** (len(widths) - 1)
    assert output.last.shape == (1, 32, 16, 8)
    assert output.deepest.shape == (1, widths[-1], 16 // halvings, 8 // halvings)
    logits = torch.einsum("kc,bchw->bkhw", net.out.weight[..., 0, 0], output.last)
    expected = torch.sigmoid(logits + net.out.bias[:, None, None])
    torch.testing.assert_close(output.coarse, expected)


def test_the_last_block_s_result_is_added_to_the_deepest_map():
    net, (image, mask, t) = small("2"), inputs()
    given, joined = [], []
    net.middle_block.register_forward_pre_hook(lambda _, values: given.append(values[0]))
    net.ss_former[-1].register_forward_hook(lambda *values: joined.append(values[-1]))
    with torch.no_grad():
        condition = net.encode(image)
        net(mask, t, condition)
        first = constrain(net.enter(mask, condition), condition.gate)
        deepest = net.contract(first, net.embed(t))[-1]
        projected = torch.einsum("oi,bihw->bohw", net.join.weight[..., 0, 0], joined[0])
        expected = deepest + projected + net.join.bias[:, None, None]
    torch.testing.assert_close(given[0], expected, rtol=1e-4, atol=1e-4)


def test_the_first_convolution_reads_the_mask_alone():
    """The image enters through the gate and the deepest embedding."""
    net, (image, mask, t) = small("2"), inputs()
    with torch.no_grad():
        condition, other = net.encode(image), net.encode(image.flip(-1))
        assert torch.equal(condition.stem, other.stem)
        assert net.input_blocks[0][0].in_channels == net.mask_channels == 1
        swapped = type(condition)(condition.stem, other.gate, other.deepest, condition.coarse)
        assert torch.equal(net(mask, t, swapped).raw, net(mask, t, other).raw)
