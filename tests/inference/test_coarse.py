"""The coarse mask of a condition network: how it is trained, joined with the draws, and kept."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.fill import fill
from helpers import refused, script, succeeded
from loops import COARSE_FLAGS, Squares, make_coarse_loop, resumed
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from guided_diffusion.checkpoint import (
    LATEST,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    version_of,
)
from guided_diffusion.data.batches import collate
from guided_diffusion.data.datasets import Case
from guided_diffusion.data.frames import Frame
from guided_diffusion.ensemble import BLENDS, blend_coarse, mean
from guided_diffusion.errors import UserError
from guided_diffusion.inference.drawing import Draws
from guided_diffusion.inference.plan import SamplingPlan
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.losses import COARSE_LOSSES, binary_cross_entropy, soft_dice_loss
from guided_diffusion.nn import Output
from guided_diffusion.script_util import create_model_and_diffusion

VERSIONS = ["new", "1", "2"]


@pytest.fixture(autouse=True)
def _silent(quiet: None) -> None:
    """Nothing is logged."""


@pytest.fixture(autouse=True)
def _narrow(narrow_highway: None) -> None:
    """The tests of the networks themselves use the real widths."""


# ------------------------------------------------------------------------------ losses


HALF = torch.full((1, 1, 2, 2), 0.5)
TRUTH = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
LOG2 = 0.6931472


def test_terms_by_hand() -> None:
    t = torch.tensor([3])
    assert_close(soft_dice_loss(HALF, TRUTH), torch.tensor([1 - 2 / 4]))  # (2*0.5+1)/(2+1+1)
    assert_close(binary_cross_entropy(HALF, TRUTH), torch.tensor([LOG2]))
    terms = COARSE_LOSSES["mse"](HALF, TRUTH, t)
    assert_close(terms, {"coarse": torch.tensor([2.5]), "loss_cal": torch.tensor([0.25])})
    terms = COARSE_LOSSES["none"](HALF, TRUTH, t)
    assert_close(terms, {"coarse": torch.tensor([0.0]), "loss_cal": torch.tensor([0.25])})


def test_every_fifth_time_has_the_anchor_loss() -> None:
    t = torch.arange(11)
    coarse, mask = HALF.repeat(11, 1, 1, 1), TRUTH.repeat(11, 1, 1, 1)
    terms = COARSE_LOSSES["dice_ce"](coarse, mask, t)
    total = 0.5 + 10 * LOG2
    expected = [total if time in (0, 5, 10) else 0.0 for time in range(11)]
    assert_close(terms["coarse"], torch.tensor(expected))
    assert_close(terms["loss_dice"], torch.full((11,), 0.5))
    assert_close(terms["loss_ce"], torch.full((11,), LOG2))


def test_perfect_and_empty_masks() -> None:
    empty = torch.zeros(1, 1, 2, 2)
    assert_close(soft_dice_loss(empty, empty), torch.zeros(1))
    assert_close(soft_dice_loss(TRUTH, TRUTH), torch.zeros(1))
    assert float(binary_cross_entropy(TRUTH, TRUTH)) < 2e-6
    wrong = torch.zeros_like(TRUTH).requires_grad_()
    loss = binary_cross_entropy(wrong, TRUTH) + soft_dice_loss(wrong, TRUTH)
    loss.backward()
    assert loss.isfinite() and wrong.grad is not None and wrong.grad.isfinite().all()


@pytest.mark.parametrize("logit", [-40.0, -20.0, -14.0, 0.0, 14.0])
def test_the_gradient_grows_with_the_error_of_a_pixel(logit: float) -> None:
    """The derivative by the logit is probability - mask, however far the two are apart."""
    logits = torch.full((1, 1, 2, 2), logit).requires_grad_()
    wrong = torch.full((1, 1, 2, 2), float(logit <= 0))
    binary_cross_entropy(logits.sigmoid(), wrong).sum().backward()
    assert_close(logits.grad, (logits.detach().sigmoid() - wrong) / 4, rtol=0.05, atol=1e-3)


def test_classes_are_averaged() -> None:
    coarse, mask = torch.cat([HALF, TRUTH], dim=1), torch.cat([TRUTH, TRUTH], dim=1)
    assert_close(soft_dice_loss(coarse, mask), torch.tensor([0.25]))
    terms = COARSE_LOSSES["mse"](coarse, mask, torch.tensor([0]))
    assert_close(terms["loss_cal"], torch.tensor([1 / 8]))


@pytest.mark.parametrize(
    ("version", "wanted", "resolved"),
    [
        ("plain", "auto", "none"),
        ("new", "auto", "mse"),
        ("1", "auto", "mse"),
        ("new", "dice_ce", "dice_ce"),
        ("1", "none", "none"),
    ],
)
def test_what_auto_means(version: str, wanted: str, resolved: str) -> None:
    with torch.device("meta"):
        _, diffusion = create_model_and_diffusion(
            **COARSE_FLAGS, version=version, coarse_loss=wanted
        )
    assert diffusion.coarse_loss == resolved


def test_a_plain_network_has_no_coarse_loss() -> None:
    with pytest.raises(UserError, match="--coarse_loss mse: the plain network has no coarse mask"):
        create_model_and_diffusion(**COARSE_FLAGS, coarse_loss="mse")


def test_the_terms_are_added_to_those_of_the_diffusion() -> None:
    """Only the diffusion's loss is weighted by timestep; the mask is in {0, 1}."""
    _, diffusion = create_model_and_diffusion(**COARSE_FLAGS, version="new")
    x0, t = 2 * TRUTH - 1, torch.tensor([7])
    outputs = {coarse is None: Output(torch.zeros_like(x0), coarse) for coarse in (None, HALF)}
    terms = {
        key: diffusion.training_losses(
            lambda *_, output=output: output, x0, t, eps=torch.zeros_like(x0), condition=None
        )
        for key, output in outputs.items()
    }
    assert terms[True].keys() == {"loss", "mse"}
    assert_close(terms[False]["loss"], terms[True]["loss"])
    assert_close(terms[False]["loss_cal"], torch.tensor([0.25]))
    assert_close(terms[False]["coarse"], torch.tensor([2.5]))


