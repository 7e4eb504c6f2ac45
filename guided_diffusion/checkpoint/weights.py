"""Weights, tensors by name: do they fit a network, are they numbers, and are they what was saved?

Names and shapes are compared before anything is computed or allocated, since a file may state any
shape.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.errors import UserError

Weights = dict[str, Tensor]
OTHER_FILE = (
    "Use a checkpoint of this suite or a dictionary of tensors, such as an earlier checkpoint of "
    "the run, or copy the file again from its source."
)

NOT_WHOLE = "is not stored as one number for each of its places"


def version_of(weights: Iterable[str]) -> str:
    """Infer the ``--version`` of bare weights from the names of their tensors."""
    marks = {"2": "ss_former.", "1": "hwm.ffparser.", "new": "hwm."}
    names = list(weights)
    for version, mark in marks.items():
        if any(name.startswith(mark) for name in names):
            return version
    has_time = any(name.startswith("time_embed.") for name in names)
    return "unet" if "input_blocks.0.0.weight" in names and not has_time else "plain"


def load_weights(net: nn.Module, weights: Mapping[str, Tensor], path: object) -> None:
    """Load weights into a network whose tensors they have to match: see :func:`usable_weights`."""
    net.load_state_dict(usable_weights(net, weights, path))


def usable_weights(net: nn.Module, weights: Mapping[str, Tensor], path: object) -> Weights:
    """Return weights, cut as :func:`fitting_weights` says, that are all finite numbers.

    Raises:
        UserError: a tensor does not fit, or is not of finite floating-point numbers where the
            network's is; the message names the first one.
    """
    given = fitting_weights(net, weights, path)
    for name, value in net.state_dict().items():
        if problem := _unusable(given[name], value):
            raise _useless(path, name, problem)
    return given


def require_fit(
    make: Callable[[], nn.Module], sets: Iterable[Mapping[str, Tensor]], path: object
) -> None:
    """Compare sets of weights with a network that is built without memory for its tensors.

    Those that are still in shards have no values yet.

    Raises:
        UserError: a tensor does not fit, or its shape states more numbers than its file has.
    """
    with torch.device("meta"):
        net = make()
    for weights in sets:
        for name, value in fitting_weights(net, weights, path).items():
            if not (value.is_meta or is_whole(value)):
                raise _useless(path, name, NOT_WHOLE)


def fitting_weights(net: nn.Module, weights: Mapping[str, Tensor], path: object) -> Weights:
    """Return weights that match a network's tensors in name and shape; values are not looked at.

    Two tensors may be larger, and only their first channels are used: an output layer that also has
    variance channels, which the parent projects always store, and a label embedding of more classes
    than the network has.

    Raises:
        UserError: a tensor differs; the message names the first one and both shapes.
    """
    own = net.state_dict()
    given = {name: _cut(name, value, own) for name, value in weights.items()}
    for name in [*own, *given]:
        in_file, in_net = (
            f"has shape {tuple(side[name].shape)}" if name in side else "is absent"
            for side in (given, own)
        )
        if in_file != in_net:
            raise UserError(
                path,
                f"tensor {name} {in_file}, but in the network that the flags describe it {in_net}",
                "Give the flags that the weights were trained with (--num_channels, "
                "--num_res_blocks, --attention_resolutions, --learn_sigma, ...).",
            )
    return given


def _cut(name: str, value: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    if name not in own or not value.ndim:
        return value
    if name in ("out.2.weight", "out.2.bias") and len(value) == 2 * len(own[name]):
        return value[: len(own[name])]
    return value[: len(own[name])] if name == "label_emb.weight" else value


def _useless(path: object, name: str, problem: str) -> UserError:
    hint = "Use an earlier checkpoint of the run, or copy the file again from its source."
    return UserError(path, f"tensor {name} {problem}", hint)


def _unusable(value: Tensor, own: Tensor) -> str:
    """Say why a network cannot compute with a tensor in place of its own; empty if it can."""
    if not is_whole(value):
        return NOT_WHOLE
    if _kind(value) != _kind(own):
        return f"holds {_kind(value)}, not {_kind(own)}"
    if not value.to(own.dtype).isfinite().all():
        return "holds NaN or infinite values"
    return ""


def _kind(value: Tensor) -> str:
    if value.is_floating_point():
        return "floating-point numbers"
    if value.is_complex():
        return "complex numbers"
    return "truth values" if value.dtype == torch.bool else "whole numbers"


def is_whole(value: Tensor) -> bool:
    """Whether a tensor on the CPU has a place in memory for each of its values."""
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


# ------------------------------------------------------------------------------------ checksums


def checksums(content: Mapping[str, Any]) -> dict[str, int]:
    """Compute the CRC-32 of every tensor and every option of a checkpoint's content.

    They are named by their path, as ``model/out.2.bias`` and ``options/in_ch``. That of a tensor is
    over its type, shape and values.
    """
    tensors = {name: _checksum(value) for name, value in named_tensors(content)}
    options = content.get("options", {}).items()
    return tensors | {f"options/{name}": zlib.crc32(repr(v).encode()) for name, v in options}


def verify(content: Mapping[str, Any], recorded: Mapping[str, int], path: Path) -> None:
    """Compare a checkpoint's content with the checksums that were saved with it.

    Raises:
        UserError: one differs; the message names the tensor or the option.
    """
    found = checksums(content)
    absent = [name for name in recorded if name not in found and not name.startswith("options/")]
    for name in [*found, *absent]:
        if found.get(name) != recorded.get(name):
            what = name if name.startswith("options/") else f"tensor {name}"
            problem = f"is damaged: {what} is not what was saved, its checksum differs"
            raise UserError(path, problem, OTHER_FILE)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor of a nested state of dictionaries and lists."""
    return map_named(lambda _, tensor: function(tensor), value)


def map_named(function: Callable[[str, Tensor], Any], value: Any, path: str = "") -> Any:
    """Apply a function to every tensor of a nested state, and to its path in it."""
    if isinstance(value, Tensor):
        return function(path, value)
    below = f"{path}/" if path else ""
    if isinstance(value, dict):
        return {key: map_named(function, part, f"{below}{key}") for key, part in value.items()}
    if isinstance(value, list):
        return [map_named(function, part, f"{below}{index}") for index, part in enumerate(value)]
    return value


def named_tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a nested state with its path in it, as ``model/out.2.bias``."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in parts:
            yield from named_tensors(part, f"{path}/{key}" if path else str(key))


def _checksum(value: Tensor) -> int:
    if not is_whole(value):
        raise ValueError(f"a tensor {NOT_WHOLE}")
    head = f"{value.dtype} {tuple(value.shape)}".encode()
    values = value.detach().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(values.numpy().data, zlib.crc32(head))
