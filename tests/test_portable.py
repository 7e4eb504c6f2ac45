"""Weights as safetensors: written by ``export``, read wherever a checkpoint is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused, script, succeeded, training
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from guided_diffusion import Segmenter
from guided_diffusion.checkpoint import LATEST, latest_checkpoint, load_checkpoint
from guided_diffusion.errors import UserError

IMAGE = np.random.default_rng(0).random((4, 40, 40), dtype=np.float32)


def drawn(path: Path, **flags: Any) -> torch.Tensor:
    quick = {"steps": 2, "num_ensemble": 1, "sampler": "ddim", **flags}
    return Segmenter.load(path, **quick)(IMAGE).members


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The averaged weights of a run. Read only."""
    path = tmp_path_factory.mktemp("exported") / "new" / "model.safetensors"
    said = succeeded(script("export_weights", "--model_path", trained, "--out", path))
    assert f"averaged weights (EMA 0.9) of step 4 of {trained / LATEST} in {path}, " in said
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_exported_weights_draw_the_same(
    weights: str, suffix: str, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"a{suffix}"
    flags = ["--model_path", trained, "--weights", weights]
    succeeded(script("export_weights", *flags, "--out", out))
    assert torch.equal(drawn(out), drawn(trained, weights=weights))
    own, read = load_checkpoint(trained / LATEST), load_checkpoint(out)
    assert (read.options, read.step, read.run) == (own.options, own.step, own.run)
    assert read.training == {}
    which = own.choose(weights)[1]
    assert read.choose("ema")[1] == read.choose("raw")[1] == which  # it has one set of weights
    assert out.stat().st_size < (trained / LATEST).stat().st_size / 3


def test_other_programs_find_tensors_by_their_names(exported: Path, trained: Path) -> None:
    own = load_checkpoint(trained / LATEST)
    assert_close(load_file(exported), own.ema["0.9"], rtol=0, atol=0)
    with safe_open(exported, framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["guided_diffusion"])["options"] == own.options


def test_a_folder_with_one_file_of_weights_is_a_model(exported: Path, tmp_path: Path) -> None:
    assert latest_checkpoint(exported.parent) == exported
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"there is no file .*{LATEST}"):
        latest_checkpoint(tmp_path)


def test_training_continues_from_exported_weights(
    exported: Path, brats: Path, tmp_path: Path
) -> None:
    flags = [*training(brats, tmp_path), "--resume_checkpoint", exported, "--max_steps", 5]
    assert f"resuming {exported} at step 4" in succeeded(script("segmentation_train", *flags))
    assert load_checkpoint(tmp_path / LATEST).step == 5


def test_bare_weights_of_others(trained: Path, tmp_path: Path) -> None:
    own = load_checkpoint(trained / LATEST)
    bare = {f"module.{name}": value for name, value in own.model.items()}
    save_file(bare, tmp_path / "model000004.safetensors")
    read = load_checkpoint(tmp_path / "model000004.safetensors")
    assert (read.options, read.step, read.choose("ema")[1]) == ({}, 4, "bare weights")
    assert_close(read.model, own.model, rtol=0, atol=0)
    out = tmp_path / "b.safetensors"
    flags = ["--model_path", tmp_path / "model000004.safetensors", "--out", out]
    succeeded(script("export_weights", *flags))
    assert_close(load_file(out), own.model, rtol=0, atol=0)


def test_a_flipped_bit_is_found(exported: Path, tmp_path: Path) -> None:
    raw, path = bytearray(exported.read_bytes()), tmp_path / "rotten.safetensors"
    raw[-100] ^= 4
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"rotten\.safetensors: is damaged: tensor model/\S+ is"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, bytes(8), b"PK\3\4" + bytes(60)])
def test_files_that_are_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors: .*Use a checkpoint of this suite"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "header", ["", "{", "[]", "3", "{}", '{"ema": "0.9"}', '{"ema": null, "format": 1}']
)
def test_headers_that_are_wrong(header: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, path, metadata={"guided_diffusion": header})
    with pytest.raises(UserError, match=r"a\.safetensors: "):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "--out: does not end in .safetensors or .pt. Name such a file."),
        ("a.onnx", "does not end in .safetensors or .pt"),
        ("there.pt", "exists. Name another file; none is replaced."),
    ],
)
def test_files_that_are_not_written(
    out: str, message: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.pt").write_bytes(b"something")
    error = refused(script("export_weights", "--model_path", trained, "--out", out))
    assert message in error
    assert Path("there.pt").read_bytes() == b"something"
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt"]
