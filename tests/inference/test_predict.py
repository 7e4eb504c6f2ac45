"""Prediction: what a mask depends on, what is written for a case, and how a run continues."""

from __future__ import annotations

import csv
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import contents
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from guided_diffusion import logger
from guided_diffusion.data.datasets import Case, Entry, SegmentationDataset
from guided_diffusion.data.frames import Frame
from guided_diffusion.dpm_solver import solver_levels
from guided_diffusion.ensemble import disagreement, expected_dice
from guided_diffusion.errors import UserError
from guided_diffusion.inference.cases import draw_or_note
from guided_diffusion.inference.drawing import Draws
from guided_diffusion.inference.plan import SamplingPlan, sampling_levels
from guided_diffusion.inference.predict import segment
from guided_diffusion.inference.record import Record
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.options.segmentation import SamplingOptions
from guided_diffusion.sampling import member_seed
from guided_diffusion.scoring.components import clean, find_components
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.unet import Condition, UNetModel

AFFINE = np.array([[-2.0, 0, 0, 5], [0, -2, 0, 239], [0, 0, 3, 7], [0, 0, 0, 1]])
STEPS = 4

Draw = Callable[[Tensor, Sequence[str]], Tensor]


class CasesInMemory(SegmentationDataset):
    """A data set of cases in memory."""

    layout = "CUSTOM"

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = {case.name: case for case in cases}
        entries = [Entry(case.name, (Path(case.name),), None) for case in cases]
        super().__init__(Path("cases_in_memory"), entries, channels=cases[0].image.shape[0])

    def read_image(self, entry: Entry) -> tuple[Tensor, Any]:
        return self.cases[entry.name].image, self.cases[entry.name].affine

    def read_mask(self, entry: Entry) -> Tensor | None:
        return self.cases[entry.name].mask


def cases_in_memory(
    count: int = 3, size: tuple[int, int] = (16, 16), **parts: Any
) -> CasesInMemory:
    noise = torch.Generator().manual_seed(5)
    return CasesInMemory(
        [
            Case(torch.rand(1, *size, generator=noise), None, f"case{index}")._replace(**parts)
            for index in range(count)
        ]
    )


def random_network(seed: int = 0, **flags: Any) -> tuple[UNetModel, Any]:
    """A network with random weights everywhere, so that its masks differ in every pixel."""
    net, diffusion = create_model_and_diffusion(
        **{
            "image_size": 16,
            "in_ch": 2,
            "num_channels": 32,
            "channel_mult": "1,1",
            "num_res_blocks": 1,
            "attention_resolutions": "8",
            "num_heads": 2,
            "noise_schedule": "cosine",
            "diffusion_steps": 50,
            "predict_xstart": True,
            "mask_range": "-1,1",
            **flags,
        }
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = 0.12 * torch.randn(parameter.shape, generator=generator)
    return net, diffusion


SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("ddpm", {}),
    "ddim": ("ddim", {"eta": 0.0}),
    "ddim, eta 0.5": ("ddim", {"eta": 0.5}),
    "dpm_solver++": ("dpm_solver++", {"order": 2}),
    "dpm_solver++_singlestep": ("dpm_solver++_singlestep", {"order": 3}),
}


def make_segmenter(sampler: str = "ddim", *, frame: Frame | None = None, **plan: Any) -> Segmenter:
    net, diffusion = random_network()
    name, options = SAMPLERS[sampler]
    if name.startswith("dpm"):
        method = "singlestep" if "single" in name else "multistep"
        levels = solver_levels(
            diffusion.schedule,
            STEPS,
            order=options["order"],
            method=method,
            skip_type="time_uniform",
        )
    else:
        levels = diffusion.schedule.levels([49, 30, 15, 3])
    settings = {"num_ensemble": 3, "batch_size": 8, **plan}
    return Segmenter(
        net,
        diffusion,
        frame=frame or Frame(16),
        plan=SamplingPlan(name, tuple(levels), options, **settings),
    )


def drawn(segmenter: Segmenter, dataset: CasesInMemory, order: Sequence[int]) -> dict[str, Tensor]:
    """The members of every case, drawn together in some order."""
    cases = [dataset[index] for index in order]
    members = segmenter.draw(torch.stack([case.image for case in cases]), [c.name for c in cases])
    return {case.name: part for case, part in zip(cases, members, strict=True)}


