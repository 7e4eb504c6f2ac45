"""Sampling at scale: several processes, failing cases, constant memory."""

from __future__ import annotations

import copy
import gc
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import (
    DIFFUSION,
    NETWORK,
    contents,
    read_csv,
    refused,
    script,
    succeeded,
    torchrun,
    training,
    two_nodes,
)
from PIL import Image

from guided_diffusion.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from guided_diffusion.data.classes import RECORD
from guided_diffusion.ensemble import UNCERTAINTIES, squared_mean
from guided_diffusion.files import make_folder
from guided_diffusion.inference.drawing import Draws
from guided_diffusion.inference.segmenter import Segmenter
from guided_diffusion.tools import phantom_folders


def sampling(data: Path, model: Path, out: Path) -> list[object]:
    """Flags for three evaluations and three members."""
    return [
        *("--data_dir", data, "--model_path", model, "--out_dir", out),
        *("--dpm_solver", True, "--steps", 3, "--num_ensemble", 3),
    ]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def contains(picture: np.ndarray, part: np.ndarray) -> bool:
    """Say whether a picture [H, W] contains a part [h, w], pixel by pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, part.shape)
    corners = (windows[..., 0, 0] == part[0, 0]) & (windows[..., -1, -1] == part[-1, -1])
    return any(np.array_equal(window, part) for window in windows[corners])


@pytest.fixture(scope="module")
def of_classes(brats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one training step on three declared classes."""
    folder = tmp_path_factory.mktemp("classes") / "run"
    command = [*training(brats, folder), "--mask_labels", "1,2,4", "--max_steps", 1]
    succeeded(script("segmentation_train", *command))
    return folder