# ------------------------------------------------------------------------------ joining


MEMBERS = torch.tensor([[[1.0, 0.5], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.2]]])
COARSE = torch.tensor([[0.8, 0.6], [0.0, 0.0]])


def test_blends_by_hand() -> None:
    """Supports {1, 1, 0, 0} and {0, 0, 0, 1}: Dice 2 * 1.4 / 3.4 = 0.82 with the coarse, and 0."""
    blended = {rule: blend_coarse(MEMBERS, COARSE, rule) for rule in BLENDS}
    assert torch.equal(blended["none"], MEMBERS)
    assert torch.equal(blended["only"], torch.stack([COARSE, COARSE]))
    halves = 0.5 * (MEMBERS + COARSE)
    assert_close(blended["mean"], halves)
    assert_close(blended["blend"][0], halves[0])
    assert_close(blended["blend"][1], torch.tensor([[0.8, 0.6], [0.0, 0.05]]))
    assert_close(blended["logit"][0, 0, 1], torch.tensor(0.5505103))  # odds sqrt(1 * 1.5)
    assert_close(blended["logit"][0, 1, 1], torch.tensor(0.01))


def test_the_sum_of_the_parents_rule_is_clamped() -> None:
    far = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])
    coarse = torch.tensor([[0.9, 0.0], [0.0, 0.0]])
    blended = blend_coarse(far, coarse, "blend")[0]
    assert_close(blended, torch.tensor([[1.0, 0.25], [0.25, 0.25]]))


def test_each_class_is_joined_alone() -> None:
    members = torch.stack([MEMBERS, MEMBERS.flip(0)], dim=1)
    coarse = torch.stack([COARSE, COARSE])
    joined = blend_coarse(members, coarse, "blend")
    assert torch.equal(joined[:, 0], blend_coarse(MEMBERS, COARSE, "blend"))
    assert torch.equal(joined[:, 1], blend_coarse(MEMBERS.flip(0), COARSE, "blend"))


# ------------------------------------------------------------------------------ sampling


