"""Forged and rotten checkpoints: each is refused in one message, or does what the true one does."""

from __future__ import annotations

import copy
import random
import resource
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused, script
from loops import DISC_FLAGS, batch_of, make_loop
from torch import Tensor

from guided_diffusion import Segmenter
from guided_diffusion.checkpoint import (
    LATEST,
    SEGMENTATION,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    with_companions,
)
from guided_diffusion.errors import UserError
from guided_diffusion.inference.recorded import checked_flags
from guided_diffusion.options.flags import recorded
from guided_diffusion.options.segmentation import DiffusionOptions, NetworkOptions
from guided_diffusion.train_util import TrainLoop

QUICK, ALL = 100, 700
IMAGE = np.random.default_rng(0).random((1, 16, 16), dtype=np.float32)
DISCS = {**DISC_FLAGS, "diffusion_steps": 100}
OPTIONS = {
    **recorded(
        NetworkOptions(**{k: v for k, v in DISCS.items() if hasattr(NetworkOptions, k)}),
        DiffusionOptions(**{k: v for k, v in DISCS.items() if hasattr(DiffusionOptions, k)}),
    ),
    **{"coarse_loss": "none", "crop": "none", "mask_labels": "", "rater_choice": "random"},
    **{"modalities": "", "normalise": "none", "plane": "axial"},
}


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> TrainLoop:
    """A loop that has taken two steps and saved a checkpoint with everything in it."""
    folder = tmp_path_factory.mktemp("true")
    loop = make_loop(folder, max_steps=2, schedule_sampler="loss-second-moment")
    loop.checkpoints.recorded = dict(OPTIONS)
    loop.best.state = {"dice": 0.5, "step": 1, "since": 0}
    loop.run_loop()
    return loop


@pytest.fixture(scope="module")
def true(loop: TrainLoop) -> Path:
    return loop.checkpoints.folder / LATEST