@pytest.mark.parametrize(("model", "nodes"), [("trained", 2), ("of_classes", 1)])
def test_processes_draw_the_same_as_one(
    model: str, nodes: int, brats: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    trained = request.getfixturevalue(model)
    one, two = tmp_path / "one", tmp_path / "two"
    succeeded(script("segmentation_sample", *sampling(brats / "training", trained, one)))
    command = ["scripts/segmentation_sample.py", *sampling(brats / "training", trained, two)]
    if nodes == 2:
        said = "".join(two_nodes(2, *command))
    else:
        done = torchrun(2, *command)
        said = done.stdout
        assert done.returncode == 0, done.stderr

    assert [row["name"] for row in read_csv(two / "predictions.csv")] == [
        row["name"] for row in read_csv(one / "predictions.csv")
    ]
    left, right = contents(one), contents(two)
    assert left.keys() == right.keys()
    masks = [name for name in left if name.endswith("_mask.png")]
    members = [name for name in left if re.search(r"_output\d", name)]
    assert (len(masks), len(members)) == (4, 4 * 3 * (3 if model == "of_classes" else 1))
    assert all(left[name] == right[name] for name in {*masks, RECORD} & left.keys())
    for name in members:  # batches of another size round differently
        assert np.abs(pixels(one / name).astype(int) - pixels(two / name)).max() <= 1, name

    assert said.count("cases in") == 1
    again = torchrun(2, *command)
    assert "4 of 4 cases are finished and kept" in again.stdout


def test_two_processes_write_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    phantom_folders.write_brats_volumes(tmp_path, 3, patients=4, size=24, slices=12, training=0.25)
    flags = ("--out_dir", tmp_path / "run", "--max_steps", 1, *NETWORK, *DIFFUSION)
    succeeded(script("segmentation_train", "--data_dir", tmp_path / "training", *flags))
    one, two = tmp_path / "one", tmp_path / "two"
    for out, run in ((one, script), (two, None)):
        line = [*sampling(tmp_path / "testing", tmp_path / "run", out), "--slices", "3:9"]
        if run:
            succeeded(run("segmentation_sample", *line))
        else:
            done = torchrun(2, "scripts/segmentation_sample.py", *line)
            assert done.returncode == 0, done.stderr
    volumes = sorted(path.name for path in one.glob("*.nii.gz"))
    assert len(volumes) == 9 and volumes == sorted(path.name for path in two.glob("*.nii.gz"))
    for name in volumes:
        left, right = (nib.load(folder / name).get_fdata() for folder in (one, two))
        np.testing.assert_allclose(left, right, atol=2e-4)
        if "output_ens" in name:
            assert (left[:, :, 3:9].max(axis=(0, 1)) > 0).all()
    assert not (two / ".slices").exists()


def test_cases_of_other_settings_are_distinguished(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    arguments = sampling(brats / "testing", trained, tmp_path)
    succeeded(script("segmentation_sample", *arguments))
    more = ("--num_samples", 1, "--seed", 3)
    text = succeeded(script("segmentation_sample", *arguments, *more))
    assert "1 case in" in text and "has other settings; it stays" in text
    flags = ("--inp_pth", tmp_path, "--out_pth", brats / "testing")
    assert "warning: these masks were sampled with 2 different settings" in succeeded(
        script("segmentation_env", *flags)
    )


def test_rows_of_a_killed_process_are_not_lost(brats: Path, trained: Path, tmp_path: Path) -> None:
    arguments = sampling(brats / "training", trained, tmp_path)
    succeeded(script("segmentation_sample", *arguments))
    (tmp_path / "predictions.csv").rename(tmp_path / ".predictions-1.csv")
    text = succeeded(script("segmentation_sample", *arguments))
    assert "4 of 4 cases are finished and kept" in text
    assert (
        len(read_csv(tmp_path / "predictions.csv")) == 4
        and not (tmp_path / ".predictions-1.csv").exists()
    )


@pytest.mark.parametrize(("which", "compile"), [(0, ""), (0, "default"), (1, "")])
def test_a_failing_case_does_not_stop_the_others(
    which: int,
    compile: str,
    brats: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(brats / "training", data)
    broken = sorted(data.rglob("*flair*"))[which]
    broken.write_bytes(b"no NIfTI at all")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    arguments = [*sampling(data, trained, out), "--compile", compile]
    message = refused(script("segmentation_sample", *arguments))
    assert "1 of the cases" in message and broken.name in message
    assert len(read_csv(out / "predictions.csv")) == 3

    shutil.copy(brats / "training" / broken.relative_to(data), broken)
    text = succeeded(script("segmentation_sample", *arguments))
    assert (
        "3 of 4 cases are finished and kept" in text and len(read_csv(out / "predictions.csv")) == 4
    )


def test_if_no_case_can_be_read_the_first_error_is_reported(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(brats / "testing", data)
    broken = sorted(data.rglob("*flair*"))
    for file in broken:
        file.write_bytes(b"no NIfTI at all")
    assert broken[0].name in refused(script("segmentation_sample", *sampling(data, trained, out)))


@pytest.mark.parametrize(
    ("levels", "empty", "full", "named"),
    [
        ((0.0, 0.6, 0.6), "1", "2", True),
        ((0.6, 0.6, 0.6), "0", "3", True),
        ((0.0, 0.0, 0.0), "3", "0", False),
    ],
)
def test_empty_and_full_members_are_reported(
    levels: tuple[float, ...],
    empty: str,
    full: str,
    named: bool,
    brats: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flat(self: Segmenter, images: torch.Tensor, names: list[str], note: object) -> Draws:
        members = torch.tensor(levels)[None, :, None, None, None]
        return Draws(members.expand(len(images), 3, 1, *images.shape[-2:]), None)

    monkeypatch.setattr(Segmenter, "draw_with_coarse", flat)
    text = succeeded(script("segmentation_sample", *sampling(brats / "testing", trained, tmp_path)))
    assert ("look at 000005, 000006: some of the members" in text) == named
    assert ("nothing is found in any member of 000005, 000006" in text) == (max(levels) < 0.5)
    assert {
        (row["empty_members"], row["full_members"])
        for row in read_csv(tmp_path / "predictions.csv")
    } == {(empty, full)}


def test_memory_does_not_grow_with_steps(trained: Path) -> None:
    """The memory of tensors alive in the last evaluations is the same for 50 steps as for 5."""
    peaks = []
    for steps in (5, 50):
        segmenter = Segmenter.load(
            trained, sampler="dpm_solver++", steps=steps, num_ensemble=2, batch_size=4
        )
        image = torch.rand(4, 40, 40)
        segmenter(image)
        calls, before = [], live_bytes()

        def last(*_: object, calls: list = calls, steps: int = steps, before: int = before) -> None:
            calls.append(live_bytes() - before if len(calls) >= steps - 2 else 0)

        segmenter.net.register_forward_hook(last)
        segmenter(image)
        peaks.append(max(calls))
        assert len(calls) == steps
    assert 0 < peaks[1] <= 1.05 * peaks[0] + 4096


def live_bytes() -> int:
    """Bytes of all live tensors, after garbage collection."""
    gc.collect()
    return sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor)


def test_a_folder_can_be_made_by_several_threads_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for folder in (tmp_path / str(trial) for trial in range(50)):
            assert set(pool.map(make_folder, [folder] * 8)) == {folder}
            assert not list(folder.iterdir())


def test_from_python(trained: Path, tmp_path: Path) -> None:
    segmenter = Segmenter.load(trained, sampler="unipc", steps=3, num_ensemble=4, seed=3)
    image = torch.rand(4, 30, 20)
    result = segmenter(image.numpy(), name="a")
    assert result.members.shape[0] == 4 and result.members.shape[-2:] == (30, 20)
    assert torch.equal(result.fused, result.members.mean(0))
    assert torch.equal(result.members, segmenter(image, name="a").members)
    assert not torch.equal(result.members, segmenter(image, name="b").members)
    with pytest.raises(Exception, match=r"\[4, H, W\]"):
        segmenter(image[:2])


def test_files_are_scaled_as_in_training(trained: Path, tmp_path: Path) -> None:
    """A file is normalised as the data set was, and an array of raw intensities like the file."""
    pixels = torch.rand(1, 24, 24) * 40 + 3
    nib.save(nib.Nifti1Image(pixels[0].numpy(), np.eye(4)), tmp_path / "a.nii.gz")
    loaded = Segmenter.load(trained, steps=2, num_ensemble=1)
    net = copy.deepcopy(loaded.net)
    net.in_channels = 2
    net.input_blocks[0][0].weight = torch.nn.Parameter(net.input_blocks[0][0].weight[:, 3:])
    segmenter = Segmenter(
        net, loaded.diffusion, frame=loaded.frame, plan=loaded.plan, normalise="minmax"
    )
    scaled = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    expected = segmenter(scaled, name="a").members
    torch.testing.assert_close(segmenter(tmp_path / "a.nii.gz").members, expected)
    torch.testing.assert_close(segmenter(pixels, name="a").members, expected)
    assert not torch.equal(expected, segmenter(scaled / 2, name="a").members)


def test_the_normalisation_of_training_is_used(trained: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(latest_checkpoint(trained))
    for recorded, expected in (("zscore", "zscore"), ("none", "none")):
        options = {**checkpoint.options, "normalise": recorded}
        path = save_checkpoint(tmp_path, replace(checkpoint, options=options))
        assert Segmenter.load(path).normalise == expected


def test_flags_of_the_fused_mask_reach_the_plan(trained: Path) -> None:
    flags = {"fusion": "expected_dice", "largest": "4", "fill_holes": True}
    plan = Segmenter.load(trained, **flags).plan
    assert (plan.fusion, plan.largest, plan.fill_holes) == ("expected_dice", 4, True)
    plan = Segmenter.load(trained).plan
    assert (plan.fusion, plan.largest, plan.fill_holes) == ("mean", 0, False)


def test_squared_mean_by_hand() -> None:
    members = torch.tensor([[[0.0, 1.0, 0.5, 1.0]], [[1.0, 1.0, 0.5, 0.0]]])
    torch.testing.assert_close(squared_mean(members), torch.tensor([[0.25, 1.0, 0.25, 0.25]]))


def test_the_uncertainty_map_is_the_chosen_measure(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    for name, measure in UNCERTAINTIES.items():
        out = tmp_path / name
        arguments = [*sampling(brats / "testing", trained, out), "--uncertainty", name]
        succeeded(script("segmentation_sample", *arguments))
        stacked = [pixels(out / f"000005_output{index}.png") for index in range(3)]
        expected = measure.rule(torch.from_numpy(np.stack(stacked)) / 255) / measure.most
        found = pixels(out / "000005_uncertainty.png") / 255
        np.testing.assert_allclose(found, expected, atol=0.02)
        assert found.max() > 0.05


def test_a_debug_strip_shows_modalities_and_members(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    arguments = [*sampling(brats / "training", trained, tmp_path), "--debug", True]
    said = succeeded(script("segmentation_sample", *arguments, "--num_samples", 1))
    assert "<case>_debug.png, <case>_members.gif, predictions.csv" in said
    (strip,) = tmp_path.glob("*_debug.png")
    name = strip.name.removesuffix("_debug.png")
    shown = pixels(strip)[..., 0]
    for kind in ("output_ens", "output0", "output1", "output2"):
        panel = pixels(tmp_path / f"{name}_{kind}.png").repeat(4, 0).repeat(4, 1)
        assert contains(shown, panel), kind
    assert shown.shape[1] > 4 * 160, "four modalities side by side"


def test_a_compiled_network_draws_the_same(
    brats: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []

    def compile(net: torch.nn.Module, *, mode: str) -> None:
        forward = net.forward
        net.forward = lambda x, *rest, **named: (
            calls.append((mode, len(x))),
            forward(x, *rest, **named),
        )[1]

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    arguments = [*sampling(brats / "training", trained, plain), "--batch_size", 7]
    succeeded(script("segmentation_sample", *arguments))
    assert not calls
    arguments = [*sampling(brats / "training", trained, compiled), "--batch_size", 7]
    text = succeeded(script("segmentation_sample", *arguments, "--compile", "reduce-overhead"))
    assert set(calls) == {("reduce-overhead", 6)}, "one shape, also for the remainder"
    assert "compiled in" in text
    for path in plain.glob("*_output_ens.png"):
        difference = pixels(path).astype(int) - pixels(compiled / path.name)
        assert np.abs(difference).max() <= 1


def test_a_missing_compiler_is_reported(brats: Path, trained: Path, tmp_path: Path) -> None:
    arguments = [*sampling(brats / "testing", trained, tmp_path), "--compile", "default"]

    def broken(*_: object) -> None:
        raise RuntimeError("no C++ compiler\nlong trace")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmenter, "draw", broken)
        patch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
        done = script("segmentation_sample", *arguments)
    error = refused(done)
    assert "--compile: the compiler does not work (no C++ compiler)." in error
    assert "omit --compile" in error
    assert not list(tmp_path.glob("*.png"))


def test_a_case_whose_mask_is_gone_is_segmented_again(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    arguments = sampling(brats / "testing", trained, tmp_path)
    succeeded(script("segmentation_sample", *arguments))
    (tmp_path / "000005_mask.png").unlink()
    text = succeeded(script("segmentation_sample", *arguments))
    assert "1 of 2 cases are finished and kept" in text
    assert (tmp_path / "000005_mask.png").exists()
