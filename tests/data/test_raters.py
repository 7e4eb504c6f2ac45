"""Several masks of each case: found by names, drawn in training, voted on everywhere else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import DIFFUSION, NETWORK, refused, script, succeeded
from PIL import Image
from torch.testing import assert_close

from guided_diffusion.checkpoint import load_checkpoint, recorded_flags
from guided_diffusion.data.augment import Augmentation
from guided_diffusion.data.batches import Batch, training_batches
from guided_diffusion.data.cache import CachedDataset
from guided_diffusion.data.classes import find_classes
from guided_diffusion.data.datasets import Case, Reading, majority
from guided_diffusion.data.frames import Frame, ResizedDataset
from guided_diffusion.data.raters import is_rated
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_dataset, open_masks
from guided_diffusion.scoring.metrics import confusion, dice
from guided_diffusion.tools import phantom_folders
from guided_diffusion.training.validation import agreement_of

CASES = ("img_1", "img_12", "img_2")
FORMS = {
    "a folder each": ("images/{c}.png", "masks_{r}/{c}.png"),
    "named folders": ("img/{c}.png", "rater{r}/{c}_mask.png"),
    "in masks": ("images/{c}.png", "masks/Expert {r}/{c}.png"),
    "numbers in masks": ("images/{c}.png", "masks/{r}/{c}.png"),
    "a folder each case": ("{c}/image.png", "{c}/mask_{r}.png"),
    "labels of a case": ("{c}/image_x.png", "{c}/label{r}_x.png"),
    "beside the image": ("{c}.png", "{c}_mask_{r}.png"),
    "observers": ("{c}.png", "{c}_{r}thHO.png"),
    "numbered": ("images/{c}.png", "masks/{c}_{r}.png"),
    "named": ("images/{c}.png", "masks/{c}_rater{r}.png"),
}


def recognise(folder: Path, *, test: bool = False) -> str:
    return open_dataset(folder, test=test).layout


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def marked(columns: int, value: int = 255) -> np.ndarray:
    """A mask of 4 x 8 whose first columns are marked."""
    mask = np.zeros((4, 8), np.uint8)
    mask[:, :columns] = value
    return mask


def write(folder: Path, form: str = "a folder each", raters: int = 3) -> Path:
    """Three images; of case k, rater r marks k + 2 r + 1 columns of eight."""
    image, mask = FORMS[form]
    for k, case in enumerate(CASES):
        save(folder / image.format(c=case), np.full((4, 8), 40 * k + 40, np.uint8))
        for r in range(raters):
            save(folder / mask.format(c=case, r=r), marked(k + 2 * r + 1))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_raters_are_found_by_names(form: str, tmp_path: Path) -> None:
    folder = write(tmp_path, form)
    assert recognise(folder) == recognise(folder, test=True) == "RATERS"
    dataset = open_dataset(folder)
    assert dataset.names == list(CASES)
    truths = open_masks(folder)
    for k, case in enumerate(dataset):
        assert case.raters is not None and case.mask is not None
        assert (case.raters.sum(dim=(1, 2, 3)) / 4).tolist() == [k + 1, k + 3, k + 5]
        assert_close(case.mask, case.raters[1])
        assert_close(case.image, torch.full((1, 4, 8), (40 * k + 40) / 255))
        truth = truths[case.name]
        assert [float(rater().sum()) / 4 for rater in truth.raters] == [k + 1, k + 3, k + 5]
        assert float(truth().sum()) / 4 == k + 3


@pytest.mark.parametrize("form", ["a folder each", "in masks", "a folder each case", "named"])
def test_masks_of_raters_without_images_are_truths(form: str, tmp_path: Path) -> None:
    for path in write(tmp_path, form).glob(FORMS[form][0].format(c="*")):
        path.unlink()
    shutil.rmtree(tmp_path / "images", ignore_errors=True)
    truths = open_masks(tmp_path)
    assert sorted(truths) == list(CASES)
    assert float(truths["img_12"]().sum()) / 4 == 4
    assert len(truths["img_12"].raters) == 3


@pytest.mark.parametrize(
    "names",
    [
        "images/img_1 images/img_2 masks/img_1 masks/img_2",
        "images/a images/a_1 masks/a masks/a_1",
        "images/a masks/a masks_1/a masks_2/a",
        "ISIC_1 ISIC_2 ISIC_1_Segmentation ISIC_2_Segmentation",
        # Several lesions or classes of one case, each in a file:
        "images/a images/b masks/a_1 masks/a_2 masks/b_1",
        "images/a masks/a_1 masks/a_2",
        "images/a images/b masks/a_EX masks/a_HE masks/b_EX masks/b_HE",
        "images/1 images/2 masks/1/x masks/1/y masks/2/x",
        "1/image 1/mask_0 1/mask_1 2/image 2/mask_0",
        "train/images/a train/masks_1/a train/masks_2/a test/images/b",
        "b(1) b(1)_mask b(1)_mask_1 b(2) b(2)_mask",
        "img_1 img_2 img_3",
    ],
)
def test_usual_names_are_never_taken_for_raters(names: str, tmp_path: Path) -> None:
    for name in names.split():
        save(tmp_path / f"{name}.png", marked(4))
    assert not is_rated(tmp_path)


def test_lidc_slices_know_their_patient(tmp_path: Path) -> None:
    for r in range(4):
        save(tmp_path / f"LIDC-IDRI-0007/nodule-0/mask-{r}/slice-3.png", marked(r))
    save(tmp_path / "LIDC-IDRI-0007/nodule-0/images/slice-3.png", marked(8))
    dataset = open_dataset(tmp_path)
    assert dataset.names == ["LIDC-IDRI-0007_nodule-0_slice-3"]
    assert dataset.patients == ["LIDC-IDRI-0007"]
    assert [path.parent.name for path in dataset.entries[0].raters] == [
        f"mask-{r}" for r in range(4)
    ]


def test_named_sets_may_lack_masks_of_some_raters(tmp_path: Path) -> None:
    folder = write(tmp_path, "a folder each case")
    (folder / "img_2/mask_1.png").unlink()
    with pytest.raises(UserError, match="img_1 below it is one"):
        open_dataset(folder)
    dataset = open_dataset(folder, data_name="raters")
    assert [len(entry.raters) for entry in dataset.entries] == [3, 3, 2]
    (folder / "img_2/mask_0.png").unlink()
    case = open_dataset(folder, data_name="raters")[2]
    assert case.raters is None and case.mask is not None and float(case.mask.sum()) == 4 * 7


def test_problems_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    save(folder / "masks_1/img_2.png", marked(3)[:3])
    with pytest.raises(UserError, match=r"masks_1/img_2.png: the mask is 3 x 8, but .*masks_0"):
        open_dataset(folder)[2]
    for r in range(3):
        (folder / f"masks_{r}/img_2.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 cases have no mask: img_2"):
        open_dataset(folder)
    assert not open_dataset(folder, test=True)[2].mask
    (folder / "images/img_1.png").unlink()
    with pytest.raises(UserError, match=r"1 of 3 cases have no image: img_1"):
        open_dataset(folder, test=True)


def test_parts_are_not_mixed(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / part)
    with pytest.raises(UserError, match=r"holds test, train, which are not mixed"):
        open_dataset(tmp_path, data_name="RATERS")
    assert recognise(tmp_path / "train") == "RATERS"


def test_majority_by_hand() -> None:
    masks = torch.tensor([[1, 1, 0, 0.6], [1, 0, 0, 0], [1, 0, 1, 0.4], [0, 1, 0, 1.0]])
    assert majority(masks[:, None, None], None).flatten().tolist() == [1, 1, 0, 1]
    classes = find_classes("1,2")
    two = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [1, 0]], [[0.0, 0], [1, 1]]])[..., None, :]
    assert majority(two, classes)[:, 0].tolist() == [[0, 0], [1, 0]]
    # Of classes with equally many votes the first; regions that overlap are independent.
    assert majority(two[:2], classes)[:, 0].tolist() == [[1, 1], [0, 0]]
    assert majority(two[:2], find_classes("a=1,b=1+2"))[:, 0].tolist() == [[1, 1], [1, 0]]


def test_classes_of_each_rater(tmp_path: Path) -> None:
    folder = write(tmp_path)
    for r in range(3):
        for case in CASES:
            mask = marked(3, 1)
            mask[:, 3 : 4 + r] = 2
            save(folder / f"masks_{r}/{case}.png", mask)
    reading = Reading(classes=find_classes("core=1,rim=2"))
    case = open_dataset(folder, reading=reading)[0]
    assert case.raters is not None and case.raters.shape == (3, 2, 4, 8)
    assert (case.raters.sum(dim=(2, 3)) / 4).tolist() == [[3, 1], [3, 2], [3, 3]]
    assert case.mask is not None and (case.mask.sum(dim=(1, 2)) / 4).tolist() == [3, 2]


def test_volumes_of_raters_lie_as_the_image(tmp_path: Path) -> None:
    """The second rater's file is stored the other way round."""
    affine = np.diag([-1.0, -1, 1, 1])
    flipped = affine.copy()
    flipped[0] = [1, 0, 0, -5]
    (tmp_path / "images").mkdir()
    nib.save(nib.Nifti1Image(np.zeros((6, 5, 3)), affine), tmp_path / "images/v.nii.gz")
    for r, (own, step) in enumerate(((affine, 1), (flipped, -1), (affine, 1))):
        mask = np.zeros((6, 5, 3), np.uint8)
        mask[: r + 1, :, 1] = 1
        (tmp_path / f"rater{r}").mkdir()
        nib.save(nib.Nifti1Image(mask[::step], own), tmp_path / f"rater{r}/v.nii.gz")
    dataset = open_dataset(tmp_path)
    assert dataset.names == [f"v_slice00{k}" for k in range(3)]
    case = dataset[1]
    assert case.raters is not None and case.mask is not None
    assert case.raters.sum(dim=(1, 2, 3)).tolist() == [5, 10, 15]
    assert torch.equal(case.mask, case.raters[1])
    assert open_masks(tmp_path)["v_slice001"]().sum() == 10