def read(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def drawn(path: Path) -> Tensor:
    """Draw a mask of a fixed image."""
    segmenter = Segmenter.load(path, steps=2, num_ensemble=1, sampler="ddim")
    return segmenter(IMAGE).members


def continued(loop: TrainLoop, path: Path) -> float:
    """Continue a run from a checkpoint by one step, as training does, and return its loss."""
    start = load_checkpoint(path)
    if not start.options:
        start = with_companions(start, path, list(loop.averages))
    checked_flags(start, SEGMENTATION, path)
    load_weights(loop.net, start.model, path)
    loop.restore(start, path=path)
    return float(loop.run_step(batch_of(2)))


# ---------------------------------------------------------------------------------- forgeries


def strange_value(dice: random.Random) -> Any:
    """A value that may be of any type."""
    plain = [None, True, False, 0, -1, 1, 2, 31, 33, 2**31, 2**70, 0.5, -1.5, 1e308]
    texts = ["False", "True", "", "nan", "1,2", "-1,1", "x" * 2000, "ddim25", "linear", "\0", "2"]
    others = [float("nan"), float("inf"), b"1", [], [1], {}, {"a": 1}, (), torch.ones(2)]
    return dice.choice([*plain, *texts, *others])


def strange_tensor(dice: random.Random, value: Tensor) -> Any:
    """What may stand in place of a tensor."""
    forms: list[Callable[[Tensor], Any]] = [
        lambda v: torch.full_like(v, torch.nan),
        lambda v: torch.where(torch.arange(v.numel()).view(v.shape) == 0, torch.inf, v),
        lambda v: v.to(torch.complex64),
        lambda v: v.to(torch.int32),
        lambda v: v > 0,
        lambda v: v.double() * 1e200,
        lambda v: v.to_sparse(),
        lambda v: v.flatten()[:1].expand(v.numel()).view(v.shape),
        lambda v: torch.zeros(1).expand(2**40),
        lambda v: v[:0],
        lambda v: v[..., None],
        lambda v: v.flatten()[0],
        lambda v: v.tolist(),
        lambda v: torch.empty(v.shape, device="meta"),
        lambda v: None,
    ]
    return dice.choice(forms)(value)


def forge_options(dice: random.Random, content: dict[str, Any]) -> None:
    options = content["options"]
    for _ in range(dice.randint(1, 2)):
        name = dice.choice(list(options))
        match dice.randrange(4):
            case 0:
                del options[name]
            case 1:
                options[dice.choice([f"{name}s", name.upper(), "x", 7])] = options.pop(name)
            case _:
                options[name] = strange_value(dice)


def forge_parts(dice: random.Random, content: dict[str, Any]) -> None:
    name = dice.choice(list(content))
    match dice.randrange(3):
        case 0:
            del content[name]
        case 1:
            content[f"{name}{dice.choice(['s', '_', ' '])}"] = content.pop(name)
        case _:
            content[name] = strange_value(dice)


def forge_tensors(dice: random.Random, content: dict[str, Any]) -> None:
    weights = dice.choice([content["model"], *content["ema"].values()])
    name = dice.choice(list(weights))
    match dice.randrange(6):
        case 0:
            del weights[name]
        case 1:
            weights[dice.choice([f"{name}x", "w", 3])] = weights.pop(name)
        case _:
            weights[name] = strange_tensor(dice, weights[name])


def forge_averages(dice: random.Random, content: dict[str, Any]) -> None:
    ema = content["ema"]
    rate = dice.choice(list(ema))
    match dice.randrange(3):
        case 0:
            ema[rate] = strange_value(dice)
        case 1:
            ema[dice.choice(["slow", "2", "nan", "", 0.5, "-1"])] = ema.pop(rate)
        case _:
            ema[rate] = list(ema[rate].values())


def forge_training(dice: random.Random, content: dict[str, Any]) -> None:
    part = content["training"]
    while True:
        key = dice.choice(list(part) if isinstance(part, dict) else range(len(part)))
        inner = part[key]
        if isinstance(inner, dict | list) and inner and dice.random() < 0.8:
            part = inner
            continue
        if isinstance(inner, Tensor) and dice.random() < 0.6:
            part[key] = strange_tensor(dice, inner.float())
        elif isinstance(part, dict) and dice.random() < 0.3:
            del part[key]
        else:
            part[key] = strange_value(dice)
        return


def forge_bytes(dice: random.Random, raw: bytearray) -> bytearray:
    """Change bytes: anywhere, or where the archive's names and pickle are."""
    match dice.randrange(5):
        case 0:
            return raw[: dice.randrange(len(raw))]
        case 1:
            place = dice.randrange(len(raw))
            return raw[:place] + dice.randbytes(dice.randint(1, 64)) + raw[place:]
        case 2:
            raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
        case _:
            ends = [*range(20_000), *range(len(raw) - 20_000, len(raw))]
            for place in dice.choices(ends, k=dice.randint(1, 8)):
                raw[place] = dice.randrange(256)
    return raw


FORGERS = (forge_options, forge_parts, forge_tensors, forge_averages, forge_training)


def forge(seed: int, true: Path, path: Path) -> bool:
    """Write a forgery; returns whether all that it may draw is what the true one draws."""
    dice = random.Random(seed)
    kind = dice.randrange(len(FORGERS) + 1)
    if kind == len(FORGERS):
        path.write_bytes(forge_bytes(dice, bytearray(true.read_bytes())))
        return True
    content = copy.deepcopy(read(true))
    bare = dice.random() < 0.15 and kind == FORGERS.index(forge_tensors)
    FORGERS[kind](dice, content)
    old = dice.random() < 0.4  # as an older version wrote it
    if old:
        content.pop("checksums", None)
    torch.save(content["model"] if bare else content, path)
    return not (old or bare) or kind in (FORGERS.index(forge_training),)


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(QUICK), marks=pytest.mark.slow),
        pytest.param(range(QUICK, ALL), marks=[pytest.mark.long, pytest.mark.slow]),
    ],
    ids=["quick", "all"],
)
def test_forgeries_are_refused_in_one_message_or_draw_the_same(
    seeds: range, loop: TrainLoop, true: Path, tmp_path: Path
) -> None:
    expected, path = drawn(true), tmp_path / "forged.pt"
    refusals = 0
    for seed in seeds:
        same = forge(seed, true, path)
        for use in (drawn, lambda path: continued(loop, path)):
            try:
                found = use(path)
            except UserError as error:
                text = str(error)
                assert "\n" not in text and "weights_only" not in text, (seed, text)
                assert "forged.pt" in text, (seed, text)
                refusals += 1
                continue
            if isinstance(found, Tensor):
                assert found.isfinite().all(), seed
                assert not same or torch.equal(found, expected), seed
            else:
                assert np.isfinite(found), seed
    assert refusals > len(seeds)


