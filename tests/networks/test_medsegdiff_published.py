"""MedSegDiff's networks at published sizes: golden outputs, tensor names, memory and operations."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill
from helpers import refused, script, succeeded
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion.networks.highway import Highway
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.network import NetworkOptions
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.training import estimates
from guided_diffusion.training.estimates import attention_notes, spectra_gib, training_gib

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = json.loads((GOLDEN / "state_dicts_medsegdiff.json").read_text())


def test_outputs_and_tensor_names_are_golden():
    golden = json.loads((GOLDEN / "unet_medsegdiff_new.json").read_text())
    net = create_model_and_diffusion(**golden["flags"])[0]
    shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
    assert list(shapes.items()) == list(golden["state_dict"].items())

    generator = np.random.Generator(np.random.PCG64(golden["input_seed"]))
    x = torch.from_numpy(generator.standard_normal(golden["input_shape"]).astype(np.float32))
    net = fill(net).eval()
    with torch.no_grad():
        output = net(x[:, -1:], torch.tensor(golden["timesteps"]), net.encode(x[:, :-1]))
    expected = np.load(GOLDEN / "unet_medsegdiff_new.npz")
    torch.testing.assert_close(output.raw, torch.from_numpy(expected["output"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(output.coarse, torch.from_numpy(expected["cal"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_weights_fit_by_name_order_and_shape(name):
    published = PUBLISHED[name]
    with torch.device("meta"):
        if published["highway_alone"]:
            gates = (128, 128, 256, 256) if published["version"] == "1" else ()
            net = Highway(3, gate_channels=gates)
        else:
            flags = {**published["flags"], "version": published["version"]}
            net = create_model_and_diffusion(**flags, **learned(flags))[0]
    parts = {"gates": "conv_trans_blocks_", "embedding": "highway_embedding."}
    lacking = [parts[part] for part in published["lacking"]]
    state = [
        [key, list(value.shape)]
        for key, value in net.state_dict().items()
        if not any(part in key for part in lacking)
    ]
    count = sum(
        parameter.numel()
        for key, parameter in net.named_parameters()
        if not any(part in key for part in lacking)
    )
    assert (len(state), count) == (published["tensors"], published["parameters"])
    assert hashlib.sha256(json.dumps(state).encode()).hexdigest() == published["sha256"]


def learned(flags):
    """The output layers of the parent projects always have two channels."""
    return {} if "learn_sigma" in flags else {"learn_sigma": True}


# sizes


README = {
    "image_size": 256,
    "in_ch": 4,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 1,
    "learn_sigma": True,
    "use_scale_shift_norm": False,
    "attention_resolutions": "16",
}
PLUSPLUS = {
    **README,
    "num_channels": 512,
    "num_res_blocks": 12,
    "num_heads": 8,
    "attention_resolutions": "24",
}


def on_meta(**flags):
    """Parameters, and floating-point operations of encoding and of one evaluation, at batch 1."""
    with torch.device("meta"):
        net = create_model_and_diffusion(**flags)[0].eval()
        image, x, t = torch.empty(1, 3, 256, 256), torch.empty(1, 1, 256, 256), torch.empty(1)
    with torch.no_grad():
        with FlopCounterMode(display=False) as once:
            condition = net.encode(image)
        with FlopCounterMode(display=False) as each:
            output = net(x, t, condition)
    assert output.raw.shape == (1, 2, 256, 256)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return parameters / 1e6, each.get_total_flops() / 1e12, once.get_total_flops() / 1e12


@pytest.mark.parametrize(
    ("version", "parameters", "each", "once"),
    [
        ("plain", 113.7, 0.497, 0.000),
        ("new", 129.4, 0.497, 0.025),
        ("1", 130.8, 0.520, 0.002),
        ("2", 154.3, 0.498, 0.199),
    ],
)
def test_the_readme_s_table_of_sizes(version, parameters, each, once):
    measured = on_meta(**README, version=version)
    assert [round(measured[0], 1), round(measured[1], 3), round(measured[2], 3)] == [
        parameters,
        each,
        once,
    ]


def test_the_size_of_medsegdiff_plus_plus():
    flags = {**PLUSPLUS, "use_scale_shift_norm": True, "version": "new"}
    measured, each, _ = on_meta(**flags)
    assert (round(measured, 1), round(each)) == (7594.3, 34)
    with torch.device("meta"):
        net = create_model_and_diffusion(**{**flags, "use_scale_shift_norm": False})[0]
    assert round(sum(parameter.numel() for parameter in net.parameters()) / 1e6, 1) == 7218.8
    assert training_gib(round(measured * 1e6), 1) == pytest.approx(measured * 4e6 * 9 / 2**30)


def test_a_resolution_without_a_level_is_explained():
    note = "--attention_resolutions 24 adds no attention: at 256 px the levels are of 256, 128, 64,"
    notes = attention_notes(Flags(given=PLUSPLUS).group(NetworkOptions))
    assert len(notes) == 1 and notes[0].startswith(note) and "256 // 24 = 10" in notes[0]
    assert not attention_notes(Flags(given=README).group(NetworkOptions))
    assert (
        len(attention_notes(NetworkOptions(image_size=256, attention_resolutions="16,24,7"))) == 2
    )


def test_a_network_that_cannot_fit_is_refused_before_it_is_built(brats, tmp_path, monkeypatch):
    flags = ["--num_channels", 64, "--channel_mult", "1,1", "--image_size", 32, "--version", "new"]
    command = ["--data_dir", brats / "training", "--out_dir", tmp_path, *flags, "--max_steps", 1]
    monkeypatch.setattr(estimates, "total_gib", lambda device: 0.2)
    error = refused(script("segmentation_train", *command))
    assert "weights, gradients, AdamW's moments and averages take 0.6 GiB" in error
    assert "more than the 0.2 GiB of cpu" in error
    assert not list(tmp_path.iterdir())

    monkeypatch.undo()
    monkeypatch.setattr(estimates, "LARGE_GIB", 0.2)
    said = succeeded(script("segmentation_train", *command, "--attention_resolutions", 24))
    assert "take 0.6 GiB while a checkpoint is written, before any activation" in said
    assert "--attention_resolutions 24 adds no attention: at 32 px" not in said, "32 // 24 is 1"


def test_memory_of_spectra():
    """Two blocks of two matrices: 64 x 64 numbers each with 6 levels, 2^28 with two levels."""
    network = {"image_size": 256, "version": "2"}
    assert spectra_gib(NetworkOptions(**network)) == 4 * 4 * 64**2 / 2**30
    assert spectra_gib(NetworkOptions(**network, channel_mult="1,1")) == 4.0
    assert spectra_gib(NetworkOptions(image_size=256, channel_mult="1,1")) == 0