# ------------------------------------------------------------------------------------- training


def drawn(folder: Path, steps: int, first: int = 0, **options: object) -> list[Batch]:
    dataset = ResizedDataset(open_dataset(folder), Frame(8))
    batches = training_batches(dataset, 2, seed=3, first_step=first, **options)  # type: ignore[arg-type]
    found = list(islice(batches, steps))
    batches.close()
    return found


def columns(batch: Batch) -> list[float]:
    assert batch.mask is not None
    return [float(mask.sum()) / 8 for mask in batch.mask]


def test_each_step_draws_one_rater_at_random(tmp_path: Path) -> None:
    batches = drawn(write(tmp_path), 150)
    seen = [(name, n) for b in batches for name, n in zip(b.names, columns(b), strict=True)]
    for k, case in enumerate(CASES):
        counts = [seen.count((case, k + 2 * r + 1)) for r in range(3)]
        assert sum(counts) == 100 and min(counts) > 20


@pytest.mark.parametrize("augmentation", [None, Augmentation()])
@pytest.mark.parametrize("choice", ["random", "mean", "majority"])
def test_draws_are_those_of_the_uninterrupted_run(
    choice: str, augmentation: Augmentation | None, tmp_path: Path
) -> None:
    options = {"rater_choice": choice, "augmentation": augmentation}
    whole = drawn(write(tmp_path), 6, **options)
    for rest in (drawn(tmp_path, 3, 3, **options), drawn(tmp_path, 3, 3, workers=2, **options)):
        for one, other in zip(rest, whole[3:], strict=True):
            assert one.names == other.names and torch.equal(one.image, other.image)
            assert one.mask is not None and other.mask is not None
            assert torch.equal(one.mask, other.mask)


