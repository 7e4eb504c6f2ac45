"""What the values of masks mean: label maps, soft masks and refusals, decided for the whole set."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import script, succeeded
from PIL import Image

from guided_diffusion.data import masks, volumes
from guided_diffusion.data.advice import mask_notes
from guided_diffusion.data.classes import find_classes
from guided_diffusion.data.datasets import Reading, SegmentationDataset
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_dataset, open_masks
from guided_diffusion.scoring.predictions import Reader, find_predictions

SIZE = (48, 64)
LESION = (slice(8, 16), slice(10, 22))
ELSEWHERE = (slice(30, 40), slice(40, 50))


def marked(*values: float, dtype: type = np.uint8, ground: float = 0) -> np.ndarray:
    """A mask that holds the first value at LESION and the second ELSEWHERE."""
    mask = np.full(SIZE, ground, dtype)
    for place, value in zip((LESION, ELSEWHERE), values, strict=False):
        mask[place] = value
    return mask


def soft(white: float, dtype: type = np.uint8) -> np.ndarray:
    """LESION in ``white``, with a border of one pixel in 30 different greys below a half."""
    mask = np.zeros(SIZE, np.float64)
    rows, columns = LESION
    mask[rows.start - 1 : rows.stop + 1, columns.start - 1 : columns.stop + 1] = 0.5
    ring = np.flatnonzero(mask == 0.5)
    mask.flat[ring] = np.linspace(0.05, 0.45, len(ring))
    mask[LESION] = 1
    return (mask * white).astype(dtype)


def save(path: Path, values: np.ndarray) -> Path:
    """Write values as the ending of the path says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".nii.gz"):
        nib.save(nib.Nifti1Image(values.T, np.diag([-2.0, -2, 3, 1])), path)
    else:
        Image.fromarray(values).save(path)
    return path


def data_set(folder: Path, *labels: np.ndarray | Image.Image, ending: str = ".png") -> Path:
    """Write images of noise and these masks."""
    noise = np.random.default_rng(0).integers(0, 200, SIZE).astype(np.uint8)
    for number, mask in enumerate(labels):
        images = ".nii.gz" if ending == ".nii.gz" else ".png"
        save(folder / f"images/{number:03d}{images}", noise)
        path = folder / f"masks/{number:03d}{ending}"
        path.parent.mkdir(exist_ok=True)
        if isinstance(mask, Image.Image):
            mask.save(path)
        else:
            save(path, mask)
    return folder


def read(folder: Path, text: str = "") -> list[np.ndarray]:
    """The masks of a set, bool [K, H, W], in the orientation in which they were written."""
    dataset = open_dataset(folder, reading=Reading(classes=find_classes(text)))
    return [placed(dataset, index) for index in range(len(dataset))]


def placed(dataset: SegmentationDataset, index: int) -> np.ndarray:
    mask = dataset[index].mask
    assert mask is not None
    found = mask.numpy() >= 0.5
    return found if found.shape[-2:] == SIZE else found.swapaxes(-1, -2)


def only(*places: tuple[slice, slice]) -> np.ndarray:
    found = np.zeros((1, *SIZE), bool)
    for place in places:
        found[0][place] = True
    return found


# ---------------------------------------------------------------------------- label maps


@pytest.mark.parametrize("ending", [".png", ".tif", ".bmp", ".nii.gz"])
@pytest.mark.parametrize("values", [(1, 2), (1, 4), (127, 255), (85, 170), (100, 100), (40, 3)])
def test_every_label_above_0_is_foreground(
    tmp_path: Path, ending: str, values: tuple[int, int]
) -> None:
    data_set(tmp_path, marked(*values), marked(values[1]), marked(), ending=ending)
    both, one, none = read(tmp_path)
    assert (both == only(LESION, ELSEWHERE)).all() and (one == only(LESION)).all()
    assert not none.any()


def test_masks_of_0_and_1_and_of_0_and_255_are_read_side_by_side(tmp_path: Path) -> None:
    data_set(tmp_path, marked(1), marked(255), marked(255, 255).astype(bool), marked())
    assert [mask.sum() for mask in read(tmp_path)] == [96, 96, 196, 0]


@pytest.mark.parametrize(
    ("one", "other"), [(marked(1, 255), marked(1)), (marked(1, 2), marked(255))]
)
def test_a_label_beside_white_is_refused_and_can_be_named(
    tmp_path: Path, one: np.ndarray, other: np.ndarray
) -> None:
    data_set(tmp_path, one, other)
    with pytest.raises(
        UserError, match=r"masks together 0, 1, (2, )?255: neither labels|0, 1, 255"
    ):
        read(tmp_path)
    assert (read(tmp_path, "lesion=1+255,other=2")[0][0] == (np.isin(one, (1, 255)))).all()


