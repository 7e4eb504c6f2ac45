"""Small networks of every version with known weights, for tests of MedSegDiff's networks."""

import torch
from golden.fill import fill

from guided_diffusion.networks.highway import FFParser
from guided_diffusion.script_util import create_model_and_diffusion

VERSIONS = ["new", "1", "2"]
SMALL = {
    "image_size": 32,
    "in_ch": 4,
    "num_channels": 32,
    "channel_mult": "1,2,2",
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "num_heads": 2,
}


def normals(*shape, seed=0):
    """Standard normal values, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(version, **flags):
    """A network of milliseconds whose every layer does something."""
    net = fill(create_model_and_diffusion(**{**SMALL, "version": version, **flags})[0])
    for module in net.modules():
        if isinstance(module, FFParser):  # filled, a filter is so weak that it closes its gate
            module.complex_weight.data[..., 0] += 1
    return net.eval()


def inputs(size=32):
    """An image, a noisy mask and timesteps, of two cases."""
    return normals(2, 3, size, size), normals(2, 1, size, size, seed=1), torch.tensor([3, 700])


def predict(net, image, mask, t, y=None):
    """Encode the image and predict."""
    return net(mask, t, net.encode(image), y=y)