def test_the_mean_is_soft_and_the_majority_is_not(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (mean,), (voted,) = (drawn(folder, 1, rater_choice=c) for c in ("mean", "majority"))
    for name, soft, hard in zip(mean.names, mean.mask, voted.mask, strict=True):
        k = CASES.index(name)
        wanted = torch.zeros(8)
        for r in range(3):
            wanted[: k + 2 * r + 1] += 1 / 3
        assert_close(soft[0], wanted.expand(8, 8))
        assert_close(hard[0], (wanted >= 0.5).float().expand(8, 8))
    (moved,) = drawn(folder, 1, rater_choice="mean", augmentation=Augmentation())
    assert moved.mask is not None
    assert {round(3 * value, 4) for value in moved.mask.unique().tolist()} <= {0, 1, 2, 3}


def test_the_cache_holds_all_raters(tmp_path: Path) -> None:
    framed = ResizedDataset(open_dataset(write(tmp_path / "data")), Frame(8))
    cases = CachedDataset(framed, directory=tmp_path)
    first = [cases[index] for index in range(3)]
    for path in (tmp_path / "data").rglob("*.png"):
        path.unlink()
    for index, case in enumerate(first):
        again = cases[index]
        assert again.raters is not None and case.raters is not None
        assert torch.equal(again.raters, case.raters) and again.raters.shape == (3, 1, 8, 8)
        assert again.raters.dtype == torch.float32


def test_agreement_of_drawn_masks_by_hand() -> None:
    """Members and raters are the same two masks; then one member against two raters."""

    class Result:
        members = torch.from_numpy(np.stack([marked(2, 1), marked(4, 1)])).float()
        classes = None

    raters = torch.stack([Result.members[1], Result.members[0]])[:, None]
    assert agreement_of(raters, Result) == pytest.approx((0, 1))  # type: ignore[arg-type]
    Result.members = Result.members[:1]
    found = agreement_of(raters, Result)  # type: ignore[arg-type]
    assert found == pytest.approx((0.5 - 0.25, (1 + 2 / 3) / 2))


# ------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    phantom_folders.write_brats_slices(
        folder, 3, patients=3, size=40, slices=2, raters=3, training=0.67
    )
    return folder


