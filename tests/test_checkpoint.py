"""Checkpoints: round trip, published bare weights, damage, malicious files, interrupted writes."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import contents
from torch import Tensor, nn
from torch.testing import assert_close

from guided_diffusion.checkpoint import (
    LATEST,
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    with_companions,
)
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.unet import UNetModel

SMALL = {
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": "1",
    "num_res_blocks": 1,
    "attention_resolutions": "",
}


def network(**flags: Any) -> UNetModel:
    return create_model_and_diffusion(**{**SMALL, **flags})[0]


def random_weights(net: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(v.shape, generator=generator) for name, v in net.state_dict().items()}


def checkpoint(step: int = 7, **parts: Any) -> Checkpoint:
    fields = {"options": {"num_channels": 32}, "model": {"w": torch.full((3,), float(step))}}
    return Checkpoint(step=step, **{**fields, **parts})


# ------------------------------------------------------------------------------ round trip


def test_round_trip(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    written = checkpoint(
        options={"channel_mult": "1,2", "learn_sigma": True, "lr": 0.5, "in_ch": 5},
        ema={"0.9": {"w": torch.ones(3)}, "0.99": {"w": torch.zeros(3)}},
        training={"optimizer": optimizer.state_dict(), "seen": torch.arange(3)},
    )
    read = load_checkpoint(save_checkpoint(tmp_path, written))

    assert (read.options, read.step) == (written.options, 7)
    assert_close(read.model, written.model, rtol=0, atol=0)
    assert_close(read.ema, written.ema, rtol=0, atol=0)
    assert_close(read.training["seen"], torch.arange(3))
    assert_close(
        read.training["optimizer"]["state"][0]["exp_avg"], optimizer.state[parameter]["exp_avg"]
    )
    assert read.training["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


def test_own_files_hold_only_data(trained: Path) -> None:
    content = torch.load(trained / LATEST, weights_only=True)
    assert content["step"] == 4
    assert all(type(value) is Tensor for value in content["model"].values())


def test_loading_never_trusts_a_file(
    trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trusted = []
    load = torch.load
    monkeypatch.setattr(
        torch, "load", lambda *a, **k: (trusted.append(k.get("weights_only")), load(*a, **k))[1]
    )
    load_checkpoint(trained / LATEST)
    assert trusted == [True]


def test_files_are_named_by_step_and_the_latest_has_a_fixed_name(tmp_path: Path) -> None:
    for step in (5, 1_234_567, 9):
        path = save_checkpoint(tmp_path, checkpoint(step))
        assert path == tmp_path / f"savedmodel{step:06d}.pt"
        assert path.read_bytes() == (tmp_path / LATEST).read_bytes()
        assert load_checkpoint(tmp_path / LATEST).step == step
    assert contents(tmp_path).keys() == {
        "savedmodel000005.pt",
        "savedmodel000009.pt",
        "savedmodel1234567.pt",
        LATEST,
    }
    assert load_checkpoint(tmp_path / "savedmodel000005.pt").step == 5


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(5))
    path = save_checkpoint(tmp_path, checkpoint(5, model={"w": torch.tensor([42.0])}))
    for file in (path, tmp_path / LATEST):
        assert load_checkpoint(file).model["w"].item() == 42


def test_without_hard_links_the_latest_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    path = save_checkpoint(tmp_path, checkpoint(5))
    save_checkpoint(tmp_path, checkpoint(6))
    assert load_checkpoint(path).step == 5
    assert load_checkpoint(tmp_path / LATEST).step == 6


def test_a_path_may_be_a_file_or_its_folder(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(5))
    assert latest_checkpoint(path) == path
    assert latest_checkpoint(tmp_path) == latest_checkpoint(str(tmp_path)) == tmp_path / LATEST


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("", "no path given"),
        ("nowhere.pt", "there is no file nowhere.pt"),
        (".", f"there is no file {LATEST}"),
    ],
)
def test_a_path_without_a_checkpoint(
    path: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = rf"--resume_checkpoint: {problem}\. .* a folder that holds {LATEST}"
    with pytest.raises(UserError, match=message):
        latest_checkpoint(path, flag="--resume_checkpoint")


# -------------------------------------------------------------------------- which weights


def test_the_slowest_average_is_preferred_and_named() -> None:
    averages = {"0.9": {"w": torch.ones(1)}, "0.9999": {"w": torch.zeros(1)}, "0.99": {}}
    full = checkpoint(12, ema=averages)
    assert full.choose("ema") == (averages["0.9999"], "averaged weights (EMA 0.9999) of step 12")
    assert full.choose("raw") == (full.model, "last weights of step 12")
    assert checkpoint(12).choose("ema")[1] == "last weights of step 12"


def test_bare_weights_have_no_average(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "bare.pt")
    bare = load_checkpoint(tmp_path / "bare.pt")
    assert bare.choose("ema") == (bare.model, "bare weights")


# ------------------------------------------------------------------------------ legacy weights


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_bare_weights_of_the_parent_projects(prefix: str, zipped: bool, tmp_path: Path) -> None:
    net = network(learn_sigma=True)
    weights = random_weights(net)
    legacy = OrderedDict((prefix + name, nn.Parameter(value)) for name, value in weights.items())
    path = tmp_path / "savedmodel005000.pt"
    torch.save(legacy, path, _use_new_zipfile_serialization=zipped)

    read = load_checkpoint(path)
    assert read.options == {} and read.ema == {} and read.training == {}
    assert all(type(value) is Tensor for value in read.model.values())
    load_weights(net, read.model, path)
    assert_close(dict(net.state_dict()), weights, rtol=0, atol=0)


def prefixed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    return lambda weights: {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize("outer", ["", "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_weights_of_other_training_loops_give_the_same_outputs(
    prefix: str, outer: str, tmp_path: Path
) -> None:
    net = network().eval()
    weights = {name: 0.1 * value for name, value in random_weights(net).items()}
    given = prefixed(prefix)(weights)
    torch.save({"epoch": 3, "optimizer": {}, outer: given} if outer else given, tmp_path / "a.pt")
    read = load_checkpoint(tmp_path / "a.pt")
    assert (read.options, read.ema) == ({}, {}) and read.choose("ema")[1] == "bare weights"

    other = network().eval()
    load_weights(net, weights, "")
    load_weights(other, read.model, "")
    image, x, t = torch.randn(1, 4, 16, 16), torch.randn(1, 1, 16, 16), torch.tensor([9])
    assert_close(other(x, t, other.encode(image)).raw, net(x, t, net.encode(image)).raw)


def test_parts_of_the_network_that_were_wrapped_alone(tmp_path: Path) -> None:
    torch.save({"out.module.2._orig_mod.bias": torch.ones(1)}, tmp_path / "a.pt")
    assert list(load_checkpoint(tmp_path / "a.pt").model) == ["out.2.bias"]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("last", "average"),
    [("model", "ema"), ("state_dict", "state_dict_ema"), ("model", "ema_model")],
)
def test_averages_of_other_training_loops(
    last: str, average: str, nested: bool, prefix: str, tmp_path: Path
) -> None:
    raw, averaged = {"w": torch.ones(2), "mean": torch.ones(1)}, {"w": torch.zeros(2)}
    own = {name: prefixed(prefix)(part) for name, part in ((last, raw), (average, averaged))}
    own[average]["n_averaged"] = torch.tensor(4)
    torch.save({"state_dict": own} if nested else {"step": 5, **own}, tmp_path / "a.pt")
    read = load_checkpoint(tmp_path / "a.pt")
    assert read.choose("raw") == (read.model, "bare weights")
    assert_close(read.model, raw)
    chosen, which = read.choose("ema")
    assert which == "bare averaged weights"
    assert_close(chosen, {**raw, **averaged})  # an average without buffers


def test_an_average_alone_is_the_weights(tmp_path: Path) -> None:
    torch.save({"ema": {"module.w": torch.ones(2), "n_averaged": torch.ones(1)}}, tmp_path / "a.pt")
    read = load_checkpoint(tmp_path / "a.pt")
    assert_close(read.model, {"w": torch.ones(2)})
    assert_close(read.choose("ema")[0], read.model)


def test_training_continues_the_average_of_another_training_loop(tmp_path: Path) -> None:
    path = tmp_path / "savedmodel000003.pt"
    torch.save({"model": {"w": torch.ones(1)}, "ema": {"w": torch.zeros(1)}}, path)
    torch.save({"w": torch.full((1,), 0.5)}, tmp_path / "ema_0.99_000003.pt")
    start = with_companions(load_checkpoint(path), path, ["0.9", "0.99"])
    assert_close(start.ema, {"0.9": {"w": torch.zeros(1)}, "0.99": {"w": torch.full((1,), 0.5)}})


def test_a_dictionary_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {"step": 1}
    content["model"] = content["ema"] = content
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a dictionary of tensors"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "there", "hint"),
    [
        ("optsavedmodel005000.pt", ["savedmodel005000.pt"], r"Pass .*/savedmodel005000\.pt\."),
        ("opt005000.pt", ["model005000.pt", "model.pt"], r"Pass .*/model005000\.pt\."),
        ("opt.pt", ["classifier_model.pt"], r"Pass .*/classifier_model\.pt\."),
        ("opt.pt", [], r"that were saved with it, such as model\.pt or classifier_model\.pt\."),
        ("opt000100.pt", ["model.pt"], r", such as savedmodel000100\.pt or model000100\.pt\."),
    ],
)
def test_the_state_of_an_optimiser_is_named_for_what_it_is(
    name: str, there: list[str], hint: str, tmp_path: Path
) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    torch.save(optimizer.state_dict(), tmp_path / name)
    for other in there:
        (tmp_path / other).touch()
    message = rf"{name}: holds the state of an optimiser, not weights\. .*{hint}$"
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / name)


def test_variance_channels_of_bare_weights_are_dropped_where_none_are_learned() -> None:
    legacy = random_weights(network(learn_sigma=True))
    net = network(learn_sigma=False)
    load_weights(net, legacy, "legacy.pt")
    own = net.state_dict()
    assert own["out.2.weight"].shape[0] == own["out.2.bias"].shape[0] == 1
    assert_close(own["out.2.weight"], legacy["out.2.weight"][:1], rtol=0, atol=0)
    assert_close(own["out.2.bias"], legacy["out.2.bias"][:1], rtol=0, atol=0)


def test_the_cut_network_predicts_the_first_channel() -> None:
    full, cut = network(learn_sigma=True).eval(), network(learn_sigma=False).eval()
    weights = {name: 0.1 * value for name, value in random_weights(full).items()}
    load_weights(full, weights, "")
    load_weights(cut, weights, "")
    image, x, t = torch.randn(2, 4, 16, 16), torch.randn(2, 1, 16, 16), torch.tensor([3, 900])
    assert_close(cut(x, t, cut.encode(image)).raw, full(x, t, full.encode(image)).raw[:, :1])


# ------------------------------------------------------------------------- weights that differ


def test_the_first_differing_tensor_is_named_with_both_shapes() -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError) as raised:
        load_weights(net, random_weights(network(num_channels=64)), "wide.pt")
    text = str(raised.value)
    assert text.startswith("wide.pt: tensor time_embed.0.weight has shape (256, 64), but in the ")
    assert "it has shape (128, 32). Give the flags" in text
    assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


def test_weights_of_a_deeper_network_are_refused() -> None:
    weights = random_weights(network(num_res_blocks=2))
    with pytest.raises(UserError, match=r"a\.pt: tensor .* has shape \(.*\), but .* it is absent"):
        load_weights(network(), weights, "a.pt")


def test_missing_and_surplus_tensors() -> None:
    net = network()
    weights = random_weights(net)
    with pytest.raises(UserError, match=r"tensor strange has shape \(2, 3\), .* it is absent"):
        load_weights(net, {**weights, "strange": torch.zeros(2, 3)}, "a.pt")
    del weights["out.2.bias"]
    with pytest.raises(UserError, match=r"tensor out\.2\.bias is absent, .* has shape \(1,\)"):
        load_weights(net, weights, "a.pt")


def test_an_output_layer_too_small_is_refused() -> None:
    with pytest.raises(UserError, match=r"out\.2\.weight has shape \(1, .*\(2, "):
        load_weights(network(learn_sigma=True), random_weights(network()), "a.pt")


# ------------------------------------------------------------------------ interrupted writes


def half_then(failure: BaseException) -> Callable[..., None]:
    """Replace torch.save by a function that writes some bytes and fails."""

    def save(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half of it")
        raise failure

    return save


def fail(failure: BaseException) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise failure

    return call


FULL = OSError(28, "No space left on device")


@pytest.fixture
def before(tmp_path: Path) -> dict[str, bytes]:
    """The folder's files after step 5 was saved."""
    save_checkpoint(tmp_path, checkpoint(5))
    return contents(tmp_path)