def test_indices_of_colours_are_labels(tmp_path: Path) -> None:
    picture = Image.fromarray(marked(1, 255))
    coloured = picture.copy()
    coloured.putpalette([value for n in range(256) for value in (n, 255 - n, 7)])
    assert coloured.mode == "P"
    data_set(tmp_path, coloured, coloured)
    assert (read(tmp_path)[0] == only(LESION, ELSEWHERE)).all()


@pytest.mark.parametrize("place", [LESION, (slice(1, 47), slice(1, 63))])
def test_a_palette_of_greys_is_read_by_its_greys(
    tmp_path: Path, place: tuple[slice, slice]
) -> None:
    mask = np.zeros(SIZE, np.uint8)
    mask[place] = 255
    grey, colour = Image.fromarray(mask), Image.fromarray(mask).convert("RGB")
    white_first = Image.fromarray((mask == 0).astype(np.uint8))
    white_first.putpalette([255, 255, 255, 0, 0, 0])
    adaptive = colour.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    data_set(tmp_path, grey.quantize(2), adaptive, white_first)
    assert all((found[0] == (mask > 0)).all() for found in read(tmp_path))


# ---------------------------------------------------------------------------- soft masks


@pytest.mark.parametrize(
    ("white", "dtype", "ending"),
    [
        (255, np.uint8, ".png"),
        (65535, np.uint16, ".png"),
        (1, np.float32, ".tif"),
        (1, np.float32, ".nii.gz"),
        (255, np.int16, ".nii.gz"),
        (100, np.int16, ".nii.gz"),
        (200, np.uint8, ".png"),
    ],
)
def test_soft_borders_are_cut_half_way(
    tmp_path: Path, white: int, dtype: type, ending: str
) -> None:
    border = soft(white, dtype)
    data_set(tmp_path, border, marked(white, dtype=dtype), marked(dtype=dtype), ending=ending)
    first, second, none = read(tmp_path)
    assert (first == only(LESION)).all() and (second == only(LESION)).all() and not none.any()


def test_noise_of_jpeg_is_no_label(tmp_path: Path) -> None:
    data_set(tmp_path, *(marked(255, white) for white in (0, 255, 0)), ending=".jpg")
    for found, places in zip(
        read(tmp_path), [[LESION], [LESION, ELSEWHERE], [LESION]], strict=True
    ):
        assert (found != only(*places)).mean() < 0.01


def test_labels_blurred_by_jpeg_are_refused(tmp_path: Path) -> None:
    corner = marked()
    corner[:4, :4] = 85
    corner[20:28, 20:28] = 255
    data_set(tmp_path, corner, corner, ending=".jpg")
    with pytest.raises(UserError, match="neither labels"):
        read(tmp_path)


def test_numbered_objects_are_refused_however_few(tmp_path: Path) -> None:
    objects = np.zeros(SIZE, np.uint16)
    objects[4:44, 20] = np.arange(40) * 5 + 5
    data_set(tmp_path, objects, ending=".tif")
    assert (objects > 0).mean() < 0.02
    with pytest.raises(UserError, match="holds 0 to 200, 41 values: neither labels"):
        read(tmp_path)


def test_dark_grey_below_all_of_white_is_background(tmp_path: Path) -> None:
    data_set(tmp_path, marked(235, ground=16), marked(235, 235, ground=16))
    assert [mask.sum() for mask in read(tmp_path)] == [96, 196]


# ------------------------------------------------------------------------------ refusals


def photo(low: float = 0, high: float = 255, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(1).uniform(low, high, SIZE).astype(dtype)


@pytest.mark.parametrize(
    ("mask", "ending", "values"),
    [
        (photo(), ".png", "0 to 254"),
        (photo(), ".jpg", "0 to 255"),
        (photo(-1024, 1500, np.int16), ".nii.gz", "-1023 to 1499"),
        (marked(-1, dtype=np.int16), ".nii.gz", "-1, 0"),
        (marked(10.92, dtype=np.float32), ".nii.gz", "0, 10.92"),
        (photo(0, 1, np.float32), ".tif", "over 3000|to 0.99"),
    ],
)
def test_images_in_place_of_masks_are_refused(
    tmp_path: Path, mask: np.ndarray, ending: str, values: str
) -> None:
    data_set(tmp_path, mask, mask, ending=ending)
    with pytest.raises(UserError, match=rf"masks/000\{ending}: holds .*({values}).*not an image"):
        read(tmp_path)


@pytest.mark.parametrize("usual", [marked(255), marked(85, 170), soft(255)])
def test_one_image_among_masks_is_refused_alone(tmp_path: Path, usual: np.ndarray) -> None:
    dataset = open_dataset(data_set(tmp_path, usual, photo(), usual, usual))
    for index in (0, 2, 3):
        assert placed(dataset, index)[0][LESION].all() and placed(dataset, index).sum() <= 196
    with pytest.raises(UserError, match=r"masks/001.png: holds .*do not fit the other masks"):
        dataset[1]


def test_a_mask_outside_of_the_sample_is_held_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "SAMPLE", 2)
    folder = data_set(tmp_path, marked(1, 2), marked(255), marked(1), marked(3))
    dataset = open_dataset(folder)
    assert (placed(dataset, 3) == only(LESION)).all()  # another small label
    assert dataset.masks.kind.levels == (0, 1, 2)
    with pytest.raises(UserError, match=r"masks/001.png: holds 0, 255, .*label maps of 0, 1, 2"):
        dataset[1]