def test_raters_of_phantoms_lie_beside_their_data_sets(phantoms: Path, tmp_path: Path) -> None:
    entry = open_dataset(phantoms / "testing").entries[0]
    assert entry.mask is not None
    inner = entry.mask.relative_to(phantoms)
    assert entry.raters == tuple(phantoms / f"raters/rater{r}" / inner for r in (1, 2, 3))
    phantom_folders.write_isic(tmp_path, 3, patients=3, size=40, raters=2, training=0.67)
    for folder in (tmp_path, tmp_path / "Train"):
        assert [len(entry.raters) for entry in open_dataset(folder).entries] == [2, 2]
    save(tmp_path / "other/images/ISIC_0000000_Segmentation.png", marked(2))
    save(tmp_path / "other/masks/ISIC_0000000_Segmentation.png", marked(2))
    other = open_dataset(tmp_path / "other", data_name="CUSTOM")
    assert other.entries[0].raters == ()  # of another set, though a rater's mask has this name
    assert not any(t.raters for t in open_masks(tmp_path, raters=False).values())


def test_from_the_check_to_the_score(phantoms: Path, tmp_path: Path) -> None:
    training, testing, run = phantoms / "training", phantoms / "testing", tmp_path / "run"
    said = succeeded(script("check_data", "--data_dir", training, "--image_size", 16))
    pairs = [
        dice(confusion(*(mask.numpy() > 0 for mask in pair)))
        for case in open_dataset(training)
        for pair in combinations(case.raters, 2)
    ]
    agreement = f"mean Dice of two raters {np.mean(pairs):.4f}"
    assert f"raters     3 raters in 4 of 4 cases, {agreement}" in said

    flags = ["--data_dir", training, "--out_dir", run, *NETWORK, *DIFFUSION, "--save_interval", 1]
    flags += ["--batch_size", 2, "--val_dir", testing, "--val_steps", 1]
    once = ["--max_steps", 1, "--rater_choice", "mean"]
    said = succeeded(script("segmentation_train", *flags, *once))
    assert "3 raters in 4 of 4 cases; trained on by --rater_choice mean" in said
    assert "val_energy_distance" in said and "val_dice_best" in said
    checkpoint = load_checkpoint(run / "savedmodel.pt")
    assert checkpoint.options["rater_choice"] == "mean"
    older = {key: value for key, value in checkpoint.options.items() if key != "rater_choice"}
    assert recorded_flags(replace(checkpoint, options=older))["rater_choice"] == "random"
    said = succeeded(script("segmentation_train", *flags, "--max_steps", 2, "--resume", "auto"))
    assert "--rater_choice mean" in said
    more = ["--max_steps", 3, "--resume", "auto", "--rater_choice", "majority"]
    assert "contradicts mean" in refused(script("segmentation_train", *flags, *more))

    masks = run / "masks"
    drawing = ["--sampler", "ddim", "--steps", 1, "--num_ensemble", 2]
    succeeded(
        script(
            "segmentation_sample",
            "--model_path",
            run,
            "--data_dir",
            testing,
            *drawing,
            "--out_dir",
            masks,
        )
    )
    said = succeeded(script("segmentation_env", "--inp_pth", masks, "--out_pth", testing))
    assert "GED to the raters" in said and "best member, raters" in said
    assert "truth: what half of the raters or more mark, of up to 3" in said
    found = json.loads((masks / "summary.json").read_text("utf-8"))
    assert found["scores"]["energy_distance"]["number"] == 2 and found["majority_of"] == 3


def test_a_choice_without_raters_has_no_effect(brats: Path, tmp_path: Path) -> None:
    flags = ["--data_dir", brats / "training", "--out_dir", tmp_path, *NETWORK, *DIFFUSION]
    once = ["--max_steps", 1, "--rater_choice", "mean"]
    said = succeeded(script("segmentation_train", *flags, *once))
    assert "--rater_choice has no effect: no case has several masks" in said


def test_a_case_without_raters_is_as_before() -> None:
    assert Case(torch.zeros(1, 2, 2), None, "a").raters is None