@pytest.mark.parametrize(
    "other",
    [
        {"num_heads": 1},
        {"use_new_attention_order": True},
        {"predict_xstart": False},
        {"mask_range": "0,1"},
        {"rescale_timesteps": True},
    ],
    ids=str,
)
def test_the_fingerprint_depends_on_how_weights_are_read(other: dict[str, Any]) -> None:
    """Otherwise masks of wrong flags would be kept as finished by the corrected command."""
    plan, prints = make_segmenter().plan, []
    for flags in ({}, {}, other):
        net, diffusion = random_network(**flags)
        prints.append(Segmenter(net, diffusion, frame=Frame(16), plan=plan).fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_memory_of_a_failed_draw_is_freed_before_the_retry() -> None:
    """An error's traceback holds the tensors of the call: on a full device the retry would fail."""
    held: list[Any] = []

    def full(indices: Sequence[int]) -> list[int]:
        assert not any(tensor() is not None for tensor in held), "the first try is still in memory"
        tensor = torch.zeros(8)
        held.append(weakref.ref(tensor))
        if len(indices) > 1:
            raise RuntimeError("out of memory")
        return list(indices)

    assert list(draw_or_note(full, [0, 1], cases_in_memory(2).entries, {})) == [(0, 0), (1, 1)]


def test_a_member_that_fills_the_cropped_area_is_full(tmp_path: Path) -> None:
    """The border that was cropped away is background in every mask."""
    segmenter = make_segmenter(frame=Frame(16, crop=4))
    ones = torch.ones(1, 3, 1, 16, 16)
    segmenter.draw_with_coarse = lambda *_: Draws(ones)  # type: ignore[method-assign]
    segment(segmenter, cases_in_memory(1, size=(24, 24)), tmp_path, fingerprint="f")
    (row,) = table(tmp_path / "predictions.csv")
    assert (row["full_members"], row["empty_members"], row["area"]) == ("3", "0", "256")


@pytest.mark.parametrize("skip_type", ["time_uniform", "logSNR", "time_quadratic"])
@pytest.mark.parametrize("respacing", ["ddim50", "500,1", "10,5,5"])
def test_solvers_stay_among_the_trained_times(respacing: str, skip_type: str) -> None:
    """A network trained on some timesteps has not seen more noise than at the largest."""
    diffusion = create_model_and_diffusion(
        image_size=16, num_channels=32, channel_mult="1", timestep_respacing=respacing
    )[1]
    kept, schedule = diffusion.kept, diffusion.schedule
    for steps in (1, 2, 10, 20):
        options = SamplingOptions(steps=steps, skip_type=skip_type)
        levels = sampling_levels(diffusion, "dpm_solver++", options)
        assert len(levels) == steps + 1 and levels[-1].sigma == 0
        assert levels[0].t == pytest.approx(kept[-1])
        assert min(level.t for level in levels[:-1]) >= kept[0]
        for level in levels[:-1]:
            after = min(time for time in kept if time >= level.t - 1e-9)
            before = max(time for time in kept if time <= level.t + 1e-9)
            assert schedule.at(after).log_snr - 1e-9 <= level.log_snr
            assert level.log_snr <= schedule.at(before).log_snr + 1e-9


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("respacing", ["1", "ddim1"])
def test_one_step_starts_at_the_last_time(respacing: str, sampler: str) -> None:
    """The one timestep that these choose is 0, where a mask of noise would be left as it is."""
    diffusion = create_model_and_diffusion(image_size=16, num_channels=32, channel_mult="1")[1]
    one = sampling_levels(diffusion, sampler, SamplingOptions(), respacing=respacing)
    assert one == sampling_levels(diffusion, sampler, SamplingOptions(steps=1))
    assert one[0].t == diffusion.kept[-1] and one[-1].sigma == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mask_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    segmenter = make_segmenter()
    next(iter(segmenter.net.parameters())).data[0] = value
    with pytest.raises(UserError, match=r"case0.*finite") as error:
        segment(segmenter, cases_in_memory(1), tmp_path, fingerprint="f")
    assert "fp32" in str(error.value) and not list(tmp_path.glob("*.png"))


def test_what_is_done_to_the_fused_mask_is_said() -> None:
    plain = str(make_segmenter())
    assert plain.endswith(", fused by mean, seed 10")
    said = str(make_segmenter(mask_temperature=0.77127, largest=8, fill_holes=True))
    added = ", mask temperature 0.771, largest component, holes filled"
    assert said == plain.replace("fused by mean", f"fused by mean{added}")


def test_temperature_scales_the_noise_a_mask_starts_from() -> None:
    starts = {}
    for temperature in (0.0, 1.0, 2.0):
        seen: list[Tensor] = []
        segmenter = make_segmenter(temperature=temperature)
        members = segmenter.draw(
            torch.ones(1, 1, 16, 16), ["a"], lambda x, level, prediction, seen=seen: seen.append(x)
        )
        starts[temperature] = seen[0]
        assert len(seen) == segmenter.plan.evaluations
        assert bool((members[0, 0] == members[0, 1]).all()) == (temperature == 0)
    torch.testing.assert_close(starts[2.0], 2 * starts[1.0], rtol=0, atol=0)
    assert abs(float(starts[1.0].std()) - 1) < 0.1 and not starts[0.0].any()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _silent(quiet: None) -> None:
    """Nothing is logged."""


# ----------------------------------------------------------------- what a mask depends on


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_mask_depends_on_seed_case_and_member_alone(sampler: str) -> None:
    dataset = cases_in_memory()
    alone = {}
    for index in range(3):
        alone.update(drawn(make_segmenter(sampler, batch_size=8), dataset, [index]))
    for batch_size in (1, 3, 4, 9):
        for order in ((0, 1, 2), (2, 1, 0)):
            together = drawn(make_segmenter(sampler, batch_size=batch_size), dataset, order)
            assert_close(together, alone, rtol=0, atol=2e-4)

    fewer = drawn(make_segmenter(sampler, num_ensemble=1), dataset, [1])
    assert_close(fewer["case1"], alone["case1"][:1], rtol=0, atol=2e-4)

    members = [member for name in alone for member in alone[name]]
    other = drawn(make_segmenter(sampler, seed=11), dataset, [0, 1, 2])
    members += [member for name in other for member in other[name]]
    for index, one in enumerate(members):
        for two in members[:index]:
            assert (one - two).abs().max() > 0.02


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_global_random_state_has_no_effect(sampler: str) -> None:
    segmenter, dataset, results = make_segmenter(sampler), cases_in_memory(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(drawn(segmenter, dataset, [0, 1]))
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(state, torch.get_rng_state())
    assert_close(results[0], results[1], rtol=0, atol=0)


def test_ddim_draws_noise_in_its_steps_only_with_eta() -> None:
    dataset = cases_in_memory(1)
    results = [drawn(make_segmenter(name), dataset, [0])["case0"] for name in list(SAMPLERS)[1:3]]
    assert (results[0] - results[1]).abs().max() > 0.02


def test_seeds_of_members() -> None:
    seeds = [
        member_seed(seed, name, member)
        for seed in (0, 1, 10, -1)
        for name in ("a", "a/1", "1", "01", "b" * 300)
        for member in range(12)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert member_seed(10, "000246", 0) == 9120619459775418110  # for ever


def test_the_image_matters() -> None:
    segmenter = make_segmenter()
    one = segmenter.draw(cases_in_memory(1)[0].image[None], ["same name"])
    two = segmenter.draw(cases_in_memory(2)[1].image[None], ["same name"])
    assert (one - two).abs().max() > 0.02


def test_members_come_in_order_and_range() -> None:
    members = make_segmenter(clip=None, num_ensemble=2).draw(torch.rand(3, 1, 16, 16), "abc")
    assert members.shape == (3, 2, 1, 16, 16) and members.dtype == torch.float32
    assert members.min() >= 0 and members.max() <= 1
    assert members.device.type == "cpu"


# ------------------------------------------------------------------------- what is computed


def test_nothing_keeps_a_graph_and_dropout_is_off() -> None:
    segmenter = make_segmenter()
    assert not segmenter.net.training
    members = segmenter.draw(torch.rand(2, 1, 16, 16, requires_grad=True), ["a", "b"])
    assert members.grad_fn is None and not members.requires_grad
    (result,) = segmenter.segment([cases_in_memory(1)[0]])
    assert not any(part.requires_grad for part in result[:3])
    assert all(parameter.grad is None for parameter in segmenter.net.parameters())


@pytest.mark.parametrize(
    ("cases", "members", "batch_size", "calls"),
    [
        (4, 2, 4, 2 * STEPS),  # E B / batch
        (4, 2, 8, 1 * STEPS),
        (3, 5, 5, 3 * STEPS),
        (2, 5, 5, 2 * STEPS),
        (2, 5, 2, 2 * 3 * STEPS),  # a case of 5 in batches of 2: three of them
        (1, 1, 8, 1 * STEPS),
    ],
)
@pytest.mark.parametrize("sampler", ["ddpm", "dpm_solver++"])
def test_the_network_is_called_no_more_than_needed(
    sampler: str, cases: int, members: int, batch_size: int, calls: int, tmp_path: Path
) -> None:
    segmenter = make_segmenter(sampler, num_ensemble=members, batch_size=batch_size)
    inputs: list[int] = []
    encoded: list[Tensor] = []
    encode = segmenter.net.encode

    def spy(image: Tensor) -> Condition:
        encoded.extend(image)
        return encode(image)

    segmenter.net.encode = spy  # type: ignore[method-assign]
    segmenter.net.register_forward_pre_hook(lambda _, args: inputs.append(len(args[0])))
    segment(segmenter, cases_in_memory(cases), tmp_path, fingerprint="f")

    assert len(inputs) == calls
    assert sum(inputs) == cases * members * STEPS
    assert max(inputs) <= batch_size
    assert len(encoded) == cases
    images = sorted(float(cases_in_memory(cases)[index].image.sum()) for index in range(cases))
    assert_close(sorted(float(image.sum()) for image in encoded), images)


# ------------------------------------------------------------------------- files of a case


KINDS = ("output_ens", "mask", "uncertainty", "overlay", "output0", "output1", "output2")


def test_the_files_of_a_case(tmp_path: Path) -> None:
    names = segment(make_segmenter(), cases_in_memory(2), tmp_path / "out", fingerprint="f")
    assert names == ["case0", "case1"]
    assert contents(tmp_path / "out").keys() == {
        "predictions.csv",
        *(f"{name}_{kind}.png" for name in names for kind in KINDS),
    }


def grey(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "L")
        return np.asarray(picture)


@pytest.mark.parametrize(
    ("frame", "size"), [(Frame(16), (33, 21)), (Frame(16, crop=4), (24, 24)), (Frame(16), (16, 16))]
)
def test_pictures_are_at_the_size_of_the_case(
    frame: Frame, size: tuple[int, int], tmp_path: Path
) -> None:
    dataset = cases_in_memory(1, size)
    segmenter = make_segmenter(frame=frame)
    (result,) = segmenter.segment([dataset[0]])
    segment(segmenter, dataset, tmp_path, fingerprint="f")
    pictures = {kind: grey(tmp_path / f"case0_{kind}.png") for kind in KINDS if kind != "overlay"}
    assert all(pixels.shape == size and pixels.dtype == np.uint8 for pixels in pictures.values())
    assert set(np.unique(pictures["mask"])) == {0, 255}

    def levels(values: Tensor) -> np.ndarray:
        return np.rint(255 * values.double().numpy())

    assert result.members.shape == (3, *size)
    for index in range(3):
        assert np.abs(pictures[f"output{index}"] - levels(result.members[index])).max() <= 1
    mean = result.members.mean(0)
    assert np.abs(pictures["output_ens"] - levels(mean)).max() <= 1
    assert np.array_equal(pictures["mask"] == 255, (mean >= 0.5).numpy())
    spread = (result.members - mean).square().mean(0).sqrt()
    assert np.abs(pictures["uncertainty"] - levels(2 * spread)).max() <= 1
    assert pictures["uncertainty"].max() > 20
    with Image.open(tmp_path / "case0_overlay.png") as picture:
        assert picture.mode == "RGB" and picture.width > picture.height
    if frame.crop:
        assert not pictures["output_ens"][:4].any() and not pictures["output_ens"][:, -4:].any()
        assert pictures["output_ens"][4:-4, 4:-4].any()


def test_sizes_may_differ_within_a_set(tmp_path: Path) -> None:
    sizes = [(16, 16), (20, 31), (40, 17)]
    dataset = CasesInMemory([Case(torch.rand(1, *s), None, f"s{i}") for i, s in enumerate(sizes)])
    segment(make_segmenter(num_ensemble=2, batch_size=6), dataset, tmp_path, fingerprint="f")
    for index, size in enumerate(sizes):
        assert grey(tmp_path / f"s{index}_mask.png").shape == size


def test_pictures_have_no_volumes(tmp_path: Path) -> None:
    segment(make_segmenter(), cases_in_memory(1), tmp_path, fingerprint="f")
    assert not list(tmp_path.glob("*.nii.gz"))


def test_nifti_comes_with_the_affine_of_the_input(tmp_path: Path) -> None:
    dataset = cases_in_memory(1, (20, 30), affine=AFFINE)
    (result,) = make_segmenter().segment([dataset[0]])
    segment(make_segmenter(), dataset, tmp_path, fingerprint="f")
    expected = {"output_ens": result.fused, "mask": result.mask, "uncertainty": result.uncertainty}
    assert {path.name for path in tmp_path.glob("*.nii.gz")} == {
        f"case0_{kind}.nii.gz" for kind in expected
    }
    for kind, values in expected.items():
        image = nib.load(tmp_path / f"case0_{kind}.nii.gz")
        assert image.get_data_dtype() == (np.uint8 if kind == "mask" else np.float32)
        assert np.array_equal(image.affine, AFFINE)
        stored = torch.from_numpy(np.asarray(image.dataobj).astype(np.float64))
        assert_close(stored, values.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fusion", ["mean", "vote", "staple", "expected_dice"])
def test_the_fusion_is_that_of_the_plan(fusion: str) -> None:
    (result,) = make_segmenter(fusion=fusion, num_ensemble=5).segment([cases_in_memory(1)[0]])
    votes = (result.members >= 0.5).float().mean(0)
    if fusion == "mean":
        assert_close(result.fused, result.members.mean(0))
    if fusion == "vote":
        assert_close(result.fused, (votes >= 0.5).float())
    if fusion == "staple":
        assert (result.fused[votes == 1] > 0.9).all() and (result.fused[votes == 0] < 0.1).all()
    if fusion == "expected_dice":
        assert_close(result.fused, expected_dice(result.members))
    assert 0 < result.mask.float().mean() < 1


@pytest.mark.parametrize("largest", [4, 8])
def test_the_largest_component_and_its_holes_filled(largest: int) -> None:
    plain = make_segmenter()
    (case,) = [cases_in_memory(1)[0]]
    (before,) = plain.segment([case])
    segmenter = make_segmenter(largest=largest, fill_holes=True)
    (after,) = segmenter.segment([case])
    expected = clean(before.mask.numpy(), largest=largest, fill_holes=True)
    assert np.array_equal(after.mask.numpy(), expected) and not after.mask.equal(before.mask)
    same = after.mask == before.mask
    assert_close(after.fused[same], before.fused[same], rtol=0, atol=0.002)
    assert after.members.equal(before.members) and after.uncertainty.equal(before.uncertainty)
    assert segmenter.fingerprint != plain.fingerprint


def test_a_truth_changes_the_overlay_alone(tmp_path: Path) -> None:
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:12, 4:12] = 1
    segment(make_segmenter(), cases_in_memory(1), tmp_path / "without", fingerprint="f")
    segment(make_segmenter(), cases_in_memory(1, mask=mask), tmp_path / "with", fingerprint="f")
    with_truth, without = contents(tmp_path / "with"), contents(tmp_path / "without")
    differing = {name for name in without if with_truth[name] != without[name]}
    assert differing - {"predictions.csv"} == {"case0_overlay.png"}


def test_the_record_of_predictions(tmp_path: Path) -> None:
    segmenter = make_segmenter()
    segment(segmenter, cases_in_memory(3), tmp_path, fingerprint="abc")
    rows = table(tmp_path / "predictions.csv")
    assert [row["name"] for row in rows] == ["case0", "case1", "case2"]
    assert list(rows[0]) == [
        *("name", "members", "area", "component_shares", "empty_members", "full_members"),
        *("disagreement", "uncertainty", "seconds", "fingerprint"),
    ]
    for row in rows:
        case = next(
            case
            for case in map(cases_in_memory(3).__getitem__, range(3))
            if case.name == row["name"]
        )
        (result,) = segmenter.segment([case])
        assert row["members"] == "3" and row["fingerprint"] == "abc"
        found = find_components(result.mask.numpy(), (result.members >= 0.5).numpy(), most=12)
        shares = [float(share) for share in row["component_shares"].split()]
        assert shares == pytest.approx([component.found / 3 for component in found], abs=1e-5)
        assert int(row["area"]) == pytest.approx(int(result.mask.sum()), abs=1)
        assert float(row["uncertainty"]) == pytest.approx(
            float(result.uncertainty.mean()), abs=1e-4
        )
        assert float(row["disagreement"]) == pytest.approx(disagreement(result.members), abs=0.02)
        assert float(row["seconds"]) > 0


def test_the_first_samples_alone(tmp_path: Path) -> None:
    assert segment(
        make_segmenter(), cases_in_memory(3), tmp_path, fingerprint="f", num_samples=2
    ) == [
        "case0",
        "case1",
    ]
    assert [row["name"] for row in table(tmp_path / "predictions.csv")] == ["case0", "case1"]
    names = segment(make_segmenter(), cases_in_memory(3), tmp_path, fingerprint="f", num_samples=9)
    assert len(names) == len(table(tmp_path / "predictions.csv")) == 3


# ------------------------------------------------------------------------------ continuing


class Killed(BaseException):
    """The end of a process."""


class RecordingSegmenter(Segmenter):
    """A segmenter that records which cases it draws, and is killed before one of them."""

    def __init__(self, base: Segmenter, dies_at: str = "") -> None:
        super().__init__(base.net, base.diffusion, frame=base.frame, plan=base.plan)
        self.dies_at = dies_at
        self.drew: list[str] = []

    def segment(self, cases: Sequence[Case], note: Any = None) -> list[Any]:
        self.drew += [case.name for case in cases]
        if self.dies_at in self.drew:
            raise Killed
        return super().segment(cases, note)


def times(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != "predictions.csv"}


def test_finished_cases_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger.configure()
    segment(make_segmenter(), cases_in_memory(3), tmp_path, fingerprint="f", num_samples=2)
    before = times(tmp_path)
    assert "kept" not in capsys.readouterr().out

    recording = RecordingSegmenter(make_segmenter())
    segment(recording, cases_in_memory(3), tmp_path, fingerprint="f")
    assert recording.drew == ["case2"]
    assert "2 of 3 cases are finished and kept" in capsys.readouterr().out
    assert before.items() <= times(tmp_path).items()
    assert len(table(tmp_path / "predictions.csv")) == 3


def test_cases_of_other_settings_are_drawn_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger.configure()
    segment(make_segmenter(), cases_in_memory(2), tmp_path, fingerprint="old")
    before = contents(tmp_path)
    recording = RecordingSegmenter(make_segmenter(seed=11))
    segment(recording, cases_in_memory(2), tmp_path, fingerprint="new")
    assert recording.drew == ["case0", "case1"]
    assert "2 cases of other settings" in capsys.readouterr().out
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after)
    assert {row["fingerprint"] for row in table(tmp_path / "predictions.csv")} == {"new"}


def test_surplus_members_of_an_earlier_run_are_removed(tmp_path: Path) -> None:
    """The members in a folder are what scoring takes for the members of the fused mask."""
    segment(make_segmenter(num_ensemble=5), cases_in_memory(1), tmp_path, fingerprint="five")
    segment(make_segmenter(num_ensemble=2), cases_in_memory(1), tmp_path, fingerprint="two")
    members = {path.name for path in tmp_path.glob("*_output?.png")}
    assert members == {"case0_output0.png", "case0_output1.png"}


@pytest.mark.parametrize("finished", [0, 2, 3])
def test_a_killed_run_continues(finished: int, tmp_path: Path) -> None:
    complete, broken = tmp_path / "complete", tmp_path / "broken"
    one_by_one = make_segmenter(batch_size=3)
    names = segment(one_by_one, cases_in_memory(4), complete, fingerprint="f")
    with pytest.raises(Killed):
        segment(
            RecordingSegmenter(one_by_one, names[finished]),
            cases_in_memory(4),
            broken,
            fingerprint="f",
        )
    if finished:
        rows = table(broken / "predictions.csv")
        assert [row["name"] for row in rows] == names[:finished]

    again = RecordingSegmenter(one_by_one)
    segment(again, cases_in_memory(4), broken, fingerprint="f")
    assert again.drew == names[finished:]
    one, other = contents(complete), contents(broken)
    del one["predictions.csv"], other["predictions.csv"]
    assert one == other


def test_a_run_killed_while_replacing_is_not_mistaken_for_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of a new run must never stand under the fingerprint of an old one."""
    segment(make_segmenter(), cases_in_memory(1), tmp_path, fingerprint="old")
    before = contents(tmp_path)

    def dies(self: Record, row: dict[str, Any]) -> None:
        raise Killed

    monkeypatch.setattr(Record, "add", dies)
    with pytest.raises(Killed):
        segment(make_segmenter(seed=11), cases_in_memory(1), tmp_path, fingerprint="new")
    monkeypatch.undo()
    logger.configure(quiet=True)

    recording = RecordingSegmenter(make_segmenter())
    segment(recording, cases_in_memory(1), tmp_path, fingerprint="old")
    assert recording.drew == ["case0"]
    after = contents(tmp_path)
    del before["predictions.csv"], after["predictions.csv"]
    assert after == before


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError, MemoryError])
def test_a_case_that_fails_is_reported_at_the_end(error: type[Exception], tmp_path: Path) -> None:
    class Choosy(RecordingSegmenter):
        def segment(self, cases: Sequence[Case], note: Any = None) -> list[Any]:
            if any(case.name == "case1" for case in cases):
                raise error("no mask of that.")
            return super().segment(cases, note)

    with pytest.raises(UserError, match=r"1 of the cases: case1: no mask of that\. All others"):
        segment(Choosy(make_segmenter()), cases_in_memory(3), tmp_path, fingerprint="f")
    assert [row["name"] for row in table(tmp_path / "predictions.csv")] == ["case0", "case2"]


def test_files_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save

    def full(self: Image.Image, path: Any, **options: Any) -> None:
        save(self, path, **options)
        Path(path).write_bytes(Path(path).read_bytes()[:40])
        raise OSError(28, "No space left on device")

    segment(make_segmenter(), cases_in_memory(2), tmp_path, fingerprint="f", num_samples=1)
    before = contents(tmp_path)
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"case1_.*\.png: cannot be written .*No space left"):
        segment(make_segmenter(), cases_in_memory(2), tmp_path, fingerprint="f")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["", "name,area\ncase0,12\n", "nonsense\n\n,,\n", "name\ncase0\n"])
def test_a_file_that_is_no_record_keeps_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text(text, "utf-8")
    recording = RecordingSegmenter(make_segmenter())
    segment(recording, cases_in_memory(1), tmp_path, fingerprint="f")
    assert recording.drew == ["case0"]
    (row,) = table(tmp_path / "predictions.csv")
    assert (row["name"], row["fingerprint"]) == ("case0", "f")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    recording = RecordingSegmenter(make_segmenter())
    with pytest.raises(UserError, match=r"--out_dir .*: cannot be written"):
        segment(recording, cases_in_memory(1), tmp_path / "file" / "out", fingerprint="f")
    assert recording.drew == []


def test_a_plan_counts_its_evaluations() -> None:
    plan = make_segmenter().plan
    assert plan.evaluations == STEPS
    assert replace(plan, levels=plan.levels[:1]).evaluations == 0