@pytest.mark.parametrize("failure", [FULL, RuntimeError("inline_container.cc: write failed")])
def test_a_full_disk_leaves_the_old_file(
    failure: Exception, before: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", half_then(failure))
    for step in (5, 6):
        with pytest.raises(UserError, match="earlier checkpoints are intact") as raised:
            save_checkpoint(tmp_path, checkpoint(step))
        assert f"savedmodel{step:06d}.pt" in str(raised.value)
        assert str(failure) in str(raised.value)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), SystemExit(1), MemoryError()])
def test_an_interruption_passes_and_leaves_the_old_file(
    failure: BaseException,
    before: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "save", half_then(failure))
    with pytest.raises(type(failure)):
        save_checkpoint(tmp_path, checkpoint(6))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_failing_rename_leaves_the_old_file(
    name: str, before: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, name, fail(FULL))
    if name == "replace":
        monkeypatch.setattr(Path, name, fail(FULL))
    for step in (5, 6):
        with pytest.raises(UserError, match="No space left"):
            save_checkpoint(tmp_path, checkpoint(step))
        assert contents(tmp_path) == before


def test_a_failing_copy_leaves_the_latest_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, checkpoint(5))
    latest = (tmp_path / LATEST).read_bytes()

    def copy(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:9])
        raise FULL

    monkeypatch.setattr(Path, "hardlink_to", fail(OSError("no links here")))
    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(UserError):
        save_checkpoint(tmp_path, checkpoint(6))
    assert (tmp_path / LATEST).read_bytes() == latest
    assert contents(tmp_path).keys() == {"savedmodel000005.pt", "savedmodel000006.pt", LATEST}


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"savedmodel000005\.pt: cannot be written"):
        save_checkpoint(tmp_path / "gone", checkpoint(5))


