"""Weights as ``.safetensors`` files, which many programs read and which cannot hold code.

A file has one set of weights. Its header says in JSON what a checkpoint says: the options, the
step, the decay rate of an average, and checksums. Other files are bare weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

FORMAT = "guided_diffusion checkpoint 1"
SUFFIX = ".safetensors"
HEADER = "guided_diffusion"


def read(path: Path) -> dict[str, Any]:
    """Read the tensors of a file, or the content of a checkpoint from a file of this suite.

    Raises:
        Exception: any of the library's or of JSON's, for a file that is damaged.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header: Mapping[str, str] = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if HEADER not in header:
        return weights
    content = json.loads(header[HEADER])
    if content["format"] != FORMAT:
        raise ValueError("the header is of another format")
    rate = content.pop("ema")
    ema = {} if rate is None else {rate: weights}
    return {**content, "model": weights, "ema": ema, "training": {}}


def write(
    path: Path, weights: Mapping[str, Tensor], *, rate: str | None, content: Mapping[str, Any]
) -> None:
    """Write weights, and what a checkpoint says of them.

    Args:
        path: of the file.
        weights: on the CPU.
        rate: the decay of an average; None for last weights.
        content: the other parts of a checkpoint, plain types; empty for bare weights.
    """
    from safetensors.torch import save

    own = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    header = {HEADER: json.dumps({**content, "ema": rate})} if content else {}
    path.write_bytes(save(own, metadata={"format": "pt", **header}))
