"""Own files that were damaged: every file, kind of damage and command ends well or in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from helpers import DIFFUSION, NETWORK, contents, read_csv, refused, script, succeeded, training

from guided_diffusion.checkpoint import LATEST, load_checkpoint
from guided_diffusion.tools import phantom_folders

BINARY = bytes(range(256)) * 40
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) * 3 // 5],
    "binary": lambda _: BINARY,
    "zeros": lambda content: bytes(len(content)),
    "deep": lambda _: b'{"a":' * 100_000,
    "list": lambda _: b"[1, [2], 3]\n",
    "number": lambda _: b"5\n",
    "other types": lambda content: other_types(content),
}


def other_types(content: bytes) -> bytes:
    """JSON of the same names with lists for values, or CSV with words for numbers."""
    try:
        return json.dumps({key: [None] for key in json.loads(content)}).encode()
    except ValueError:
        pass
    try:
        header, *rows = content.decode().splitlines()
    except UnicodeDecodeError:
        return content[:-1] + bytes([content[-1] ^ 255])
    return "\n".join([header, *(",".join(["x"] * len(row.split(","))) for row in rows)]).encode()


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.write_bytes(DAMAGES[kind](content))


def set_aside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.damaged*"))


def untimed(folder: Path) -> dict[str, Any]:
    """The files of a result folder without what depends on the time, and without damaged ones."""
    files: dict[str, Any] = {
        name: content
        for name, content in contents(folder).items()
        if ".damaged" not in name
        and not name.endswith((".csv", "sampling.json", "config.yaml", "report.html"))
    }
    rows = read_csv(folder / "predictions.csv")
    return files | {"rows": [{**row, "seconds": ""} for row in rows]}


# ------------------------------------------------------------------------------------- sampling


@pytest.fixture(scope="module")
def sampled(brats: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """The flags of a sampling of declared classes, and its folder. Read only."""
    folder = tmp_path_factory.mktemp("sampled")
    flags = [*training(brats, folder / "run"), "--mask_labels", "WT,TC,ET", "--max_steps", 1]
    succeeded(script("segmentation_train", *flags))
    sampling = ["--data_dir", brats / "testing", "--model_path", folder / "run"]
    sampling += ["--dpm_solver", True, "--steps", 2, "--num_ensemble", 2]
    succeeded(script("segmentation_sample", *sampling, "--out_dir", folder / "masks"))
    return sampling, folder / "masks"


@pytest.fixture
def masks(sampled: tuple[list[Any], Path], tmp_path: Path) -> Path:
    """A copy of the folder of results."""
    return Path(shutil.copytree(sampled[1], tmp_path / "masks"))


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["predictions.csv", "classes.json", "sampling.json"])
def test_sampling_makes_a_damaged_record_anew(
    name: str, kind: str, sampled: tuple[list[Any], Path], masks: Path
) -> None:
    damage(masks / name, kind)
    said = succeeded(script("segmentation_sample", *sampled[0], "--out_dir", masks))
    assert f"{masks / name} is damaged (" in said
    assert set_aside(masks) == [f"{name}.damaged"]
    assert untimed(masks) == untimed(sampled[1])
    if name == "predictions.csv":
        assert "2 of 2 cases are finished" not in said
    else:
        assert "2 of 2 cases are finished and kept" in said
        note = json.loads((masks / "sampling.json").read_text("utf-8"))
        row = read_csv(masks / "predictions.csv")[0]
        assert note["fingerprint"] == row["fingerprint"]


@pytest.mark.parametrize("kind", ["cut", "binary"])
def test_classes_that_nobody_knows_are_refused(
    kind: str, sampled: tuple[list[Any], Path], masks: Path
) -> None:
    """The results are of other settings, which might be other classes."""
    damage(masks / "classes.json", kind)
    before = contents(masks)
    error = refused(script("segmentation_sample", *sampled[0], "--out_dir", masks, "--seed", 3))
    assert "classes.json: is damaged (" in error and "choose another --out_dir" in error
    assert contents(masks) == before


@pytest.mark.parametrize("name", ["predictions.csv", "classes.json", "sampling.json"])
def test_a_folder_in_the_place_of_a_record_is_refused_before_anything_is_drawn(
    name: str, sampled: tuple[list[Any], Path], masks: Path
) -> None:
    for path in [masks / name, *masks.glob("*_mask.png")]:
        path.unlink()
    (masks / name).mkdir()
    error = refused(script("segmentation_sample", *sampled[0], "--out_dir", masks))
    assert f"{masks / name}: is not a file that can be replaced" in error
    assert not list(masks.glob("*_mask.png"))


@pytest.mark.parametrize("kind", ["empty", "cut", "binary", "zeros"])
@pytest.mark.parametrize("which", ["mask", "output_ens_TC", "output1_ET"])
def test_a_damaged_picture_is_drawn_anew(
    which: str, kind: str, sampled: tuple[list[Any], Path], masks: Path
) -> None:
    path = min(masks.glob(f"*_{which}.png"))
    damage(path, kind)
    said = succeeded(script("segmentation_sample", *sampled[0], "--out_dir", masks))
    case = path.name.removesuffix(f"_{which}.png")
    assert "1 of 2 cases are finished and kept" in said
    assert f"files of {case} are missing or damaged; they are drawn anew" in said
    assert untimed(masks) == untimed(sampled[1])


def test_rows_that_can_be_read_are_kept(sampled: tuple[list[Any], Path], masks: Path) -> None:
    path = masks / "predictions.csv"
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text(lines[0] + lines[1] + lines[2][:20], encoding="utf-8")
    said = succeeded(script("segmentation_sample", *sampled[0], "--out_dir", masks))
    assert "1 of 2 cases are finished and kept" in said
    assert untimed(masks) == untimed(sampled[1])


# -------------------------------------------------------------------------------------- scoring


@pytest.fixture(scope="module")
def scores(
    brats: Path, sampled: tuple[list[Any], Path], tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    """The scores of the undamaged folder."""
    folder = Path(shutil.copytree(sampled[1], tmp_path_factory.mktemp("scored") / "masks"))
    succeeded(script("segmentation_env", "--inp_pth", folder, "--out_pth", brats / "testing"))
    return (folder / "scores.csv").read_bytes()


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["predictions.csv", "classes.json", "sampling.json"])
def test_scoring_is_right_or_refuses(
    name: str, kind: str, brats: Path, masks: Path, scores: bytes
) -> None:
    damage(masks / name, kind)
    command = ["--inp_pth", masks, "--out_pth", brats / "testing", "--report", True]
    if name == "classes.json":
        error = refused(script("segmentation_env", *command))
        assert "classes.json: is damaged (" in error and "--mask_labels" in error
        command += ["--mask_labels", "WT,TC,ET"]
    said = succeeded(script("segmentation_env", *command))
    assert (masks / "scores.csv").read_bytes() == scores
    if name == "predictions.csv" and kind not in ("cut", "other types"):
        assert f"warning: {masks / name}: is damaged (" in said
    if name == "sampling.json" and kind != "other types":
        assert "sampling.json: is damaged (" in (masks / "report.html").read_text("utf-8")
    assert not set_aside(masks)


@pytest.mark.parametrize("kind", ["empty", "cut", "binary", "zeros"])
def test_a_damaged_prediction_is_named(kind: str, brats: Path, masks: Path) -> None:
    path = min(masks.glob("*_output_ens_TC.png"))
    damage(path, kind)
    command = ["--inp_pth", masks, "--out_pth", brats / "testing"]
    error = refused(script("segmentation_env", *command))
    assert f"{path}: cannot be read" in error and "sample into this folder again" in error


@pytest.mark.parametrize("name", ["scores.csv", "summary.json", "comparison.json"])
def test_a_target_of_scoring_that_cannot_be_written_is_refused_first(
    name: str, brats: Path, masks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (masks / name).mkdir()
    read: list[object] = []
    monkeypatch.setattr("guided_diffusion.scoring.evaluate.load_case", read.append)
    out = ["--out_pth", brats / "testing"]
    for flags in (["--inp_pth", masks], ["--compare", masks, masks]):
        error = refused(script("segmentation_env", *flags, *out))
        assert f"{masks / name}: is not a file that can be replaced" in error
    assert not read


# ------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def restarted(
    brats: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Any], Path]:
    """The flags that continue the fixture ``trained`` to step 6, and the folder of 6 steps."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("restarted") / "run"))
    flags = ["--max_steps", 6, "--resume", "auto"]
    succeeded(script("segmentation_train", *training(brats, folder), *flags))
    return flags, folder


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("progress.csv", "progress.json") for kind in DAMAGES),
        *(("log.txt", "binary"), ("curves.png", "empty")),
    ],
)
def test_training_goes_on_and_logs_each_step_once(
    name: str,
    kind: str,
    brats: Path,
    trained: Path,
    restarted: tuple[list[Any], Path],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    damage(folder / name, kind)
    flags, expected = restarted
    succeeded(script("segmentation_train", *training(brats, folder), *flags))
    steps = [row["step"] for row in read_csv(folder / "progress.csv")]
    lines = (folder / "progress.json").read_text("utf-8").splitlines()
    logged = [str(json.loads(line)["step"]) for line in lines]
    assert steps[-1] == logged[-1] == "6"
    for found in (steps, logged):
        assert found == sorted({*found})
        assert found == ["2", "4", "6"] or name.startswith("progress")
    cut = kind == "cut" or (name, kind) in [("progress.json", "empty"), ("progress.json", "deep")]
    named = name.startswith("progress") and not cut
    assert set_aside(folder) == [f"{name}.damaged"] * named
    one, other = (load_checkpoint(at / LATEST) for at in (folder, expected))
    assert all(one.model[key].equal(value) for key, value in other.model.items())


def test_steps_that_are_taken_again_are_logged_once(brats: Path, tmp_path: Path) -> None:
    """A run that is killed after step 4 continues from step 2; then one without a checkpoint."""
    command = [*training(brats, tmp_path), "--log_interval", 1, "--resume", "auto"]
    succeeded(script("segmentation_train", *command, "--max_steps", 4))
    (tmp_path / LATEST).unlink()
    (tmp_path / "savedmodel000002.pt").replace(tmp_path / LATEST)
    with (tmp_path / "progress.csv").open("a", encoding="utf-8") as file:
        file.write("5,0.1")
    with (tmp_path / "progress.json").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    succeeded(script("segmentation_train", *command, "--max_steps", 5))

    def steps() -> Iterator[list[int]]:
        yield [int(row["step"]) for row in read_csv(tmp_path / "progress.csv")]
        lines = (tmp_path / "progress.json").read_text("utf-8").splitlines()
        yield [json.loads(line)["step"] for line in lines]

    assert [*steps()] == [[1, 2, 3, 4, 5]] * 2
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    succeeded(script("segmentation_train", *command, "--max_steps", 2))
    assert [*steps()] == [[1, 2]] * 2
    assert not set_aside(tmp_path)


def test_a_new_run_keeps_the_numbers_of_an_earlier_one(brats: Path, tmp_path: Path) -> None:
    command = [*training(brats, tmp_path), "--max_steps"]
    succeeded(script("segmentation_train", *command, 4))
    before = (tmp_path / "progress.csv").read_bytes()
    succeeded(script("segmentation_train", *command, 2))
    assert (tmp_path / "progress.csv.old").read_bytes() == before
    assert [row["step"] for row in read_csv(tmp_path / "progress.csv")] == ["2"]


def test_validation_joins_the_row_of_its_step(brats: Path, tmp_path: Path) -> None:
    command = [*training(brats, tmp_path), "--max_steps", 4, "--val_cases", 1]
    succeeded(script("segmentation_train", *command, "--val_dir", brats / "testing"))
    rows = read_csv(tmp_path / "progress.csv")
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(row["loss"] and row["val_dice"] for row in rows)


@pytest.mark.parametrize("text", ["name,loss\na,1\n", "step,loss\n2,1,7\n4,2\n", "step,loss\n2,1"])
def test_a_table_of_other_columns_is_set_aside_or_mended(
    text: str, brats: Path, trained: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    (folder / "progress.csv").write_text(text, encoding="utf-8")
    command = [*training(brats, folder), "--max_steps", 6, "--resume", "auto"]
    succeeded(script("segmentation_train", *command))
    rows = read_csv(folder / "progress.csv")
    assert rows[-1]["step"] == "6" and float(rows[-1]["grad_norm"]) > 0
    if not text.endswith("2,1"):  # that one is only cut
        assert (folder / "progress.csv.damaged").read_text("utf-8") == text


# -------------------------------------------------------------------------------------- volumes


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes of 12 slices in testing/, a model in run/, masks of slices 2 to 4 in masks/."""
    folder = tmp_path_factory.mktemp("volumes")
    phantom_folders.write_brats_volumes(folder, 3, patients=2, size=24, slices=12, training=0.5)
    flags = ["--data_dir", folder / "training", "--out_dir", folder / "run", "--max_steps", 1]
    flags += [*NETWORK, *DIFFUSION, "--cache_dir", folder / "cache"]
    succeeded(script("segmentation_train", *flags))
    succeeded(script("segmentation_sample", *of_volumes(folder, folder / "masks", "2:5")))
    return folder


def of_volumes(folder: Path, out: Path, slices: str) -> list[Any]:
    flags = ["--data_dir", folder / "testing", "--model_path", folder / "run", "--out_dir", out]
    flags += ["--dpm_solver", True, "--steps", 2, "--num_ensemble", 2, "--slices", slices]
    return [*flags, "--cache_dir", out.parent / "cache"]


def planes(folder: Path) -> dict[str, np.ndarray]:
    paths = sorted(folder.glob("*.nii.gz"))
    return {path.name: np.asarray(nib.load(path).dataobj) for path in paths}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", ["empty", "cut", "binary", "zeros"])
@pytest.mark.parametrize("which", ["output_ens", "mask", "uncertainty"])
def test_a_damaged_volume_is_drawn_anew(
    which: str, kind: str, volumes: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(volumes / "masks", tmp_path / "masks"))
    path = min(out.glob(f"*_{which}.nii.gz"))
    damage(path, kind)
    said = succeeded(script("segmentation_sample", *of_volumes(volumes, out, "2:5")))
    assert f"{path} is damaged; it is kept as {path.name}.damaged" in said
    assert same(planes(out), planes(volumes / "masks"))
    assert set_aside(out) == [f"{path.name}.damaged"]


def test_slices_of_a_damaged_volume_are_not_taken_for_finished_later(
    volumes: Path, tmp_path: Path
) -> None:
    """The second run draws other slices of it, the third one those that were lost."""
    out = Path(shutil.copytree(volumes / "masks", tmp_path / "masks"))
    damage(min(out.glob("*_mask.nii.gz")), "cut")
    succeeded(script("segmentation_sample", *of_volumes(volumes, out, "6:7")))
    said = succeeded(script("segmentation_sample", *of_volumes(volumes, out, "2:5")))
    assert "are finished" not in said
    found, expected = planes(out), planes(volumes / "masks")
    assert all(np.array_equal(found[k][:, :, 2:5], v[:, :, 2:5]) for k, v in expected.items())


def test_a_volume_damaged_inside_is_refused_and_then_drawn_anew(
    volumes: Path, tmp_path: Path
) -> None:
    """Its length is right, so that only unpacking it shows the damage."""
    out = Path(shutil.copytree(volumes / "masks", tmp_path / "masks"))
    path = min(out.glob("*_output_ens.nii.gz"))
    content = bytearray(path.read_bytes())
    content[-60:-10] = bytes(50)
    path.write_bytes(content)
    error = refused(script("segmentation_sample", *of_volumes(volumes, out, "5:7"))).lower()
    assert "is damaged" in error and "run the same command again" in error
    succeeded(script("segmentation_sample", *of_volumes(volumes, out, "2:7")))
    found, expected = planes(out), planes(volumes / "masks")
    assert all(np.array_equal(found[k][:, :, 2:5], v[:, :, 2:5]) for k, v in expected.items())
    assert all(values[:, :, 5:7].any() for name, values in found.items() if "ens" in name)


@pytest.mark.parametrize("kind", ["empty", "cut", "binary", "zeros"])
def test_a_damaged_waiting_slice_is_drawn_anew(
    kind: str, volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def nothing(_: object) -> None:
        """The run is killed before it."""

    out = tmp_path / "masks"
    with monkeypatch.context() as patch:
        patch.setattr("guided_diffusion.inference.volume_writer.VolumeWriter.write", nothing)
        patch.setattr("guided_diffusion.inference.volume_writer.VolumeWriter.clear", nothing)
        succeeded(script("segmentation_sample", *of_volumes(volumes, out, "2:5")))
    waiting = sorted((out / ".slices").rglob("*.npz"))
    assert len(waiting) == 3
    damage(waiting[1], kind)
    said = succeeded(script("segmentation_sample", *of_volumes(volumes, out, "2:5")))
    assert "2 of 3 cases are finished and kept" in said
    assert same(planes(out), planes(volumes / "masks"))
    assert not (out / ".slices").exists()


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("end", ["json", "nii"])
def test_a_damaged_cache_is_made_anew(end: str, kind: str, volumes: Path, tmp_path: Path) -> None:
    """The source is good, so that nobody is told to restore it."""
    out, cache = tmp_path / "masks", tmp_path / "cache"
    shutil.copytree(volumes / "cache", cache)
    before = contents(cache)
    if (end, kind) == ("nii", "other types"):
        kind = "binary"  # a changed byte can only be seen by reading everything
    damaged = sorted(cache.glob(f"*.{end}"))
    assert damaged
    for path in damaged:
        damage(path, kind)
    succeeded(script("segmentation_sample", *of_volumes(volumes, out, "2:5")))
    assert same(planes(out), planes(volumes / "masks"))
    whole = [path for path in cache.glob("*.nii") if path.read_bytes() in before.values()]
    assert whole, "the copies that were read are whole again"


# --------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("cut", [False, True])
def test_the_numbers_of_slices_are_made_anew_only_before_any_is_cut(
    cut: bool, kind: str, volumes: Path, tmp_path: Path
) -> None:
    command = ["--src", volumes / "training", "--out", tmp_path, "--slices", "2:4"]
    succeeded(script("brats_slices", *command, "--workers", 1))
    before, path = contents(tmp_path), tmp_path / "volumes.json"
    damage(path, kind)
    if not cut:
        for part in ("training", "testing"):
            shutil.rmtree(tmp_path / part, ignore_errors=True)
        succeeded(script("brats_slices", *command, "--workers", 1))
        assert set_aside(tmp_path) == ["volumes.json.damaged"]
        assert json.loads(path.read_bytes()) == json.loads(before["volumes.json"])
        return
    error = refused(script("brats_slices", *command))
    assert f"{path}: is damaged (" in error and "choose another --out" in error
    assert {**contents(tmp_path), "volumes.json": before["volumes.json"]} == before


@pytest.mark.parametrize("kind", ["empty", "cut", "binary", "zeros", "number"])
def test_a_damaged_split_is_refused(kind: str, volumes: Path, tmp_path: Path) -> None:
    command = ["--src", volumes / "training", "--out", tmp_path, "--slices", "2:4"]
    succeeded(script("brats_slices", *command, "--workers", 1))
    damage(tmp_path / "split.txt", kind)
    before = contents(tmp_path)
    assert "split.txt" in refused(script("brats_slices", *command))
    assert contents(tmp_path) == before