def test_partial_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """A killed process cannot remove them; the next save does."""
    path = save_checkpoint(tmp_path, checkpoint(5))
    path.with_name(f".part-{path.name}").write_bytes(b"half of it")
    (tmp_path / f".part-{LATEST}").write_bytes(b"half of it")
    save_checkpoint(tmp_path, checkpoint(5, model={"w": torch.zeros(9)}))
    assert load_checkpoint(tmp_path / LATEST).model["w"].numel() == 9
    assert contents(tmp_path).keys() == {path.name, LATEST}


# --------------------------------------------------------------------- damage and malice


class Malice:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("form", ["zipped", "unzipped", "pickle"])
@pytest.mark.parametrize("hidden", ["bare", "in options", "in weights"])
def test_a_malicious_file_is_refused_and_not_executed(
    form: str, hidden: str, tmp_path: Path
) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.pt"
    own = {"format": "guided_diffusion checkpoint 1", "step": 1, "options": {}, "model": {}}
    content: object = {
        "bare": Malice(trace),
        "in options": {**own, "options": {"num_channels": Malice(trace)}},
        "in weights": {"w": torch.ones(2), "v": Malice(trace)},
    }[hidden]
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zipped")

    with pytest.raises(UserError, match=r"evil\.pt: (holds objects|is damaged)"):
        load_checkpoint(path)
    assert not trace.exists()