def segmenter_of(version: str, **plan: Any) -> Segmenter:
    net, diffusion = create_model_and_diffusion(**COARSE_FLAGS, version=version)
    levels = tuple(diffusion.schedule.levels([49, 30, 10]))
    settings = {"num_ensemble": 3, "batch_size": 4, **plan}
    fill(net)
    return Segmenter(net, diffusion, frame=Frame(32), plan=SamplingPlan("ddim", levels, **settings))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_coarse_mask_reaches_the_user_at_the_case_s_size(version: str) -> None:
    segmenter = segmenter_of(version)
    image = torch.rand(1, 40, 50, generator=torch.Generator().manual_seed(0))
    result = segmenter(image, "a")
    assert result.coarse is not None and result.coarse.shape == (40, 50)
    assert torch.equal(result.fused, mean(result.members)), "by default nothing is joined"
    fitted = segmenter.frame.fit(Case(image, None, "a")).image
    draws = segmenter.draw_with_coarse(fitted[None], ["a"])
    assert draws.coarse is not None
    for rule in ("blend", "mean", "logit", "only"):
        joined = segmenter_of(version, coarse=rule)(image, "a")
        assert torch.equal(joined.members, result.members)
        assert torch.equal(joined.uncertainty, result.uncertainty)
        at_32 = mean(blend_coarse(draws.members[0], draws.coarse[0], rule, zero=0.5))
        assert_close(joined.fused, segmenter.frame.restore(at_32, (40, 50))[0])
        assert not torch.equal(joined.fused, result.fused)


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_the_parents_rule_applies_at_the_network_s_size_and_range(low: float) -> None:
    """A lesion of 3 x 4 pixels and the like coarse mask agree, however large the picture is.

    Enlarged, the edge of a mask is wider than the mask; and a background that was diffused as -1 is
    above 0 nowhere, though its noise is above -1 everywhere.
    """
    diffusion = create_model_and_diffusion(**COARSE_FLAGS | {"mask_range": f"{low:g},1"})[1]
    segmenter = segmenter_of("new", coarse="blend")
    segmenter.diffusion = diffusion
    truth = torch.zeros(1, 32, 32)
    truth[0, 10:13, 10:14] = 1
    noise = 0.1 * torch.rand(2, 1, 32, 32) if low else torch.zeros(())
    members = (truth + noise).clamp(0, 1).expand(2, -1, -1, -1)
    case = Case(torch.zeros(1, 512, 512), None, "a")
    result = segmenter.finish(case, Draws(members, truth))
    expected = segmenter.frame.restore(mean(0.5 * (truth + members)), (512, 512))[0]
    assert_close(result.fused, expected)


def test_the_highway_of_new_runs_once_a_batch_of_cases() -> None:
    segmenter, calls = segmenter_of("new"), []
    segmenter.net.hwm.register_forward_hook(lambda *_: calls.append(1))
    draws = segmenter.draw_with_coarse(torch.rand(2, 1, 32, 32), ["a", "b"])
    assert len(calls) == 1, "for 6 masks of 3 evaluations each, in two batches"
    assert draws.coarse is not None
    condition = segmenter.net.encode(torch.rand(2, 1, 32, 32))
    assert draws.coarse.shape == condition.coarse.shape


def test_the_coarse_mask_of_1_is_that_of_the_last_evaluation() -> None:
    segmenter, seen = segmenter_of("1", num_ensemble=2), []
    keep = lambda module, given, output: seen.append(output.coarse)  # noqa: E731
    segmenter.net.register_forward_hook(keep)
    draws = segmenter.draw_with_coarse(torch.rand(1, 1, 32, 32), ["a"])
    assert len(seen) == 3 and draws.coarse is not None
    assert_close(draws.coarse[0], seen[-1].mean(0))


# ------------------------------------------------------------------------------ training


@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_trains_highway_and_network(version: str, tmp_path: Path) -> None:
    loop = make_coarse_loop(version, tmp_path)
    before = {name: value.clone() for name, value in loop.net.state_dict().items()}
    batch = collate([Squares()[index] for index in range(4)])
    losses = [float(loop.run_step(batch)) for _ in range(4)]
    assert not [k for k, v in loop.net.state_dict().items() if torch.equal(v, before[k])]
    means = loop.log.means(loop.parameters)
    assert {"loss", "mse", "coarse"} <= means.keys()
    if version == "2":
        anchor = means["loss_dice"] + 10 * means["loss_ce"]
        assert 0 < means["coarse"] < anchor, "at some times only"
    else:
        assert losses[-1] < losses[0]
        assert means["coarse"] == pytest.approx(10 * means["loss_cal"], rel=1e-5)