# ------------------------------------------------------------------------- what is said of which


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("predict_xstart", "False", "records a wrong --predict_xstart: 'False' is not True or"),
        ("learn_sigma", 0, "records a wrong --learn_sigma: 0 is not True or False"),
        ("image_size", True, "records a wrong --image_size: True is not a whole number"),
        ("image_size", 16.0, "records a wrong --image_size: 16.0 is not a whole number"),
        ("noise_schedule", "sine", "records a wrong --noise_schedule: 'sine' is not a choice"),
        ("num_res_blocks", 0, "records a wrong --num_res_blocks: must be 1 or more"),
        ("diffusion_steps", 10**9, "records a wrong --diffusion_steps: must be at most"),
        ("min_snr_gamma", float("nan"), "records a wrong --min_snr_gamma: must be a finite"),
        ("num_channels", 33, "records flags that cannot be used (--num_channels 33: makes"),
        ("in_ch", -4, "records flags that cannot be used ("),
        ("image_sise", 16, "records 'image_sise', which is no flag of its training. Did you mean"),
        ("predict_xstart", None, "does not record --predict_xstart"),
    ],
)
def test_a_wrong_recorded_flag_is_named(
    name: str, value: Any, problem: str, true: Path, tmp_path: Path
) -> None:
    start = load_checkpoint(true)
    options = {**start.options, name: value}
    if value is None:
        del options[name]
    path = save_checkpoint(tmp_path, replace(start, options=options))
    with pytest.raises(UserError) as raised:
        Segmenter.load(path)
    said = str(raised.value)  # Python's names have no dashes
    assert said.startswith(f"{path}: {problem.replace('--', '')}"), said


def test_a_huge_network_is_compared_before_it_takes_memory(true: Path, tmp_path: Path) -> None:
    start = load_checkpoint(true)
    options = {**start.options, "num_channels": 32 * 2**10}
    path = save_checkpoint(tmp_path, replace(start, options=options))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"tensor time_embed\.0\.weight has shape \(128, 32\), but"):
        Segmenter.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda v: v.to(torch.complex64), "holds complex numbers, not floating-point numbers"),
        (lambda v: v.to(torch.int64), "holds whole numbers, not floating-point numbers"),
        (lambda v: v > 0, "holds truth values, not floating-point numbers"),
        (lambda v: v * torch.nan, "holds NaN or infinite values"),
        (lambda v: v.double() * 1e300, "holds NaN or infinite values"),
    ],
)
@pytest.mark.parametrize("bare", [False, True])
def test_weights_that_are_not_finite_numbers_are_named(
    bare: bool, change: Callable[[Tensor], Tensor], problem: str, true: Path, tmp_path: Path
) -> None:
    start = load_checkpoint(true)
    name = "time_embed.0.bias"
    weights = {**start.model, name: change(start.model[name] + 1)}
    if bare:
        torch.save(weights, tmp_path / "bare.pt")
        flags = {key: value for key, value in DISCS.items() if key != "diffusion_steps"}
        with pytest.raises(UserError, match=rf"bare\.pt: tensor {name} {problem}"):
            Segmenter.load(tmp_path / "bare.pt", **flags)
        return
    path = save_checkpoint(tmp_path, replace(start, model=weights, ema={}))
    with pytest.raises(UserError, match=rf"{path.name}: tensor {name} {problem}"):
        Segmenter.load(path)


