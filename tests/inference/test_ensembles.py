"""Ensembles of several weights, flips and dropout: which masks they have, and what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_csv, refused, script, succeeded
from test_predict import cases_in_memory, random_network
from torch import Tensor
from torch.testing import assert_close

from guided_diffusion.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from guided_diffusion.data.frames import Frame
from guided_diffusion.errors import UserError
from guided_diffusion.inference.drawing import TrainedNetwork
from guided_diffusion.inference.plan import SamplingPlan
from guided_diffusion.inference.predict import segment
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.nn import Dropout
from guided_diffusion.options.network import DiffusionOptions, NetworkOptions
from guided_diffusion.options.objective import objective
from guided_diffusion.script_util import create_model

DIRECT = {"mask_loss": "bce", "mask_dropout": 0.5}
PLAN: dict[str, Any] = {"num_ensemble": 3, "batch_size": 8}


def network(seed: int = 0, *, plan: dict[str, Any], **flags: Any) -> TrainedNetwork:
    net, diffusion = random_network(seed, **flags)
    sampler, kept = plan.get("sampler", "ddim"), [49, 30, 3]
    levels = diffusion.schedule.levels(kept[:1] if sampler == "direct" else kept)
    return TrainedNetwork(
        net.eval(), diffusion, SamplingPlan(**{"sampler": sampler, "levels": (*levels,), **plan})
    )


def segmenter(
    seeds: Sequence[int] = (0,), flags: Sequence[dict[str, Any]] = ({},), **plan: Any
) -> Segmenter:
    plans = {**PLAN, **plan}
    built = [
        network(seed, plan=plans, **own)
        for seed, own in zip(seeds, [*flags] * (len(seeds) // len(flags)), strict=True)
    ]
    net, diffusion, own_plan, _ = built[0]
    return Segmenter(net, diffusion, frame=Frame(16), plan=own_plan, others=built[1:])


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(2))


NAMES = ("a", "b")


# ------------------------------------------------------------------------------ weights


def test_the_first_weights_have_the_masks_that_they_have_alone() -> None:
    alone, both = (segmenter(seeds).draw(images(), NAMES) for seeds in ((0,), (0, 1)))
    assert both.shape == (2, 6, 1, 16, 16)
    assert_close(both[:, :3], alone, rtol=0, atol=0)


def test_the_masks_of_other_weights_have_noise_of_their_own() -> None:
    """Equal weights twice: with one noise for both, the members would be equal in pairs."""
    members = segmenter((0, 0)).draw(images(1), ["a"])[0]
    wide = segmenter((0,), num_ensemble=6).draw(images(1), ["a"])[0]
    assert_close(members, wide, rtol=0, atol=1e-6)
    assert all(not torch.equal(one, other) for one, other in combinations(members, 2))


@pytest.mark.parametrize("batch_size", [1, 4, 5, 16])
def test_members_do_not_depend_on_the_batch(batch_size: int) -> None:
    options: dict[str, Any] = {"flip_members": True, "dropout_members": True}
    flags = [{"dropout": 0.4}]
    expected = segmenter((0, 1), flags, **options).draw(images(), NAMES)
    drawn = segmenter((0, 1), flags, **options, batch_size=batch_size)
    assert_close(drawn.draw(images(), NAMES), expected, rtol=0, atol=1e-5)
    alone = drawn.draw(images()[1:], NAMES[1:])
    assert_close(alone, expected[1:], rtol=0, atol=1e-5)


def test_weights_may_differ_in_version_and_plan() -> None:
    """A plain U-Net has one mask for each flip, a diffusion as many as are asked for."""
    first = network(0, plan=PLAN | {"flip_members": True})
    direct = {**PLAN, "sampler": "direct", "num_ensemble": 1, "flip_members": True}
    unet = network(1, plan=direct, version="unet")
    both = Segmenter(first.net, first.diffusion, frame=Frame(16), plan=first.plan, others=[unet])
    (result,) = both.segment(cases_in_memory(1).cases.values())  # type: ignore[arg-type]
    assert len(result.members) == 8 and result.per_weights == (6, 2)
    assert both.evaluations == 6 * 3 + 2 * 1


def test_where_memory_runs_out_all_networks_draw_less_at_a_time(quiet: None) -> None:
    expected = segmenter((0, 1)).draw(images(), NAMES)
    both = segmenter((0, 1))

    def full(net: object, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > 2:
            raise RuntimeError("out of memory")

    both.others[0].net.register_forward_pre_hook(full)
    assert_close(both.draw(images(), NAMES), expected, rtol=0, atol=1e-5)
    assert {one.plan.batch_size for one in both.networks} == {1}


def test_no_network_draws_more_at_a_time_where_memory_runs_out_for_another(quiet: None) -> None:
    both = segmenter((0, 1), batch_size=6)
    other = both.others[0]
    both.others = (other._replace(plan=replace(other.plan, batch_size=2)),)

    def full(net: object, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > 3:
            raise RuntimeError("out of memory")

    both.net.register_forward_pre_hook(full)
    both.draw(images(), NAMES)
    assert [one.plan.batch_size for one in both.networks] == [3, 2]


# ------------------------------------------------------------------------------ flips


def test_flips_are_undone() -> None:
    """Members of the flipped image, flipped back: by hand from a segmenter without flips."""
    image = images(1)
    members = segmenter((0,), flip_members=True).draw(image, ["a"])[0]
    plain = segmenter((0,), num_ensemble=6)
    assert_close(members[:3], plain.draw(image, ["a"])[0, :3], rtol=0, atol=1e-6)
    turned = plain.draw(image.flip(-1), ["a"])[0, 3:].flip(-1)
    assert_close(members[3:], turned, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fusion", ["mean", "direct"])
def test_the_direct_answer_is_averaged_over_weights_and_flips(fusion: str) -> None:
    image, options = images(1), {"fusion": fusion}
    both = segmenter((0, 1), [DIRECT], flip_members=True, **options)
    direct = both.draw_with_coarse(image, ["a"]).direct
    if fusion == "mean":
        assert direct is None
        return
    answers = []
    for seed in (0, 1):
        alone = segmenter((seed,), [DIRECT], sampler="direct", num_ensemble=1)
        answers += [alone.draw(image, ["a"])[0, 0]]
        answers += [alone.draw(image.flip(-1), ["a"])[0, 0].flip(-1)]
    assert_close(direct, torch.stack(answers).mean(0)[None])


def test_the_coarse_mask_is_averaged_over_flips(narrow_highway: None) -> None:
    image = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    flags = [{"version": "new", "image_size": 32}]
    plain = segmenter((0,), flags, num_ensemble=1)
    flipped = segmenter((0,), flags, num_ensemble=1, flip_members=True)
    coarse = [plain.draw_with_coarse(seen, ["a"]).coarse for seen in (image, image.flip(-1))]
    assert coarse[0] is not None and coarse[1] is not None
    expected = (coarse[0] + coarse[1].flip(-1)) / 2
    assert_close(flipped.draw_with_coarse(image, ["a"]).coarse, expected)


# ------------------------------------------------------------------------------ dropout


def test_dropout_masks_follow_from_the_keys_alone() -> None:
    layer = Dropout(0.3).eval()
    x = torch.ones(3, 8, 40, 40)
    assert torch.equal(layer(x), x)
    layer.keys = torch.tensor([5, 2**31 - 1, 77], dtype=torch.int32)
    dropped = layer(x)
    layer.keys = layer.keys[[1, 0]]
    assert torch.equal(layer(x[:2]), dropped[[1, 0]])
    assert torch.equal(dropped.unique(), torch.tensor([0, 1 / 0.7]))
    # Of N pixels 0.3 N are dropped, of two rows 0.09 N in both; 5 deviations of the binomial.
    zero = (dropped == 0).flatten(1).double()
    count = zero.shape[1]
    assert_close(
        zero.mean(1), torch.full((3,), 0.3).double(), rtol=0, atol=5 * (0.21 / count) ** 0.5
    )
    for one, other in combinations(zero, 2):
        assert float((one * other).mean()) == pytest.approx(0.09, abs=5 * (0.082 / count) ** 0.5)
    for step in (1, 2, 40, 1600):  # neighbours in any direction are dropped independently
        both = float((zero[:, step:] * zero[:, :-step]).mean())
        assert both == pytest.approx(0.09, abs=5 * (0.082 / (3 * count)) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_may_be_dropped(dtype: torch.dtype) -> None:
    layer = Dropout(1.0)
    layer.keys = torch.tensor([1], dtype=torch.int32)
    dropped = layer(torch.ones(1, 2, 4, 4, dtype=dtype))
    assert dropped.dtype == dtype and not dropped.any()


def test_compiled_dropout_takes_new_keys() -> None:
    layer = Dropout(0.4).eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    x = torch.rand(2, 3, 8, 8)
    for first in (3, 90):
        layer.keys = torch.tensor([first, 7], dtype=torch.int32)
        assert torch.equal(compiled(x), layer(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_dropout_in_training_is_that_of_torch() -> None:
    x = torch.ones(2, 100)
    torch.manual_seed(0)
    expected = torch.nn.Dropout(0.4)(x)
    torch.manual_seed(0)
    assert torch.equal(Dropout(0.4)(x), expected)
    assert not Dropout(0.4).state_dict()


def test_dropout_gives_a_direct_answer_members() -> None:
    flags = [DIRECT | {"dropout": 0.4}]
    own = segmenter((0,), flags, sampler="direct", dropout_members=True)
    members = own.draw(images(1), ["a"])[0]
    assert all(not torch.equal(one, other) for one, other in combinations(members, 2))
    assert torch.equal(own.draw(images(1), ["a"])[0], members)
    assert not torch.equal(own.draw(images(1), ["b"])[0], members)
    other = segmenter((0,), flags, sampler="direct", dropout_members=True, seed=11)
    assert not torch.equal(other.draw(images(1), ["a"])[0], members)
    layers = [layer for layer in own.net.modules() if isinstance(layer, Dropout)]
    assert layers and all(layer.keys is None for layer in layers) and not own.net.training
    # The direct answer to fuse is without dropout.
    fused = segmenter((0,), flags, sampler="direct", dropout_members=True, fusion="direct")
    plain = segmenter((0,), flags, sampler="direct", num_ensemble=1)
    answer = fused.draw_with_coarse(images(1), ["a"]).direct
    assert_close(answer, plain.draw(images(1), ["a"])[:, 0])


def test_dropout_differs_between_layers_and_evaluations() -> None:
    own = segmenter((0,), [{"dropout": 0.4}], dropout_members=True, num_ensemble=2)
    seen: list[tuple[int, ...]] = []

    def note(layer: Dropout, *_: object) -> None:
        assert layer.keys is not None
        seen.append(tuple(layer.keys.tolist()))

    for layer in own.net.modules():
        if isinstance(layer, Dropout):
            layer.register_forward_pre_hook(note)
    own.draw(images(1), ["a"])
    keys = [key for keys in seen for key in keys]
    assert len(seen) % 3 == 0 and len({*keys}) == len(keys) == 2 * len(seen)


# ------------------------------------------------------------------------------ the record


@pytest.mark.parametrize(
    "change",
    [
        {"flip_members": True},
        {"dropout_members": True},
        {"others": True},
    ],
    ids=str,
)
def test_the_fingerprint_covers_weights_and_flags(change: dict[str, Any]) -> None:
    flags = [{"dropout": 0.4}]
    prints = {segmenter((0,), flags).fingerprint, segmenter((0,), flags, batch_size=3).fingerprint}
    if change.pop("others", False):
        others = [segmenter(seeds, flags).fingerprint for seeds in ((0, 1), (1, 0), (0, 2))]
    else:
        others = [segmenter((0,), flags, **change).fingerprint]
    assert len(prints) == 1 and len(prints | {*others}) == 1 + len(others)


def square(*pixels: int) -> Tensor:
    mask = torch.zeros(2, 2)
    mask.view(-1)[list(pixels)] = 1
    return mask


def test_spread_within_and_between_weights_by_hand(tmp_path: Path) -> None:
    """Two weights with two members each, one pixel against two: 1 - Dice is 1 / 3."""
    members = torch.stack([square(0), square(0, 1), square(2), square(2, 3)])
    both = segmenter((0, 1), num_ensemble=2)

    def finish(case: Any, drawn: Any) -> Segmentation:
        return Segmentation(members, members.mean(0), members.std(0), per_weights=(2, 2))

    both.finish = finish  # type: ignore[method-assign]
    segment(both, cases_in_memory(1, size=(2, 2)), tmp_path, fingerprint="f")
    (row,) = read_csv(tmp_path / "predictions.csv")
    assert (row["within_weights"], row["between_weights"]) == ("0.3333", "1.0")
    assert float(row["disagreement"]) == pytest.approx((2 / 3 + 4) / 6, abs=1e-4)
    assert len([*tmp_path.glob("case0_output?.png")]) == 4


def test_one_kind_of_weights_has_no_such_columns(tmp_path: Path) -> None:
    segment(segmenter((0,), flip_members=True), cases_in_memory(1), tmp_path, fingerprint="f")
    (row,) = read_csv(tmp_path / "predictions.csv")
    assert not {"within_weights", "between_weights"} & row.keys() and row["members"] == "6"


# ------------------------------------------------------------------------------ checkpoints


Save = Callable[..., Path]


@pytest.fixture
def save(trained: Path, tmp_path: Path) -> Save:
    """Saves weights of a seed in a folder, with the options of the trained ones but for some."""
    checkpoint = load_checkpoint(latest_checkpoint(trained))

    def write(name: str, seed: int = 0, **changed: Any) -> Path:
        options = {**checkpoint.options, **changed}
        own = NetworkOptions(
            **{key: options[key] for key in vars(NetworkOptions()) if key in options}
        )
        diffusion = objective(
            DiffusionOptions(
                **{key: options[key] for key in vars(DiffusionOptions()) if key in options}
            ),
            own.version,
        )
        torch.manual_seed(seed)
        net = create_model(own, diffusion)
        for parameter in net.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape)
        (tmp_path / name).mkdir()
        options |= vars(diffusion)
        return save_checkpoint(
            tmp_path / name, replace(checkpoint, options=options, model=net.state_dict(), ema={})
        ).parent

    return write


def test_several_paths_are_loaded(save: Save) -> None:
    first, comma = save("a"), save("b,c", 1)
    image = torch.rand(4, 20, 24)
    flags: dict[str, Any] = {"steps": 2, "use_ddim": True, "num_ensemble": 2}
    by_text = Segmenter.load(f"{first}, {comma}", **flags)
    by_list = Segmenter.load([first, comma / "savedmodel.pt"], **flags)
    assert by_text.fingerprint == by_list.fingerprint
    members = by_text(image, "x").members
    assert members.shape == (4, 20, 24)
    alone = Segmenter.load(first, **flags)(image, "x").members
    assert_close(members[:2], alone, rtol=0, atol=0)
    assert torch.equal(
        Segmenter.load(str(comma), **flags)(image, "x").members,
        Segmenter.load([comma], **flags)(image, "x").members,
    )
    assert "4 masks" not in str(by_text) and "2 masks a case by ddim" in str(by_text)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"image_size": 32}, "image_size 32, but"),
        ({"plane": "coronal"}, "plane coronal, but"),
        ({"normalise": "minmax"}, "normalise minmax, but"),
        ({"modalities": "a,b,c,d"}, "modalities a,b,c,d, but"),
    ],
    ids=str,
)
def test_weights_must_agree(save: Save, changed: dict[str, Any], text: str) -> None:
    paths = [save("a"), save("b", **changed)]
    with pytest.raises(UserError, match=text) as error:
        Segmenter.load(paths)
    assert str(error.value).startswith(str(paths[1]))


def test_weights_are_not_named_twice_and_exist(save: Save) -> None:
    path = save("a")
    with pytest.raises(UserError, match="twice"):
        Segmenter.load([path, path / "savedmodel.pt"])
    with pytest.raises(UserError, match="there is no file"):
        Segmenter.load(f"{path},nowhere")
    with pytest.raises(UserError, match="no path given"):
        Segmenter.load([])


def test_a_unet_joins_a_diffusion(save: Save) -> None:
    """Flags of the diffusion are not meant for the U-Net, which is not alone."""
    unet, diffusion = save("unet", version="unet"), save("plain", 1)
    own: dict[str, Any] = {"steps": 2, "use_ddim": True, "num_ensemble": 3, "eta": 1.0}
    both = Segmenter.load([unet, diffusion], **own)
    assert both(torch.rand(4, 16, 16), "x").per_weights == (1, 3)
    assert [one.plan.sampler for one in both.networks] == ["direct", "ddim"]
    with pytest.raises(UserError, match="use_ddim True: concerns a diffusion"):
        Segmenter.load(unet, **own)
    several = Segmenter.load([unet, save("other", 2, version="unet")], flip_members=True)
    assert several(torch.rand(4, 16, 16), "x").per_weights == (2, 2)


def test_dropout_needs_weights_trained_with_it(save: Save) -> None:
    """The rate is recorded; weights that do not say it take that of the flags."""
    unet = save("with", version="unet", dropout=0.2)
    own: dict[str, Any] = {"dropout_members": True, "num_ensemble": 4}
    assert len(Segmenter.load(unet, **own)(torch.rand(4, 16, 16), "x").members) == 4
    with pytest.raises(UserError, match=r"contradicts 0\.2"):
        Segmenter.load(unet, **own, dropout=0.3)
    without = save("without", version="unet", dropout=0.0)
    with pytest.raises(UserError, match=r"dropout_members True: .* was trained without dropout"):
        Segmenter.load([unet, without], **own)
    with pytest.raises(UserError, match=r"num_ensemble 4: .* all masks would be equal"):
        Segmenter.load(unet, num_ensemble=4)


def test_guidance_is_not_for_the_direct_answer(save: Save) -> None:
    path = save("a", **DIRECT)
    with pytest.raises(UserError, match=r"mask_guidance 2\.0: says how far the noisy mask"):
        Segmenter.load(path, sampler="direct", mask_guidance=2)


def test_from_the_command_line(save: Save, brats: Path, tmp_path: Path) -> None:
    """Members are numbered over all weights and flips, and the record says what they are of."""
    first, other = save("a"), save("b", 1, version="unet")
    out = tmp_path / "out"
    command = [
        *("--model_path", f"{first},{other}", "--data_dir", brats / "testing", "--out_dir", out),
        *("--steps", 2, "--use_ddim", "True", "--num_ensemble", 2),
        *("--flip_members", "True", "--dropout_members", "True"),
    ]
    text = succeeded(script("segmentation_sample", *command))
    assert f"{first / 'savedmodel.pt'}: " in text and f"{other / 'savedmodel.pt'}: " in text
    rows = read_csv(out / "predictions.csv")
    assert [row["members"] for row in rows] == ["8", "8"]
    assert all(row["within_weights"] and row["between_weights"] for row in rows)
    names = {path.name for path in out.glob("000005_output?.png")}
    assert names == {f"000005_output{index}.png" for index in range(8)}
    assert "2 of 2 cases are finished and kept" in succeeded(
        script("segmentation_sample", *command)
    )
    error = refused(script("segmentation_sample", *command, "--coarse", "mean"))
    assert "has no coarse mask" in error