def test_the_coarse_loss_is_added_without_the_weights_of_timesteps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_coarse_loop("new", tmp_path)
    loop.net.eval()
    terms: list[dict[str, Tensor]] = []
    noted = loop.log.losses
    loop.log.losses = lambda t, given, _: (terms.append(given), noted(t, given))  # type: ignore
    sample = loop.schedule_sampler.sample

    def weighed(count: int) -> tuple[Tensor, Tensor]:
        positions, weights = sample(count)
        return positions, 3 * weights

    monkeypatch.setattr(loop.schedule_sampler, "sample", weighed)
    loss = loop.forward_backward(collate([Squares()[index] for index in range(4)]))
    assert_close(loss, 3 * terms[0]["loss"].mean() + terms[0]["coarse"].mean())


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_coarse_loss_every_gradient_is_still_there(version: str, tmp_path: Path) -> None:
    """Processes that share gradients wait for all of them."""
    loop = make_coarse_loop(version, tmp_path, coarse_loss="none")
    loop.forward_backward(collate([Squares()[index] for index in range(4)]))
    assert all(parameter.grad is not None for parameter in loop.parameters)
    condition = loop.net.condition_net.out if version == "2" else loop.net.hwm.seg_outputs[0]
    head = condition.weight.grad
    assert head is not None and not head.any()


def test_a_step_that_is_skipped_leaves_the_running_statistics(tmp_path: Path) -> None:
    loop = make_coarse_loop("new", tmp_path)
    batch = collate([Squares()[index] for index in range(4)])
    loop.run_step(batch)
    before = {name: value.clone() for name, value in loop.net.state_dict().items()}
    loop.run_step(batch._replace(image=batch.image * torch.nan))
    assert loop.bad_steps == 1
    assert all(torch.equal(value, before[name]) for name, value in loop.net.state_dict().items())


@pytest.mark.parametrize("version", VERSIONS)
def test_resumed_training_of_networks_is_bit_equal(version: str, tmp_path: Path) -> None:
    """Buffers are restored, those of the averages too."""
    at_once = load_checkpoint(make_coarse_loop(version, tmp_path, max_steps=4).run_loop())
    half = make_coarse_loop(version, tmp_path, max_steps=2).run_loop()
    torch.rand(7)
    in_two = load_checkpoint(
        resumed(make_coarse_loop(version, tmp_path, max_steps=4), half).run_loop()
    )
    for one, other in ((at_once.model, in_two.model), (at_once.ema["0.9"], in_two.ema["0.9"])):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    for buffer in (name for name in at_once.model if name.endswith(".running_mean")):
        assert torch.equal(at_once.ema["0.9"][buffer], at_once.model[buffer])
        assert at_once.model[buffer].any()


@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_trains(version: str, tmp_path: Path) -> None:
    loop = make_coarse_loop(version, tmp_path, precision="bf16", microbatch=2)
    batch = collate([Squares()[index] for index in range(4)])
    losses = [float(loop.run_step(batch)) for _ in range(3)]
    assert loop.bad_steps == 0
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------ complete runs


TINY = [
    *("--image_size", 32, "--num_channels", 32, "--channel_mult", "1,2", "--num_res_blocks", 1),
    *("--attention_resolutions", 8, "--num_heads", 1),
]
DIFFUSION = ["--predict_xstart", True, "--mask_range=-1,1", "--diffusion_steps", 100]
FEW = ["--steps", 2, "--num_ensemble", 2]


@pytest.mark.parametrize("version", VERSIONS)
def test_from_images_to_scores(version: str, brats: Path, tmp_path: Path) -> None:
    said = succeeded(
        script(
            "segmentation_train",
            *("--data_dir", brats / "training", "--out_dir", tmp_path, "--version", version),
            *(*TINY, *DIFFUSION, "--batch_size", 2, "--max_steps", 3, "--ema_rate", 0.9),
            *("--val_dir", brats / "training", "--val_cases", 1, "--log_interval", 1),
        )
    )
    assert "val_dice" in said and ("loss_dice" if version == "2" else "loss_cal") in said
    options = load_checkpoint(tmp_path / LATEST).options
    kind = "dice_ce" if version == "2" else "mse"
    assert (options["version"], options["coarse_loss"]) == (version, kind)

    masks = tmp_path / "masks"
    command = ["--model_path", tmp_path, "--data_dir", brats / "testing", "--out_dir", masks, *FEW]
    said = succeeded(script("segmentation_sample", *command, "--coarse", "blend"))
    assert "coarse mask: blend" in said
    assert "<case>_coarse.png, predictions.csv" in said
    coarse = sorted(masks.glob("*_coarse.png"))
    assert len(coarse) == 2
    with Image.open(coarse[0]) as picture:
        assert picture.size == (40, 40)
    scored = ["--inp_pth", masks, "--out_pth", brats / "testing"]
    assert "dice is" in succeeded(script("segmentation_env", *scored))