def test_a_flipped_bit_is_found_and_its_tensor_named(true: Path, tmp_path: Path) -> None:
    start = load_checkpoint(true)
    raw = true.read_bytes()
    for part, weights in (("model", start.model), ("ema/0.9", start.ema["0.9"])):
        name = "input_blocks.0.0.weight"
        values = weights[name].numpy().tobytes()
        place = raw.index(values) + len(values) // 2
        rotten = tmp_path / "rotten.pt"
        rotten.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(UserError, match=rf"rotten\.pt: is damaged: tensor {part}/{name} is"):
            load_checkpoint(rotten)


def test_a_changed_option_is_found(true: Path, tmp_path: Path) -> None:
    content = read(true)
    content["options"]["predict_xstart"] = False
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: is damaged: options/predict_xstart is not"):
        load_checkpoint(tmp_path / "a.pt")


def test_checkpoints_without_checksums_are_read(true: Path, tmp_path: Path) -> None:
    content = read(true)
    for later in ("checksums", "run"):
        content.pop(later)
    torch.save(content, tmp_path / "old.pt")
    assert torch.equal(drawn(tmp_path / "old.pt"), drawn(true))


@pytest.mark.parametrize(
    "state",
    [[1, 2], {"w": torch.ones(2)}, {"state": [], "param_groups": []}, b"not a checkpoint"],
    ids=["list", "weights", "no moments", "bytes"],
)
def test_an_optimiser_beside_bare_weights_that_is_none(
    state: Any, loop: TrainLoop, true: Path, tmp_path: Path
) -> None:
    path = tmp_path / "savedmodel000002.pt"
    torch.save(load_checkpoint(true).model, path)
    other = tmp_path / "optsavedmodel000002.pt"
    if isinstance(state, bytes):
        other.write_bytes(state)
    else:
        torch.save(state, other)
    with pytest.raises(UserError) as raised:
        continued(loop, path)
    assert str(other) in str(raised.value) and "weights_only" not in str(raised.value)


def test_an_average_that_lacks_a_tensor(loop: TrainLoop, true: Path, tmp_path: Path) -> None:
    start = load_checkpoint(true)
    average = {name: value for name, value in start.ema["0.9"].items() if name != "out.2.bias"}
    path = save_checkpoint(tmp_path, replace(start, ema={"0.9": average}))
    with pytest.raises(UserError, match=r"tensor out\.2\.bias is only in one of its weights"):
        load_checkpoint(path)
    torch.save(start.model, tmp_path / "model.pt")
    torch.save(average, tmp_path / "ema_0.9.pt")
    with pytest.raises(UserError, match=r"tensor out\.2\.bias is absent"):
        continued(loop, tmp_path / "model.pt")


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for part in plain.infolist():
            bomb.writestr(part.filename, plain.read(part))
    with pytest.raises(UserError, match=r"bomb\.pt: cannot be read \(its parts are compressed\)"):
        load_checkpoint(tmp_path / "bomb.pt")


def test_a_forged_checkpoint_on_the_command_line(
    trained: Path, brats: Path, tmp_path: Path
) -> None:
    content = read(trained / LATEST)
    content.pop("checksums")
    content["options"]["predict_xstart"] = "False"
    torch.save(content, tmp_path / "a.pt")
    flags = ["--model_path", tmp_path / "a.pt", "--data_dir", brats / "testing"]
    error = refused(script("segmentation_sample", *flags, "--out_dir", tmp_path / "out"))
    assert "a.pt: records a wrong --predict_xstart: 'False' is not True or False." in error
    assert not (tmp_path / "out").exists()