def test_soft_masks_outside_of_a_sample_without_borders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "SAMPLE", 1)
    folder = data_set(tmp_path, marked(255), soft(255), marked(1), marked(127))
    dataset = open_dataset(folder)
    assert (placed(dataset, 1) == only(LESION)).all()
    assert (placed(dataset, 3) == only(LESION)).all()
    with pytest.raises(UserError, match=r"masks/002.png: holds 0, 1, which do not fit"):
        dataset[2]


def test_the_sample_is_bounded_and_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{number}" for number in range(1000)]
    looked: list[Path] = []

    def decoded(path: Path) -> masks.StoredLabels:
        looked.append(path)
        return masks.StoredLabels(marked(1))

    assert len(masks.sample(paths, decoded)) == 200 and looked == paths[::5]
    monkeypatch.setattr(masks, "SAMPLED_PIXELS", 50 * SIZE[0] * SIZE[1])
    assert [label.path for label in masks.sample(paths, decoded)] == paths[::20]


def test_planes_of_volumes_are_looked_at_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.zeros((*SIZE, 20), np.uint8)
    labels[LESION] = np.arange(20)
    for side in ("images", "masks"):
        (tmp_path / side).mkdir()
        nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / side / "a.nii.gz")
    dataset = open_dataset(tmp_path)
    assert dataset.masks.kind.levels == tuple(range(20))
    monkeypatch.setattr(volumes, "LABEL_PIXELS", 4 * SIZE[0] * SIZE[1])
    assert open_dataset(tmp_path).masks.kind.levels == (0, 2, 7, 12, 17)


def test_the_decision_goes_to_reading_processes(tmp_path: Path) -> None:
    dataset = open_dataset(data_set(tmp_path, marked(127), marked()))
    kind = dataset.masks.kind
    for path in (tmp_path / "masks").iterdir():
        path.unlink()
    assert pickle.loads(pickle.dumps(dataset)).masks.kind == kind


# ------------------------------------------------------------------- label 0, and warnings


@pytest.mark.parametrize("ending", [".png", ".nii.gz"])
def test_label_0_can_be_named(tmp_path: Path, ending: str) -> None:
    """As in REFUGE, whose 0 is the cup, 128 the rim of the disc and 255 the background."""
    data_set(tmp_path, marked(0, 128, ground=255), ending=ending)
    assert (read(tmp_path, "0") == only(LESION)).all()
    cup, rim = read(tmp_path, "0,128")[0]
    assert (cup == only(LESION)[0]).all() and (rim == only(ELSEWHERE)[0]).all()
    cup, disc = read(tmp_path, "cup=0,disc=0+128")[0]
    assert (disc == only(LESION, ELSEWHERE)[0]).all() and cup.sum() == 96


def test_label_0_is_written_as_a_free_number() -> None:
    for text, values in (("0", (1,)), ("0,128", (1, 128)), ("cup=0,disc=0+1", (2, 1))):
        classes = find_classes(text)
        assert classes is not None and find_classes(str(classes)) == classes
        assert classes.values == values


@pytest.mark.parametrize(
    ("mask", "text", "said"),
    [
        (marked(0, 128, ground=255), "", r"cover 97% .* hold 0, 128, 255\); .* --mask_labels 0"),
        (marked(), "", r"all masks are empty \(2 masks looked at, which hold 0\)"),
        (marked(9), "3", r"all masks are empty .* hold 0, 9.* --mask_labels"),
    ],
)
def test_masks_of_nearly_all_or_nothing_are_warned_of(
    tmp_path: Path, mask: np.ndarray, text: str, said: str
) -> None:
    reading = Reading(classes=find_classes(text))
    (note,) = mask_notes(open_dataset(data_set(tmp_path, mask, mask), reading=reading))
    assert re.search(said, note)


def test_usual_masks_are_not_warned_of(tmp_path: Path) -> None:
    assert mask_notes(open_dataset(data_set(tmp_path, marked(255), marked()))) == []