@pytest.mark.parametrize(
    ("version", "dropped"),
    [
        ("new", ()),
        ("1", ("highway_embedding.",)),
        ("1", ("highway_embedding.", "hwm.conv_trans_blocks_")),
    ],
)
def test_the_version_of_bare_weights_is_inferred(
    version: str, dropped: tuple[str, ...], brats: Path, tmp_path: Path
) -> None:
    net = fill(
        create_model_and_diffusion(
            **{**COARSE_FLAGS, "in_ch": 5, "version": version, "use_scale_shift_norm": True}
        )[0]
    )
    weights = {k: v for k, v in net.state_dict().items() if not k.startswith(dropped or "-")}
    for name in ("out.2.weight", "out.2.bias"):
        weights[name] = torch.cat([weights[name], weights[name]])
    assert version_of(weights) == version
    path = tmp_path / "savedmodel000003.pt"
    kept = {k: nn.Parameter(v, v.is_floating_point()) for k, v in weights.items()}
    torch.save(OrderedDict(kept), path)

    command = ["--model_path", path, "--data_dir", brats / "testing", *TINY, *FEW]
    said = succeeded(script("segmentation_sample", *command, "--out_dir", tmp_path / "a"))
    lacking = [line for line in said.splitlines() if "the weights lack" in line]
    assert len(lacking) == bool(dropped)
    if dropped:
        assert "highway_embedding" in said or "conv_trans_blocks" in said
    succeeded(script("segmentation_sample", *command, "--out_dir", tmp_path / "b"))
    for one in sorted((tmp_path / "a").glob("*.png")):
        assert one.read_bytes() == (tmp_path / "b" / one.name).read_bytes()

    wrong = script(
        "segmentation_sample", *command, "--out_dir", tmp_path / "c", "--version", "plain"
    )
    assert f"--version plain: contradicts {version}" in refused(wrong)


def test_bare_weights_continue_with_their_optimiser_state(tmp_path: Path) -> None:
    """The parents number an optimiser's state by position; ours has parameters in between."""
    before = make_coarse_loop("1", tmp_path, max_steps=2)
    written = load_checkpoint(before.run_loop())
    names = [name for name, _ in before.net.named_parameters()]
    drawn = ("highway_embedding.", "hwm.conv_trans_blocks_")
    lacking = [name for name in names if name.startswith(drawn)]
    kept = [index for index, name in enumerate(names) if name not in lacking]
    state = written.training["optimizer"]["state"]
    theirs = {place_model: state[index] for place_model, index in enumerate(kept)}
    moments = {**written.training["optimizer"], "state": theirs}
    start = type(written)(options={}, step=2, model=written.model, training={"optimizer": moments})
    loop = make_coarse_loop("1", tmp_path, max_steps=3)
    load_weights(loop.net, start.model, "")
    loop.restore(start, missing=lacking)
    for name, parameter in loop.net.named_parameters():
        own = loop.optimizer.state.get(parameter, {})
        if name in lacking:
            assert not own
        else:
            assert_close(own["exp_avg"], state[names.index(name)]["exp_avg"])
    loop.run_loop()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coarse", "blend"], "--coarse blend: the plain network has no coarse mask"),
        (["--version", "new"], "--version new: contradicts plain"),
    ],
)
def test_a_plain_checkpoint_has_no_coarse_mask(
    flags: list[str], message: str, trained: Path, brats: Path, tmp_path: Path
) -> None:
    command = ["--model_path", trained, "--data_dir", brats / "testing", "--out_dir", tmp_path]
    assert message in refused(script("segmentation_sample", *command, *flags))


def test_older_checkpoints_have_no_coarse_loss(trained: Path, tmp_path: Path) -> None:
    old = load_checkpoint(trained / LATEST)
    del old.options["coarse_loss"]
    segmenter = Segmenter.load(save_checkpoint(tmp_path, old))
    assert segmenter.diffusion.coarse_loss == "none"
    assert segmenter(torch.rand(4, 16, 16)).coarse is None