def test_an_unguarded_reader_would_execute_it(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malice(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


def test_code_in_a_file_is_named(tmp_path: Path) -> None:
    torch.save(Malice(tmp_path / "trace"), tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"objects that could run code \(.*mkdir\)"):
        load_checkpoint(tmp_path / "evil.pt")


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"step,loss\n1,0.5\n", b"PK\x03\x04", b"\x80\x02", bytes(1000), b"\x93NUMPY"],
    ids=["empty", "blank", "text", "zip head", "pickle head", "zeros", "numpy"],
)
def test_files_that_are_not_checkpoints(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    message = r"other\.pt: (is damaged|cannot be read).* Use a checkpoint of this suite"
    with pytest.raises(UserError, match=message) as raised:
        load_checkpoint(path)
    assert "\n" not in str(raised.value)
    assert "could run code" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {},
        {"w": 1},
        torch.ones(3),
        {"optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}},
        {"model": {"w": 1}, "ema": None, "step": torch.ones(1)},
        {"format": "guided_diffusion checkpoint 1"},
        {"format": "guided_diffusion checkpoint 1", "step": 1, "options": {}, "model": {}, "x": 1},
        {"format": "guided_diffusion checkpoint 1", **vars(Checkpoint({}, 1, {})), "ema": [1]},
        {"format": "guided_diffusion checkpoint 1", **vars(Checkpoint({}, 1, {})), "step": "x"},
        {1: torch.ones(2)},
    ],
    ids=[
        *(
            "list",
            "empty",
            "int",
            "tensor",
            "optimiser",
            "no weights",
            "headless",
            "surplus",
            "other part",
        ),
        *("other step", "unnamed"),
    ],
)
def test_other_objects_saved_by_torch_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: .*not (a dictionary|those of a ch)"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    content = save_checkpoint(tmp_path, checkpoint()).read_bytes()
    path = tmp_path / "short.pt"
    for length in range(0, len(content), 41):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"short\.pt"):
            load_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_refused_or_read_but_never_a_crash(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "damaged.pt"
    own = {"format": "guided_diffusion checkpoint 1", **vars(checkpoint())}
    torch.save(own, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    dice = random.Random(0)
    refusals = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except UserError as error:
            assert "damaged.pt" in str(error) and "\n" not in str(error)
            refusals += 1
    assert refusals > 50


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    (tmp_path / LATEST).mkdir()
    with pytest.raises(UserError, match="no file"):
        latest_checkpoint(tmp_path)