def test_check_and_training_say_the_same(tmp_path: Path) -> None:
    folder = data_set(tmp_path / "set", marked(ground=255), marked(ground=255))
    said = succeeded(script("check_data", "--data_dir", folder))
    assert "\nread as    label maps of 255\n" in said
    assert "warning    the masks cover 100% of their images in the median" in said


# -------------------------------------------------------------------------------- BraTS


def brats(folder: Path, cases: dict[str, tuple[int, ...]], names: tuple[str, str]) -> Path:
    """Volumes of four planes, whose labels lie in squares of 24 voxels on each plane."""
    for case, found in cases.items():
        labels = np.zeros((24, 20, 4), np.uint8)
        for place, label in enumerate(found):
            labels[2 + 5 * place : 6 + 5 * place, 4:10, 1] = label
        for name, values in ((names[0], labels * 3.0), (names[1], labels * 2.0), ("seg", labels)):
            path = folder / case / f"{case}-{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1, 1, 1])), path)
    return folder


def areas(folder: Path, text: str = "WT,TC,ET") -> list[list[int]]:
    """The area of each class in the plane with a tumour, by case."""
    dataset = open_dataset(folder, reading=Reading(classes=find_classes(text)))
    cases = [dataset[dataset.names.index(name)] for name in dataset.names if name.endswith("001")]
    return [
        [int(channel.sum()) for channel in case.mask] for case in cases if case.mask is not None
    ]


SINCE_2023 = ("t1n", "t2f")
OLDER = ("t1", "flair")


def test_the_resection_cavity_is_no_tumour(tmp_path: Path) -> None:
    cases = {"BraTS-GLI-00005-100": (1, 2, 3, 4), "BraTS-GLI-00008-101": (1, 2, 4)}
    folder = brats(tmp_path, cases, SINCE_2023)
    assert areas(folder) == [[72, 48, 24], [48, 24, 0]]
    assert areas(folder, "") == [[72], [48]]
    assert areas(folder, "tumour=1+2+3,cavity=4") == [[72, 24], [48, 24]]  # named, so kept
    (note,) = mask_notes(open_dataset(folder))
    assert note.startswith("label 4 is left out") and "resection cavity" in note


def test_the_cavity_among_bare_truths(tmp_path: Path) -> None:
    folder = brats(tmp_path / "set", {"BraTS-GLI-00008-101": (1, 2, 4)}, SINCE_2023)
    seg = next(folder.rglob("*-seg.nii.gz"))
    (tmp_path / "truth").mkdir()
    seg.rename(tmp_path / "truth" / "BraTS-GLI-00008-101.nii.gz")
    truths = open_masks(tmp_path / "truth")
    assert sum(truth().sum() for truth in truths.values()) == 48


@pytest.mark.parametrize("enhancing", [3, 4])
def test_either_label_is_the_enhancing_tumour(tmp_path: Path, enhancing: int) -> None:
    folder = brats(tmp_path, {"a": (1, 2, enhancing), "b": (1, 2)}, OLDER)
    assert areas(folder) == [[72, 48, 24], [48, 24, 0]]


def test_both_labels_in_one_set_are_refused(tmp_path: Path) -> None:
    """Slices of one case may hold either, so each is held against the set."""
    folder = brats(tmp_path, {"a": (1, 2, 3), "b": (1, 2, 4)}, OLDER)
    with pytest.raises(UserError, match=r"a-seg.* label 3, and .*b-seg.* label 4, .*ET=3,cavity=4"):
        areas(folder)
    assert areas(folder, "") == [[72], [72]]
    (note,) = mask_notes(open_dataset(folder))
    assert "labels 3 and 4 both occur" in note
    said = script("check_data", "--data_dir", folder, "--mask_labels", "WT,TC,ET")
    assert said.code == 2 and said.out.count("only one of them can be the enhancing") == 1


def test_the_other_label_outside_of_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "SAMPLE", 1)
    folder = brats(tmp_path, {"a": (1, 2, 4), "b": (1, 2, 3)}, OLDER)
    with pytest.raises(UserError, match=r"b-seg.nii.gz: has the label 3, but 4 is the enhancing"):
        areas(folder)


# ------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("ending", [".png", ".nii.gz"])
def test_truths_and_predictions_are_read_alike(tmp_path: Path, ending: str) -> None:
    for case, mask in (("a", marked(85, 170)), ("b", marked(170))):
        save(tmp_path / f"truth/{case}{ending}", mask)
        save(tmp_path / f"found/{case}_mask{ending}", mask)
    truths, found = open_masks(tmp_path / "truth"), find_predictions(tmp_path / "found")
    for case, area in (("a", 196), ("b", 96)):
        source = found[case].fused
        assert source is not None
        assert truths[case]().sum() == Reader()(source).sum() == area
