"""One evaluation without a noisy mask: of a plain U-Net, and of networks with mask dropout."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NETWORK, refused, script, succeeded
from torch import Tensor
from torch.testing import assert_close

from guided_diffusion import Segmenter
from guided_diffusion.checkpoint import LATEST, load_checkpoint, version_of
from guided_diffusion.data.classes import find_classes
from guided_diffusion.data.datasets import Case
from guided_diffusion.data.frames import Frame
from guided_diffusion.ensemble import expected_dice
from guided_diffusion.errors import UserError
from guided_diffusion.gaussian_diffusion import Prediction
from guided_diffusion.inference.drawing import Draws
from guided_diffusion.inference.plan import make_plan
from guided_diffusion.options.segmentation import RunOptions, SamplingOptions
from guided_diffusion.schedule import NoiseLevel
from guided_diffusion.script_util import create_model_and_diffusion

OBJECTIVES: dict[str, list[Any]] = {
    "unet": ["--version", "unet"],
    "dropout": ["--mask_loss", "dice_ce", "--mask_dropout", 0.5, "--input_scale", 0.2],
}
COMMON = [
    *(*NETWORK, "--diffusion_steps", 100, "--noise_schedule", "cosine"),
    *("--batch_size", 2, "--lr", 3e-3, "--ema_rate", "0.9", "--max_steps", 2),
]


@pytest.fixture(scope="module")
def runs(brats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of short runs, named after their objectives. Read only."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in OBJECTIVES.items():
        where = ["--data_dir", brats / "training", "--out_dir", folder / name]
        said = succeeded(script("segmentation_train", *where, *COMMON, *flags))
        assert ("--diffusion_steps has no effect with --version unet" in said) == (name == "unet")
    return folder


def sample(model: Path, brats: Path, out_dir: Path, *flags: object) -> Any:
    where = ["--model_path", model, "--data_dir", brats / "testing", "--out_dir", out_dir]
    return script("segmentation_sample", *where, *flags)


def test_checkpoints_record_the_objective(runs: Path) -> None:
    names = ("version", "mask_loss", "mask_dropout", "input_scale", "predict_xstart", "mask_range")
    recorded = {
        name: [load_checkpoint(runs / name / LATEST).options[key] for key in names]
        for name in OBJECTIVES
    }
    assert recorded == {
        "unet": ["unet", "dice_ce", 1.0, 1.0, True, "-1,1"],
        "dropout": ["plain", "dice_ce", 0.5, 0.2, True, "-1,1"],
    }


def test_a_plain_unet_segments_and_is_scored(runs: Path, brats: Path, tmp_path: Path) -> None:
    said = succeeded(sample(runs / "unet", brats, tmp_path))
    assert "1 mask a case by direct, 1 evaluation each" in said
    pictures = {path.name for path in tmp_path.glob("000005_*.png")}
    ends = ("mask", "output_ens", "output0", "uncertainty", "overlay")
    assert pictures == {f"000005_{end}.png" for end in ends}
    with (tmp_path / "predictions.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["members"] for row in rows] == ["1", "1"]
    assert all(float(row["uncertainty"]) > 0 for row in rows), "its entropy, not its deviation"
    scores = ["--inp_pth", tmp_path, "--out_pth", brats / "testing"]
    assert "2 cases" in succeeded(script("segmentation_env", *scores))
    assert "2 of 2 cases are finished" in succeeded(sample(runs / "unet", brats, tmp_path))


@pytest.mark.parametrize(
    ("model", "flags", "named"),
    [
        ("unet", ["--steps", 5], ["--steps 5", "plain U-Net"]),
        ("unet", ["--diffusion_steps", 50], ["--diffusion_steps 50", "plain U-Net"]),
        ("unet", ["--use_ddim", True], ["--use_ddim True", "--version unet"]),
        ("unet", ["--dpm_solver", True], ["--dpm_solver True", "--version unet"]),
        ("unet", ["--eta", 1], ["--eta 1.0", "--version unet"]),
        ("unet", ["--sampler", "unipc"], ["--sampler unipc", "--version unet"]),
        ("unet", ["--temperature", 2], ["--temperature 2.0", "--version unet"]),
        ("unet", ["--mask_guidance", 2], ["--mask_guidance 2.0", "--version unet"]),
        ("unet", ["--timestep_respacing", "5"], ["--timestep_respacing 5", "--version unet"]),
        ("unet", ["--coarse", "mean"], ["--coarse mean", "unet"]),
        ("unet", ["--mask_loss", "bce"], ["--mask_loss bce", "dice_ce"]),
        ("dropout", ["--sampler", "direct", "--steps", 5], ["--steps 5", "--sampler direct"]),
        (
            "dropout",
            ["--sampler", "direct", "--num_ensemble", 3],
            ["--num_ensemble 3", "--sampler direct"],
        ),
        (
            "dropout",
            ["--sampler", "direct", "--mask_guidance", 2],
            ["--mask_guidance 2.0", "--sampler direct"],
        ),
        ("dropout", ["--input_scale", 1], ["--input_scale 1.0", "0.2"]),
        ("dropout", ["--mask_guidance", -1], ["--mask_guidance -1", "between 0"]),
        ("plain", ["--sampler", "direct"], ["--sampler direct", "--mask_dropout 0.5"]),
        ("plain", ["--mask_guidance", 2], ["--mask_guidance 2.0", "--mask_dropout 0.5"]),
    ],
    ids=str,
)
def test_what_a_network_cannot_do_is_refused(
    model: str,
    flags: list[object],
    named: list[str],
    runs: Path,
    trained: Path,
    brats: Path,
    tmp_path: Path,
) -> None:
    path = trained if model == "plain" else runs / model
    error = refused(sample(path, brats, tmp_path / "out", *flags))
    assert all(text in error for text in named), error
    assert not (tmp_path / "out").exists()


def test_what_has_no_effect_on_the_direct_answer_is_said(
    runs: Path, brats: Path, tmp_path: Path
) -> None:
    given = {"temperature": 3, "order": 3, "use_ddim": True}
    flags = [word for name, value in given.items() for word in (f"--{name}", value)]
    said = succeeded(sample(runs / "dropout", brats, tmp_path, "--sampler", "direct", *flags))
    for name in given:
        assert f"--{name} has no effect with --sampler direct" in said
    one = ["--sampler", "direct"]
    assert "2 of 2 cases are finished" in succeeded(
        sample(runs / "dropout", brats, tmp_path, *one, "--temperature", 2, "--order", 1)
    )


def test_members_spread_while_the_fused_mask_is_the_direct_answer(
    runs: Path, brats: Path, tmp_path: Path
) -> None:
    flags = ["--dpm_solver", True, "--steps", 2, "--num_ensemble", 2]
    guided = ["--mask_guidance", 1.5, "--fusion", "direct"]
    out, alone = tmp_path / "out", tmp_path / "alone"
    said = succeeded(sample(runs / "dropout", brats, out, *flags, *guided))
    assert "mask guidance 1.5, fused by direct" in said
    assert "mask guidance 1.5" in (out / "sampling.json").read_text("utf-8")
    succeeded(sample(runs / "dropout", brats, alone, "--sampler", "direct"))
    for end in ("mask", "output_ens"):
        one, other = (folder / f"000005_{end}.png" for folder in (out, alone))
        assert one.read_bytes() == other.read_bytes()
    assert (out / "000005_output1.png").exists()


def test_bare_weights_of_a_plain_unet_are_recognised(
    runs: Path, brats: Path, tmp_path: Path
) -> None:
    weights, _ = load_checkpoint(runs / "unet" / LATEST).choose("ema")
    assert version_of(weights) == "unet"
    assert version_of(load_checkpoint(runs / "dropout" / LATEST).model) == "plain"
    torch.save(weights, tmp_path / "bare.pt")
    said = succeeded(sample(tmp_path / "bare.pt", brats, tmp_path / "bare", *NETWORK))
    assert "1 mask a case by direct" in said
    succeeded(sample(runs / "unet", brats, tmp_path / "own"))
    one, other = (tmp_path / name / "000005_output_ens.png" for name in ("bare", "own"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", ["unet", "dropout"])
def test_the_class_gives_the_same_masks(name: str, runs: Path, brats: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.load(runs / name, sampler="direct")
    image = torch.rand(4, 20, 24)
    result = segmenter(image, "a")
    assert result.members.shape == (1, 20, 24)
    assert_close(result.fused, result.members[0])
    assert_close(segmenter(image, "b").members, result.members, rtol=0, atol=0)


def test_older_checkpoints_draw_what_they_drew(trained: Path, tmp_path: Path) -> None:
    """They have no objective among their options."""
    held = torch.load(trained / LATEST, weights_only=True)
    for name in ("mask_loss", "mask_dropout", "input_scale"):
        del held["options"][name]
    torch.save(held, tmp_path / LATEST)
    image, flags = torch.rand(4, 40, 40), {"sampler": "ddim", "steps": 2, "num_ensemble": 2}
    one, other = (Segmenter.load(path, **flags) for path in (trained, tmp_path))
    assert one.fingerprint == other.fingerprint
    assert one.diffusion.mask_loss == "mse" and not one.diffusion.mask_dropout
    assert_close(one(image, "a").members, other(image, "a").members, rtol=0, atol=0)


# drawing with networks of random weights


def random_segmenter(
    *, batch_size: int = 8, classes: str = "", network: Mapping[str, Any] = {}, **sampling: Any
) -> Segmenter:
    """A segmenter of a network with random weights, so that its masks differ in every pixel."""
    found = find_classes(classes)
    flags = {
        "image_size": 16,
        "in_ch": 1 + (len(found) if found else 1),
        "num_channels": 32,
        "channel_mult": "1,1",
        "num_res_blocks": 1,
        "attention_resolutions": "8",
        "num_heads": 2,
        "noise_schedule": "cosine",
        "diffusion_steps": 50,
        "mask_loss": "dice_ce",
        "mask_dropout": 0.5,
        "mask_labels": classes,
        **network,
    }
    net, diffusion = create_model_and_diffusion(**flags)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = 0.12 * torch.randn(parameter.shape, generator=generator)
    options = SamplingOptions(**{"num_ensemble": 3, "sampler": "ddim", "steps": 3, **sampling})
    plan = make_plan(options, RunOptions(), diffusion, device=torch.device("cpu"), own=True)
    plan = replace(plan, batch_size=batch_size)
    return Segmenter(net, diffusion, frame=Frame(16), plan=plan, classes=found)


IMAGES = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(5))
NAMES = ("a", "b", "c")


def drawn(segmenter: Segmenter) -> Draws:
    return segmenter.draw_with_coarse(IMAGES, NAMES)


def by_hand(segmenter: Segmenter) -> Tensor:
    """The answers [B, K, 16, 16] to zeros at the last trained timestep."""
    net, diffusion = segmenter.net, segmenter.diffusion
    with torch.inference_mode():
        zeros = torch.zeros(3, net.mask_channels, 16, 16)
        t = torch.full((3,), diffusion.kept[-1])
        raw = net(zeros, t, net.encode(IMAGES)).raw
    if diffusion.mask_loss == "mse":
        return ((raw + 1) / 2).clamp(0, 1)
    if diffusion.exclusive:
        odds = raw.exp()
        return odds / (1 + odds.sum(dim=1, keepdim=True))
    return 1 / (1 + (-raw).exp())


NETWORKS: list[dict[str, Any]] = [
    {},
    {"version": "unet", "mask_dropout": 1.0},
    {"mask_loss": "mse", "predict_xstart": True, "mask_range": "-1,1"},
    {"timestep_respacing": "ddim5"},
    {"input_scale": 0.2},
]


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_the_direct_sampler_is_the_network_called_with_zeros(network: dict[str, Any]) -> None:
    segmenter = random_segmenter(network=network, sampler="direct", steps=0, num_ensemble=1)
    assert segmenter.plan.evaluations == 1
    draws, expected = drawn(segmenter), by_hand(segmenter)
    assert_close(draws.members, expected[:, None])
    assert draws.direct is None and expected.std() > 0.01


@pytest.mark.parametrize("classes", ["", "1,2,4", "WT,TC,ET"])
@pytest.mark.parametrize("network", NETWORKS[::2], ids=str)
def test_fused_directly_the_members_stay(classes: str, network: dict[str, Any]) -> None:
    plain = random_segmenter(classes=classes, network=network)
    segmenter = random_segmenter(classes=classes, network=network, fusion="direct")
    assert plain.diffusion.exclusive == (classes == "1,2,4")
    draws = drawn(segmenter)
    assert_close(draws.members, drawn(plain).members, rtol=0, atol=0)
    assert draws.direct is not None
    assert_close(draws.direct, by_hand(segmenter))
    if plain.diffusion.exclusive and network.get("mask_loss") != "mse":
        assert draws.members.sum(dim=2).max() <= 1 + 1e-5


def test_without_mask_dropout_the_first_answers_are_fused() -> None:
    """They are what one evaluation from the same noise gives."""
    network = {"mask_dropout": 0.0}
    draws = drawn(random_segmenter(network=network, fusion="direct"))
    first: list[Tensor] = []

    def note(x: Tensor, level: NoiseLevel, prediction: Prediction) -> None:
        first.append((prediction.x0 + 1) / 2) if level.t == 49 else None

    random_segmenter(network=network, batch_size=9).draw(IMAGES, NAMES, note)
    assert draws.direct is not None and len(first) == 1
    assert_close(draws.direct, first[0].unflatten(0, (3, 3)).mean(dim=1))
    once = drawn(random_segmenter(network=network, steps=1))
    assert_close(draws.direct, once.members.mean(dim=1))


@pytest.mark.parametrize(("network", "guidance"), [({}, 1.5), ({"mask_dropout": 0.0}, 1.0)])
def test_masks_do_not_depend_on_the_batch(network: dict[str, Any], guidance: float) -> None:
    settings = {"network": network, "fusion": "direct", "mask_guidance": guidance}
    whole = drawn(random_segmenter(batch_size=9, **settings))
    assert whole.direct is not None
    for batch_size in (1, 2, 4):
        part = drawn(random_segmenter(batch_size=batch_size, **settings))
        assert_close(part.members, whole.members)
        assert_close(part.direct, whole.direct)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver++", "unipc"])
def test_without_trust_in_the_noisy_mask_every_member_is_the_direct_answer(sampler: str) -> None:
    segmenter = random_segmenter(sampler=sampler, mask_guidance=0.0)
    draws = drawn(segmenter)
    assert draws.direct is None, "it is not fused"
    assert_close(draws.members, by_hand(segmenter)[:, None].expand(-1, 3, -1, -1, -1))


def test_guidance_mixes_the_logits_of_one_evaluation() -> None:
    def odds(soft: Tensor) -> Tensor:
        return soft.double().logit()

    given = odds(drawn(random_segmenter(steps=1)).members)
    direct = odds(by_hand(random_segmenter()))[:, None]
    guided = odds(drawn(random_segmenter(steps=1, mask_guidance=1.5)).members)
    assert_close(guided, direct + 1.5 * (given - direct), rtol=1e-3, atol=1e-3)
    assert (given - direct).abs().max() > 0.1


def test_classes_that_exclude_each_other_have_the_likelier_one_by_expected_dice() -> None:
    segmenter = random_segmenter(classes="1,2", fusion="expected_dice")
    members = torch.zeros(10, 2, 16, 16)
    members[:3, 0, 0, 0] = members[3:6, 0, 0, 1] = members[6:9, 0, 0, 2] = 1
    members[3:7, 1, 0, 0] = members[7:, 1, 0, 3] = members[:3, 1, 0, 4] = 1
    result = segmenter.finish(Case(torch.zeros(1, 16, 16), None, "a"), Draws(members))
    assert (expected_dice(members)[:, 0, 0] == 0.5).all(), "each class alone would take it"
    assert result.labels[0, :5].tolist() == [2, 1, 1, 2, 2]


def test_a_direct_answer_that_is_not_finite_is_reported() -> None:
    case, members = Case(torch.zeros(1, 16, 16), None, "a"), torch.rand(3, 1, 16, 16)
    direct = torch.full((1, 16, 16), torch.nan)
    with pytest.raises(UserError, match="a: the drawn masks are not finite in fp32"):
        random_segmenter(fusion="direct").finish(case, Draws(members, direct=direct))


def test_a_temperature_keeps_the_likeliest_of_classes_that_exclude_each_other() -> None:
    members = torch.zeros(1, 2, 16, 16)
    members[0, :, 0, 0] = torch.tensor([0.99, 0.999])
    segmenter = random_segmenter(classes="1,2", mask_temperature=0.1)
    result = segmenter.finish(Case(torch.zeros(1, 16, 16), None, "a"), Draws(members))
    assert result.labels[0, 0] == 2
