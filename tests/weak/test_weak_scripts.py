"""The weak-supervision scripts: their flags, a complete run of every kind, layouts and errors."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import nibabel as nib
import numpy as np
import pytest
import torch
from golden.fill import fill as fill_weights
from helpers import contents, read_csv, refused, script, succeeded
from PIL import Image
from torch.testing import assert_close

from guided_diffusion.checkpoint import load_checkpoint, save_checkpoint
from guided_diffusion.data.advice import interval_accuracy
from guided_diffusion.data.batches import collate, prepare_images, prepare_labelled_images
from guided_diffusion.data.frames import Frame
from guided_diffusion.data.tumorloader import (
    Pictures,
    SlicedArrays,
    TumourImages,
    held_out,
    patient_of,
)
from guided_diffusion.errors import UserError
from guided_diffusion.layouts import open_dataset, open_masks
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.parser import parse
from guided_diffusion.options.segmentation import dead_flags
from guided_diffusion.options.weak import (
    SAMPLE_IMAGES,
    SEGMENT_WEAKLY,
    TRAIN_CLASSIFIER,
    TRAIN_IMAGES,
    WRITE_ARRAYS,
    ImageDiffusionOptions,
    ImageNetworkOptions,
    SourceOptions,
    WeakOptions,
)
from guided_diffusion.sampling import MemberNoise, member_seed
from guided_diffusion.schedule import CLEAN
from guided_diffusion.scoring import metrics
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion, create_model
from guided_diffusion.tools import phantom_folders, phantoms
from guided_diffusion.unet import UNetModel
from guided_diffusion.weak.guidance import classification_losses
from guided_diffusion.weak.maps import noisy
from guided_diffusion.weak.models import load_classifier, load_image_model
from guided_diffusion.weak.predict import WeakSegmenter
from guided_diffusion.weak.train import accuracy_on, open_labelled

SMALL = ["--img_size", 16, "--num_channels", 32, "--channel_mult", "1,2", "--num_res_blocks", 1]
JUDGE = ["--img_size", 16, "--classifier_width", 32, "--classifier_depth", 1]
SCHEDULE = ["--diffusion_steps", 100, "--noise_schedule", "cosine", "--predict_v", True]
SHORT = ["--batch_size", 2, "--log_interval", 2, "--save_interval", 2, "--ema_rate", "0.5"]


# ------------------------------------------------------------------------------------- flags

PUBLISHED: dict[str, dict[str, list[Any]]] = json.loads(
    (Path(__file__).parents[1] / "golden" / "weak_flags.json").read_text("utf-8")
)
GROUPS = {
    "train_tumor_ddfm": TRAIN_IMAGES,
    "train_2d_ddfm": TRAIN_IMAGES,
    "classifier_tumor_train": TRAIN_CLASSIFIER,
    "classifier_train": TRAIN_CLASSIFIER,
    "image_tumor_sample": SAMPLE_IMAGES,
    "classifier_tumor_sample": SAMPLE_IMAGES,
    "image_p_seg": SEGMENT_WEAKLY,
    "image_p_sample": WRITE_ARRAYS,
}
EVERYWHERE = {"save_dir": "./results/weak", "src_dir": "./data/weak", "img_size": 128}
EVERYWHERE |= {"dataset": "brats", "rescale_timesteps": True, "rescale_learned_sigmas": True}
# Where a default differs from the published one, beyond those; the changelog gives the reasons.
DEVIATIONS: dict[str, dict[str, Any]] = {
    "train_tumor_ddfm": {"workers": -1, "save_interval": 1000},
    "train_2d_ddfm": {"workers": -1, "save_interval": 1000},
    "classifier_tumor_train": {
        **{"workers": -1, "save_interval": 1000, "eval_interval": 0, "batch_size": 8}
    },
    "classifier_train": {
        **{"workers": -1, "save_interval": 1000, "eval_interval": 0, "class_index": 1}
    },
    "image_tumor_sample": {"batch_size": 8},
    "classifier_tumor_sample": {"batch_size": 8, "num_samples": 8, "class_index": -1},
    "image_p_seg": {"batch_size": 8},
    "image_p_sample": {"class_index": 1},
}


def flags_of(name: str) -> dict[str, list[Any]]:
    """Type and default of every spelling of every flag; the first group of two that share one."""
    ours: dict[str, list[Any]] = {}
    for group in GROUPS[name]:
        for entry in fields(group):
            kind = get_type_hints(group)[entry.name].__name__
            value = ["switch" if entry.metadata["switch"] else kind, entry.default]
            for spelling in filter(None, (entry.name, entry.metadata["alias"].lstrip("-"))):
                ours.setdefault(spelling, value)
    return ours


@pytest.mark.parametrize("name", GROUPS)
def test_types_and_defaults_are_the_published_ones(name: str) -> None:
    ours, published = flags_of(name), PUBLISHED[name]
    assert published.keys() - ours.keys() == set()
    differing = {flag: ours[flag][1] for flag, was in published.items() if ours[flag] != was}
    common = {flag: value for flag, value in EVERYWHERE.items() if flag in differing}
    assert differing == common | DEVIATIONS[name]
    assert all(ours[flag][0] == was[0] for flag, was in published.items() if was[1] is not None)


@pytest.mark.parametrize("name", GROUPS)
def test_every_published_flag_is_accepted(name: str) -> None:
    groups = GROUPS[name]
    known = {e.name: e for group in reversed(groups) for e in fields(group)}
    known |= {e.metadata["alias"].lstrip("-"): e for e in list(known.values())}
    texts = {"int": ("7", 7), "float": ("0.5", 0.5), "str": ("text", "text"), "bool": ("t", True)}
    for flag, (kind, _) in PUBLISHED[name].items():
        entry = known[flag]
        text, value = texts.get(kind, ("", True))
        if entry.metadata["choices"]:
            text = value = entry.metadata["choices"][-1]
        words = [f"--{flag}"] if kind == "switch" else [f"--{flag}", text]
        assert parse(groups, words).given == {entry.name: value}
        notes = dead_flags(Flags(groups, {entry.name: value}))
        assert bool(notes) == any(
            e.metadata["dead"] for group in groups for e in fields(group) if e.name == entry.name
        )
    assert parse(SEGMENT_WEAKLY, ["-f", "2", "--guided"]).given == {"fold": 2, "guided": True}
    assert parse(SEGMENT_WEAKLY, ["--guided", "False"]).given == {"guided": False}


# ------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def weak_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of 8 patients, 4 of them healthy; 2 patients validate. Read only."""
    folder = tmp_path_factory.mktemp("weak")
    phantom_folders.write_weak(folder, 3, patients=8, slices=2, size=32, training=0.75)
    return folder


@pytest.fixture
def own_data(weak_data: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms to damage."""
    return Path(shutil.copytree(weak_data, tmp_path / "data"))


def test_phantoms_have_lesions_that_are_not_the_brightest(weak_data: Path) -> None:
    dataset = TumourImages(weak_data / "training")
    assert (len(dataset), sum(dataset.labels.values()), dataset.channels) == (12, 6, 1)
    brighter = []
    for case in map(dataset.__getitem__, range(len(dataset))):
        assert case.label is not None and case.mask is not None
        assert bool(case.mask.any()) == bool(case.label)
        if case.label:
            inside = case.image[0][case.mask[0] > 0.5].median()
            brighter.append(float((case.image[0] > inside).sum() / case.mask.sum()))
    assert min(brighter) > 0.3, "more than the lesion itself is brighter than its median"


def test_lesions_of_phantoms_lie_at_every_height_and_height_does_not_tell_the_class(
    tmp_path: Path,
) -> None:
    said = script("make_phantoms", "--layout", "weak", "--out", tmp_path / "all", "--patients", 60,
                  "--size", 32, "--split", 0.99)  # fmt: skip
    succeeded(said)
    labels = TumourImages(tmp_path / "all" / "training").labels
    heights = np.array([int(name[-3:]) for name in labels])
    ill = np.array([*labels.values()]) == 1
    assert np.ptp(heights[ill]) >= 11  # of 21 slices, of which the brain fills about 17
    assert interval_accuracy(heights, ill) < 0.65


def test_a_healthy_phantom_is_the_patient_without_the_lesion() -> None:
    shape = (32, 32, 21)
    ill, healthy = (phantoms.make_patient(3, 0, shape=shape, healthy=h) for h in (False, True))
    assert ill.labels.any() and not healthy.labels.any()
    assert (ill.level == healthy.level).all()
    far = ill.level < -20
    z = int((ill.labels > 0).sum((0, 1)).argmax())
    change = np.abs(ill.modalities["t2"] - healthy.modalities["t2"])[..., z]
    inside = ill.labels[..., z] > 0
    assert change[inside].mean() > 10 * change[far[..., z]].mean()


def test_patients_and_masks_are_recognised_by_name(weak_data: Path) -> None:
    assert patient_of("brats15_003_013") == "brats15_003"
    assert patient_of("a1_slice7") == "a1"
    assert patient_of("img_13") == patient_of("13") == patient_of("left") == ""
    dataset = open_dataset(weak_data / "validate")
    assert (dataset.layout, sorted(set(dataset.patients))) == (
        "TUMOR",
        ["phantom_007", "phantom_008"],
    )
    truths = open_masks(weak_data / "validate")
    for name, label in TumourImages(weak_data / "validate").labels.items():
        assert bool(truths[name]().any()) == bool(label)


def test_any_size_and_kind_of_picture_in_either_spelling(tmp_path: Path) -> None:
    for name, shape in (("normal", (20, 30)), ("Tumour", (40, 10))):
        folder = tmp_path / "validation" / name
        folder.mkdir(parents=True)
        image = nib.Nifti1Image(np.full(shape, 0.25, np.float32), np.eye(4))
        nib.save(image, folder / f"{name}.nii.gz")
        Image.new("L", shape[::-1], 128).save(folder / f"{name}2.jpg")
    (tmp_path / "validation" / "Tumour" / "Tumour2.jpg").rename(
        tmp_path / "validation" / "Tumour" / "Tumour2.jpeg"
    )
    dataset = TumourImages(tmp_path / "validation", test_flag=True)
    pictures = Pictures(dataset, Frame(16))
    batch = collate([pictures[i] for i in range(4)])
    assert dict(zip(batch.names, batch.label.tolist(), strict=True)) == {
        **{"Tumour": 1, "Tumour2": 1, "normal": 0, "normal2": 0}
    }
    assert_close(batch.image[[0, 2]], torch.full((2, 1, 16, 16), 0.25))
    assert_close(batch.image[[1, 3]], torch.full((2, 1, 16, 16), 128 / 255), atol=0.02, rtol=0)
    assert batch.mask is None and dataset[2].mask is not None and not dataset[2].mask.any()


def test_tumours_alone_can_be_segmented_and_scored(own_data: Path) -> None:
    shutil.rmtree(own_data / "validate" / "normal")
    dataset = open_labelled(SourceOptions(src_dir=str(own_data)), "validation")
    assert set(dataset.labels.values()) == {1}
    assert open_masks(own_data / "validate").keys() == dataset.labels.keys()


def test_masks_are_never_read_for_training_on_labels(own_data: Path) -> None:
    for mask in (own_data / "training" / "seg").iterdir():
        mask.write_bytes(b"no picture")
    pictures = Pictures(TumourImages(own_data / "training", test_flag=True), Frame(16))
    assert all(pictures[i].mask is None for i in range(len(pictures)))


def test_what_is_diffused_and_what_is_its_condition(weak_data: Path) -> None:
    pictures = Pictures(TumourImages(weak_data / "training"), Frame(16))
    batch = collate([pictures[i] for i in range(3)])
    assert prepare_images(batch).y is None
    for lesson in (prepare_images(batch), prepare_labelled_images(batch)):
        assert torch.equal(lesson.x0, batch.image) and lesson.condition.shape == (3, 0, 16, 16)
    assert torch.equal(prepare_labelled_images(batch).y, torch.tensor(pictures.labels[:3]))


@pytest.mark.parametrize(("share", "patients"), [(0.0, 0), (0.01, 1), (0.5, 3)])
def test_whole_patients_are_held_out(weak_data: Path, share: float, patients: int) -> None:
    dataset = TumourImages(weak_data / "training")
    learned, kept = held_out(dataset, share, seed=1)
    sides = [{dataset.patients[i] for i in side} for side in (learned, kept)]
    assert sorted(learned + kept) == list(range(len(dataset)))
    assert len(sides[1]) == patients and not sides[0] & sides[1]


def test_no_class_is_held_out_completely(tmp_path: Path) -> None:
    phantom_folders.write_weak(tmp_path, 3, patients=3, slices=2, size=32, training=1.0)
    dataset = TumourImages(tmp_path / "training")  # patients 1 and 3 are ill, 2 alone is not
    for seed in range(5):
        learned, kept = held_out(dataset, 0.9, seed=seed)
        assert {dataset.labels[dataset.names[i]] for i in learned} == {0, 1}
        assert {dataset.patients[i] for i in kept} < {"phantom_001", "phantom_003"} and kept


# ---------------------------------------------------------------------------- NumPy volumes


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Three volumes of 4 slices; slice z of volume v has the label z, and v in its image."""
    folder = tmp_path / "arrays"
    for v in range(3):
        volume = np.zeros((4, 2, 16, 16), np.float32)
        volume[:, 0, :8] = (v + 1) / 4 if v < 2 else -5
        volume[:, 0, 8:] = 0 if v < 2 else 15
        for z in range(4):
            volume[z, 1, 2 * z : 2 * z + 4] = z if (v, z) != (0, 1) else 9
        (folder / "preprocessed" / "deep").mkdir(parents=True, exist_ok=True)
        np.save(folder / "preprocessed" / "deep" / f"v{v}.npy", volume)
    split = {"train": ["v0.npy"], "val": np.array(["v2.npy"]), "test": ["v1"]}
    (folder / "splits.pkl").write_bytes(pickle.dumps([split, {**split, "train": ["v1.npy"]}]))
    return folder


def test_slices_of_arrays_with_labels_by_class(arrays: Path) -> None:
    dataset = SlicedArrays(arrays, parts=("train", "val"), class_index=1)
    assert dataset.names[::4] == ["v0_slice000", "v2_slice000"]
    labels = [dataset.labels[name] for name in dataset.names]
    assert labels == [0, 0, 0, 0, 0, 1, 0, 0], "label 9 is background"
    assert_close(dataset[0].image[0, ::15, 0], torch.tensor([0.25, 0]))
    assert_close(dataset[4].image[0, ::15, 0], torch.tensor([0.0, 1])), "scaled by its volume"
    assert dataset[5].mask[0, :, 0].tolist() == [0, 0, 1, 1, 1, 1] + 10 * [0]
    both = SlicedArrays(arrays, parts=("test",), fold=1, class_index=2)
    assert [both.labels[name] for name in both.names] == [0, 0, 1, 1], "2 stands for 2 and 3"
    assert [entry.patient for entry in both.entries] == ["v1"] * 4


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("hacked"),))


def test_a_split_file_can_run_nothing(
    arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (arrays / "splits.pkl").write_bytes(pickle.dumps([Malicious()]))
    with pytest.raises(UserError, match=r"splits\.pkl: cannot be read .* could run code"):
        SlicedArrays(arrays, parts=("train",))
    assert not (tmp_path / "hacked").exists()


# -------------------------------------------------------------------------------- complete runs


@pytest.fixture(scope="module")
def weakly_trained(weak_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a diffusion and a classifier of 4 steps each. Read only."""
    folder = tmp_path_factory.mktemp("run")
    common = ["--src_dir", weak_data, "--save_dir", folder, *SCHEDULE, *SHORT]
    succeeded(script("train_tumor_ddfm", *common, *SMALL, "--class_cond", True, "--max_steps", 4))
    said = script("classifier_tumor_train", *common, *JUDGE, "--iterations", 4, "--held_out", 0.2)
    assert "validation on 2 images of 1 patient, held out" in succeeded(said)
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_two_networks_share_a_folder(weakly_trained: Path) -> None:
    for name, own in (("model.pt", "."), ("classifier_model.pt", "classifier")):
        folder = weakly_trained / own
        latest = (folder / "savedmodel.pt").read_bytes()
        assert (weakly_trained / name).read_bytes() == latest
        assert (folder / "savedmodel000004.pt").read_bytes() == latest
        assert [row["step"] for row in read_csv(folder / "progress.csv") if row["loss"]] == [
            "2",
            "4",
        ]
    log = read_csv(weakly_trained / "classifier" / "progress.csv")
    assert all(0 <= float(row["acc@1"]) <= 1 for row in log if row["loss"])
    checked = [float(row["val_accuracy"]) for row in log if row["val_accuracy"]]
    best = load_checkpoint(weakly_trained / "classifier" / "bestmodel.pt")
    assert len(checked) == 2 and best.training["best"]["accuracy"] == max(checked)


def test_training_goes_on_bit_for_bit(
    weakly_trained: Path, weak_data: Path, tmp_path: Path
) -> None:
    common = ["--src_dir", weak_data, "--save_dir", tmp_path, *SCHEDULE, *SHORT]
    for steps in (2, 4):
        more = ["--max_steps", steps, "--resume", "auto"]
        succeeded(script("train_tumor_ddfm", *common, *SMALL, "--class_cond", True, *more))
        more = ["--iterations", steps, "--resume", "auto"]
        succeeded(script("classifier_tumor_train", *common, *JUDGE, *more, "--held_out", 0.2))
    for name in ("model.pt", "classifier_model.pt"):
        ours, complete = (load_checkpoint(folder / name) for folder in (tmp_path, weakly_trained))
        assert ours.step == 4 and ours.options == complete.options
        for part, weights in complete.model.items():
            assert torch.equal(ours.model[part], weights), part


def test_validation_is_accuracy_on_what_is_held_out(weak_data: Path) -> None:
    """By hand: the same noise and times, image by image."""
    pictures = Pictures(TumourImages(weak_data / "training"), Frame(16))
    diffusion = create_gaussian_diffusion(ImageDiffusionOptions(diffusion_steps=100))
    net = create_classifier(image_size=16, num_classes=2, classifier_width=32, classifier_depth=1)
    weights = fill_weights(net).state_dict()
    found = accuracy_on(pictures, net, diffusion, seed=5, batch_size=5)(weights, 0)
    right, loss = [], []
    for i in range(12):
        case = pictures[i]
        x0 = 2 * case.image[None] - 1
        generator = torch.Generator().manual_seed(member_seed(5, case.name, 0))
        eps = torch.randn(x0.shape[1:], generator=generator)[None]
        x = diffusion.schedule.add_noise(x0, torch.tensor([i * 100 // 12]), eps)
        with torch.no_grad():
            logits = net(x, torch.tensor([i * 100 // 12 * 10.0]))[0]
        right.append(float(logits.argmax() == case.label))
        loss.append(float(-logits.log_softmax(0)[case.label]))
    assert found.accuracy == pytest.approx(np.mean(right))
    assert found.loss == pytest.approx(np.mean(loss), rel=1e-4)
    assert 0 < found.accuracy < 1


def test_a_classifier_may_be_trained_on_clean_images() -> None:
    diffusion = create_gaussian_diffusion(ImageDiffusionOptions(diffusion_steps=100))
    heard: list[Any] = []

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        heard.append((x, t))
        return torch.tensor([[2.0, 0], [0, 1.0]])

    x0, t, y = torch.rand(2, 1, 4, 4), torch.tensor([30, 60]), torch.tensor([0, 0])
    eps = torch.randn_like(x0)
    clean = classification_losses(diffusion, noised=False)(net, x0, t, eps=eps, y=y)
    assert torch.equal(heard[0][0], x0) and heard[0][1].tolist() == [0, 0]
    assert_close(clean["loss"], torch.log(1 + torch.exp(torch.tensor([-2.0, 1.0]))))
    assert clean["acc@1"].tolist() == [1, 0]
    classification_losses(diffusion)(net, x0, t, eps=eps, y=y)
    assert torch.equal(heard[1][0], diffusion.schedule.add_noise(x0, t, eps))
    assert heard[1][1].tolist() == [300, 600]


def test_drawn_images_depend_on_seed_and_number_alone(weakly_trained: Path, tmp_path: Path) -> None:
    drawn = []
    for batch in (2, 3):
        folder = Path(shutil.copytree(weakly_trained, tmp_path / f"b{batch}"))
        options = ["--save_dir", folder, "--num_samples", 3, "--batch_size", batch, "--steps", 4]
        said = script("classifier_tumor_sample", *options, "--guided", "--classifier_scale", 2)
        assert "samples_3x16x16x1.npz" in succeeded(said)
        with np.load(folder / "samples_3x16x16x1.npz") as arrays:
            drawn.append((arrays["arr_0"], arrays["arr_1"]))
        assert pixels(folder / "samples_3x16x16x1.png").shape[2] == 3
    (images, classes), (again, _) = drawn
    assert images.dtype == np.uint8 and images.std() > 0
    assert classes.dtype == np.int64 and set(classes) <= {0, 1}
    assert np.abs(images.astype(int) - again.astype(int)).max() <= 1
    plain = ["--save_dir", folder, "--num_samples", 3, "--steps", 4, "--sigma_small", True]
    said = succeeded(script("image_tumor_sample", *plain, "--use_ddim", True))
    assert "--sigma_small has no effect with --use_ddim True" in said
    succeeded(script("image_tumor_sample", *plain, "--class_index", 1))
    with np.load(folder / "samples_3x16x16x1.npz") as arrays:
        assert (arrays["arr_0"] != images).any() and arrays["arr_1"].tolist() == [1, 1, 1]


def test_images_and_masks_are_drawn_in_halves_where_memory_runs_out(
    weakly_trained: Path, weak_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = UNetModel.forward

    def limited(self: Any, x: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if len(x) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, x, *rest, **named)

    folder = Path(shutil.copytree(weakly_trained, tmp_path / "run"))
    drawing = ["--save_dir", folder, "--steps", 3]
    images, masks = [], []
    for batch in (2, 5):
        some = ["--batch_size", batch]
        said = succeeded(script("image_tumor_sample", *drawing, *some, "--num_samples", 5))
        assert said.count("going on with --batch_size 2") == (batch == 5)
        with np.load(folder / "samples_5x16x16x1.npz") as arrays:
            images.append(arrays["arr_0"])
        own = ["--src_dir", weak_data, "--level", 40, "--results_dir", tmp_path / f"{batch}"]
        said = succeeded(script("image_p_seg", *drawing, *some, *own))
        assert said.count("4 cases at a time: more memory is needed") == (batch == 5)
        masks.append(contents(tmp_path / f"{batch}"))
        monkeypatch.setattr(UNetModel, "forward", limited)
    assert (images[0] == images[1]).all()
    assert sum(name.endswith("_mask.png") for name in masks[0]) == 4
    same = [name for name in masks[0] if name.endswith(".png")]
    assert [masks[0][name] for name in same] == [masks[1][name] for name in same]


METHODS = [
    ["--method", "cdm"],
    ["--guided", "--label", "classifier"],
    ["--method", "one-branch", "--difference", "absolute", "--noises", 2],
    ["--method", "counterfactual", "--steps", 3, "--fill_holes", True],
    ["--method", "gradcam", "--largest", 8],
    ["--method", "otsu", "--label", "tumor", "--smooth", 1],
    ["--method", "encoded", "--difference", "positive", "--cut_at", 0.3, "--label", "diffusion"],
    ["--method", "otsu", "--label", "diffusion", "--cuts", 2],
]


@pytest.fixture(scope="module")
def masks(weakly_trained: Path, weak_data: Path) -> Iterator[Path]:
    """Masks of the validation phantoms by every method, in results/<number>."""
    for number, method in enumerate(METHODS):
        folder = weakly_trained / "results" / str(number)
        common = ["--src_dir", weak_data, "--save_dir", weakly_trained, "--results_dir", folder]
        undiffused = {"gradcam", "otsu"} & {*method} and "diffusion" not in method
        levels = [] if undiffused else ["--level", 40]
        said = succeeded(script("image_p_seg", *common, *levels, *method))
        assert "normal images: " in said
    yield weakly_trained / "results"


@pytest.mark.parametrize("number", range(len(METHODS)))
def test_masks_are_scored_against_the_truth(masks: Path, weak_data: Path, number: int) -> None:
    folder = masks / str(number)
    names = TumourImages(weak_data / "validate").labels
    scores = {row["name"]: row for row in read_csv(folder / "scores.csv")}
    assert scores.keys() == names.keys()
    empty, spared = [], []
    for name, label in names.items():
        mask = pixels(folder / f"{name}_mask.png") > 0
        truth = pixels(weak_data / "validate" / "seg" / f"{name}.png") > 0 if label else 0 * mask
        assert float(scores[name]["dice"]) == pytest.approx(
            metrics.dice(metrics.confusion(mask, truth))
        )
        assert pixels(folder / f"{name}_heat.png").shape == mask.shape == (32, 32)
        assert (folder / f"{name}_overlay.png").exists()
        if not label:
            empty.append(not mask.any())
            spared.append((~mask).mean())
    ranked = []
    for name in (name for name, label in names.items() if label):
        heat = pixels(folder / f"{name}_heat.png").astype(float)
        truth = pixels(weak_data / "validate" / "seg" / f"{name}.png") > 0
        above = np.sign(heat[truth][:, None] - heat[~truth][None]) / 2 + 0.5
        ranked.append(above.mean())
    mapped = json.loads((folder / "maps.json").read_text())
    assert mapped["images"] == 2 and mapped["auroc"] == pytest.approx(np.mean(ranked))
    found = json.loads((folder / "normal.json").read_text())
    assert (found["normal"], found["left_empty"]) == (2, sum(empty))
    assert found["specificity"] == pytest.approx(np.mean(spared))
    if "--label" not in METHODS[number]:
        assert all(empty), "the truth says which images are normal"
    if "tumor" in METHODS[number]:
        assert not any(empty)


def test_the_classifier_can_choose_what_is_segmented(
    masks: Path, weakly_trained: Path, weak_data: Path
) -> None:
    trained = load_classifier(Flags(), folder=str(weakly_trained))
    for row in read_csv(masks / "1" / "predictions.csv"):
        path = next((weak_data / "validate").glob(f"*[lr]/{row['name']}.png"))
        x0 = Frame(16).fit_image(torch.from_numpy(pixels(path) / np.float32(255))[None])[None]
        with torch.no_grad():
            label = int(trained.net(2 * x0 - 1, torch.zeros(1)).argmax())
        assert int(row["label"]) == label
        assert bool(pixels(masks / "1" / f"{row['name']}_mask.png").any()) == bool(label)


def test_the_map_of_a_case_is_the_two_branches_of_the_trained_network(
    weakly_trained: Path,
) -> None:
    model = load_image_model(Flags(), folder=str(weakly_trained))
    options = WeakOptions(method="cdm", level=50, steps=4, stride=5, tau=0.5)
    segmenter = WeakSegmenter(options, model, None, seed=9)
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = segmenter.differences(images, ["a", "b"])

    levels = model.diffusion.schedule.levels([50, 45, 40, 35, 30], end=None)
    eps = MemberNoise([member_seed(9, "a", 0), member_seed(9, "b", 0)])(images)
    x = noisy(2 * images - 1, eps, levels[0])
    with torch.no_grad():
        lesion = model.denoiser(x.shape, torch.tensor([1, 1]))
        weight = model.net.label_emb.weight
        mixed = model.denoiser(x.shape, torch.tensor([0, 0]))
        own = weight[0].clone()
        expected = torch.zeros_like(x)
        y = x.clone()
        for now, nxt in pairwise(levels):
            weight[0] = own
            x = step_of_ddim(lesion, x, now, nxt)
            weight[0] = 0.5 * own + 0.5 * weight[1]
            y = step_of_ddim(mixed, y, now, nxt)
            expected += x - y
        weight[0] = own
    assert_close(found, expected / 0.5, atol=1e-4, rtol=1e-3)
    assert found.abs().max() > 1e-4
    alone = segmenter.differences(images[1:], ["b"])
    assert_close(found[1:], alone, atol=1e-4, rtol=1e-3)


def test_the_diffusion_itself_tells_the_classes_by_its_errors(weakly_trained: Path) -> None:
    """The noise's squared error as normal minus that as lesion, at 10, 20, ... 80 of 80."""
    model = load_image_model(Flags(), folder=str(weakly_trained))
    segmenter = WeakSegmenter(WeakOptions(method="cdm", level=80), model, None, seed=9)
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = segmenter.lesion_scores(images, ["a", "b"])
    expected = torch.zeros(2)
    for number, t in enumerate(range(10, 90, 10)):
        level = model.diffusion.schedule.at(t)
        eps = MemberNoise([member_seed(9, name, number) for name in "ab"])(images)
        x = noisy(2 * images - 1, eps, level)
        errors = []
        for label in (0, 1):
            with torch.no_grad():
                x0 = model.denoiser(x.shape, torch.tensor([label, label]))(x, level).x0
            said = (x - level.alpha * x0) / level.sigma
            errors.append((said - eps).square().mean(dim=(1, 2, 3)))
        expected += errors[0] - errors[1]
    assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-3)
    chosen = WeakSegmenter(WeakOptions("cdm", level=80, label="diffusion"), model, None, seed=9)
    assert chosen.labels(images, ["a", "b"], [0, 0]) == [int(value > 0) for value in found]


def step_of_ddim(denoise: Any, x: torch.Tensor, now: Any, nxt: Any) -> torch.Tensor:
    """One deterministic step, written with the noise: x' = alpha' x0 + sigma' eps."""
    x0 = denoise(x, now).x0
    return nxt.alpha * x0 + nxt.sigma * (x - now.alpha * x0) / now.sigma


def test_levels_of_a_reconstruction_end_at_the_clean_image(weakly_trained: Path) -> None:
    model = load_image_model(Flags(), folder=str(weakly_trained))
    complete = WeakSegmenter(WeakOptions("counterfactual", level=50, steps=6), model, None, seed=0)
    assert [level.t for level in complete.levels[:-1]] == [50, 40, 30, 20, 10, 0]
    assert complete.levels[-1] == CLEAN


def test_finished_cases_are_kept_and_other_settings_start_anew(
    weakly_trained: Path, weak_data: Path, tmp_path: Path
) -> None:
    command = ["--src_dir", weak_data, "--save_dir", weakly_trained, "--results_dir", tmp_path]
    command += ["--method", "cdm", "--level", 40]
    succeeded(script("image_p_seg", *command, "--num_samples", 2))
    before = contents(tmp_path)
    assert "2 of 4 cases are finished and kept" in succeeded(script("image_p_seg", *command))
    after = contents(tmp_path)
    pngs = [name for name in before if name.endswith(".png")]
    assert len(pngs) == 8 and all(after[name] == before[name] for name in pngs)
    assert "drawn anew" in succeeded(script("image_p_seg", *command, "--tau", 0.5))


def test_broken_images_leave_the_good_ones(
    weakly_trained: Path, own_data: Path, tmp_path: Path
) -> None:
    pictures = sorted((own_data / "validate/normal").iterdir())
    whole = {path: path.read_bytes() for path in pictures[:2]}
    for path, content in whole.items():
        path.write_bytes(content[:60])
    out = tmp_path / "out"
    command = ["--src_dir", own_data, "--save_dir", weakly_trained, "--results_dir", out]
    command += ["--method", "cdm", "--level", 40, "--batch_size", 3]
    told = refused(script("image_p_seg", *command))
    assert told.startswith("error: 2 of the cases: ") and ".." not in told
    assert all(path.name in told for path in whole)
    before = contents(out)
    assert {name[:15] for name in before if name.endswith(".png")} == {
        path.stem[:15] for path in (own_data / "validate/tumor").iterdir()
    }
    assert not [name for name in before if ".part" in name]

    for path, content in whole.items():
        path.write_bytes(content)
    assert "2 of 4 cases are finished and kept" in succeeded(script("image_p_seg", *command))
    after = contents(out)
    assert all(after[name] == before[name] for name in before if name.endswith(".png"))
    assert len([name for name in after if name.endswith("_mask.png")]) == 4


def test_arrays_run_through_all_scripts(arrays: Path, tmp_path: Path) -> None:
    common = ["--src_dir", arrays, "--save_dir", tmp_path / "run", *SCHEDULE, *SHORT]
    common += ["--class_index", 1]
    succeeded(script("train_2d_ddfm", *common, *SMALL, "--class_cond", True, "--max_steps", 2))
    succeeded(script("classifier_train", *common, *JUDGE, "--iterations", 2, "--held_out", 0))
    command = ["--src_dir", arrays, "--save_dir", tmp_path / "run"]
    command += ["--guided", "--level", 40, "--class_index", 1]
    assert "3 of 3 left empty" in succeeded(script("image_p_seg", *command))
    out = tmp_path / "run" / "cg-cdm"
    truth = pixels(out / "truth" / "v1_slice001.png")
    assert truth[:, 0].tolist() == [0, 0] + 4 * [255] + 10 * [0]

    before, damaged = contents(out), ("truth/v1_slice001.png", "v1_slice001_mask.png")
    for name in damaged:  # they are made anew
        (out / name).write_bytes(before[name][:-20])
    assert "files of v1_slice001 are missing" in succeeded(script("image_p_seg", *command))
    assert all(contents(out)[name] == before[name] for name in damaged)


def test_published_weights_are_used_as_they_are(weak_data: Path, tmp_path: Path) -> None:
    """Bare weights of a diffusion with 1000 classes, and of a ResNet without timesteps."""
    network = ImageNetworkOptions(
        image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,2", class_cond=True
    )
    options = ImageDiffusionOptions(learn_sigma=True)
    net = fill_weights(create_model(network, options, of_images=True))
    state = dict(net.state_dict())
    state["label_emb.weight"] = torch.cat([state["label_emb.weight"], torch.randn(998, 128)])
    torch.save(state, tmp_path / "model.pt")
    resnet = fill_weights(
        create_classifier(model_type="resnet50", num_classes=2, classifier_told_time=False)
    )
    torch.save(resnet.state_dict(), tmp_path / "classifier_model.pt")

    given = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
    model = load_image_model(Flags(given=given), folder=str(tmp_path))
    assert model.diffusion.learn_sigma and model.diffusion.rescale_timesteps
    for name, value in net.state_dict().items():
        assert torch.equal(model.net.state_dict()[name], value)
    loaded = load_classifier(Flags(), folder=str(tmp_path)).net
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert_close(loaded(x), resnet.eval()(x))
    flags = [*SMALL, "--src_dir", weak_data, "--save_dir", tmp_path, "--guided", "--steps", 2]
    succeeded(script("image_p_seg", *flags))


# ----------------------------------------------------------------------------------- errors


def change_nothing(folder: Path) -> None:
    pass


def empty_class(folder: Path) -> None:
    for name in ("tumor", "seg"):
        for path in (folder / "training" / name).iterdir():
            path.unlink()


def no_class(folder: Path) -> None:
    shutil.rmtree(folder / "training" / "normal")


def no_image(folder: Path) -> None:
    for name in ("normal", "tumor"):
        shutil.rmtree(folder / "training" / name)
    shutil.rmtree(folder / "training" / "seg")


def no_part(folder: Path) -> None:
    (folder / "training").rename(folder / "train")


def lonely_mask(folder: Path) -> None:
    shutil.copy(
        next((folder / "training" / "seg").iterdir()), folder / "training" / "seg" / "x_1.png"
    )


@pytest.mark.parametrize("name", ["train_tumor_ddfm", "classifier_tumor_train"])
@pytest.mark.parametrize(
    ("damage", "flags", "found"),
    [
        (empty_class, [], "training/tumor: has no image"),
        (no_class, [], "training/normal: has no image"),
        (no_image, [], "training: has no image in normal/ or tumor/"),
        (no_part, [], "data has no folder training."),
        (lonely_mask, [], "seg: has 1 mask without an image in tumor/: x_1"),
        (change_nothing, ["--batch_size", 50], "--batch_size 50: there are only"),
        (change_nothing, ["--src_dir", "nowhere"], "nowhere: does not exist"),
        (change_nothing, ["--img_size", 17], "--image_size 17: must be a multiple of"),
    ],
)
def test_training_refuses(
    own_data: Path, tmp_path: Path, name: str, damage: Any, flags: list[object], found: str
) -> None:
    damage(own_data)
    small = SMALL if name == "train_tumor_ddfm" else JUDGE
    common = ["--src_dir", own_data, "--save_dir", tmp_path / "run", *small, "--max_steps", 1]
    assert found in refused(script(name, *common, *flags))


@pytest.mark.parametrize("classes", [1, 10**14])
def test_a_classifier_has_two_classes_or_more(classes: int, own_data: Path, tmp_path: Path) -> None:
    common = ["--src_dir", own_data, "--save_dir", tmp_path / "run", *JUDGE]
    said = refused(script("classifier_tumor_train", *common, "--num_classes", classes))
    assert f"--num_classes {classes}: must be between 2 and 1000" in said


@pytest.mark.parametrize("name", ["image_tumor_sample", "image_p_seg"])
def test_a_missing_network_is_named_by_the_flag_that_led_there(
    name: str, weakly_trained: Path, weak_data: Path, tmp_path: Path
) -> None:
    data = ["--src_dir", weak_data] if name == "image_p_seg" else []
    where = [*data, "--save_dir", tmp_path / "run"]
    said = refused(script(name, *where))
    assert said.startswith(f"error: --save_dir: there is no file {tmp_path / 'run'}")
    model = ["--model_path", weakly_trained]
    said = refused(script(name, *where, *model, "--guided", True))
    assert said.startswith(f"error: --save_dir: there is no file {tmp_path / 'run'}")
    said = refused(script(name, *where, "--model_path", tmp_path / "other"))
    assert said.startswith(f"error: --model_path: there is no file {tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--model_path", "nowhere"], "--model_path: there is no file nowhere"),
        (
            ["--guided", "--classifier_path", "nowhere"],
            "--classifier_path: there is no file nowhere",
        ),
        (["--level", 100], "--level 100: the last trained time is 99"),
        (["--level", 40, "--stride", 5], "10 steps of 5 from level 40"),
        (["--tau", 1], "--tau 1"),
        (["--image_size", 32], "--image_size 32: contradicts 16"),
    ],
)
def test_segmentation_refuses(
    weakly_trained: Path, weak_data: Path, flags: list[object], found: str
) -> None:
    common = ["--src_dir", weak_data, "--save_dir", weakly_trained]
    assert found in refused(script("image_p_seg", *common, *flags))


def test_a_checkpoint_of_the_other_network_is_refused(
    weakly_trained: Path, weak_data: Path, tmp_path: Path
) -> None:
    common = ["--src_dir", weak_data, "--save_dir", tmp_path, "--guided"]
    diffusion, judge = weakly_trained / "model.pt", weakly_trained / "classifier_model.pt"
    said = refused(script("image_p_seg", *common, "--model_path", judge))
    assert "is not a diffusion of images" in said
    paths = ["--model_path", diffusion, "--classifier_path", diffusion]
    assert "is not a classifier of images" in refused(script("image_p_seg", *common, *paths))
    kept = load_checkpoint(diffusion)
    other = ["--data_dir", weak_data / "validate", "--out_dir", tmp_path / "out"]
    for path in (diffusion, judge):
        said = refused(script("segmentation_sample", *other, "--model_path", path))
        assert "is not a segmentation network, which scripts/segmentation_train.py trains" in said
        resume = ["--resume_checkpoint", path]
        assert "is not a seg" in refused(script("segmentation_train", *other, *resume))
    resume = [*common[:4], "--resume_checkpoint"]
    assert "is not a diffusion of" in refused(script("train_tumor_ddfm", *resume, judge))
    assert "is not a classifier" in refused(script("classifier_tumor_train", *resume, diffusion))
    save_checkpoint(tmp_path, type(kept)(**{**vars(kept), "options": {**kept.options, "in_ch": 3}}))
    with pytest.raises(UserError, match=r"input_blocks\.0\.0\.weight has shape \(32, 1, 3, 3\)"):
        load_image_model(Flags(), folder=str(tmp_path))


def test_two_networks_of_two_sizes_are_refused(
    weakly_trained: Path, weak_data: Path, tmp_path: Path
) -> None:
    common = ["--src_dir", weak_data, "--save_dir", tmp_path, *JUDGE, *SHORT]
    succeeded(script("classifier_tumor_train", *common, "--img_size", 32, "--iterations", 1))
    use = ["--src_dir", weak_data, "--save_dir", tmp_path, "--model_path", weakly_trained]
    said = refused(script("image_p_seg", *use, "--guided", "--level", 40))
    assert "the classifier works at 32 pixels" in said


def test_a_diffusion_without_classes_cannot_segment(weak_data: Path, tmp_path: Path) -> None:
    common = ["--src_dir", weak_data, "--save_dir", tmp_path]
    train = [*common, *SMALL, *SCHEDULE, *SHORT, "--max_steps", 1]
    assert "--resume auto" not in succeeded(script("train_tumor_ddfm", *train))
    assert script("train_tumor_ddfm", *train, "--in_ch", 3).out == ""
    assert "exists and will be overwritten" in succeeded(script("train_tumor_ddfm", *train))
    assert "the diffusion was trained without classes" in refused(script("image_p_seg", *common))


@pytest.mark.parametrize("version", ["1", "new", "2"])
def test_only_the_plain_network_diffuses_images(
    weak_data: Path, tmp_path: Path, version: str
) -> None:
    common = ["--src_dir", weak_data, "--save_dir", tmp_path / "run", *SMALL, "--max_steps", 1]
    said = refused(script("train_tumor_ddfm", *common, "--version", version))
    assert f"--version {version}: only the plain network denoises images" in said
    assert not (tmp_path / "run").exists()


def test_split_files_that_do_not_fit(arrays: Path) -> None:
    with pytest.raises(UserError, match=r"--fold: .* has the folds 0 to 1, but not 2"):
        SlicedArrays(arrays, parts=("train",), fold=2)
    (arrays / "preprocessed" / "deep" / "v0.npy").unlink()
    with pytest.raises(UserError, match=r"preprocessed: lacks v0\.npy"):
        SlicedArrays(arrays, parts=("train",))
    np.save(arrays / "preprocessed" / "deep" / "v0.npy", np.zeros((4, 16, 16)))
    with pytest.raises(UserError, match=r"v0\.npy: .* \(4, 16, 16\)"):
        SlicedArrays(arrays, parts=("train",))


def test_real_slices_are_read_by_class_and_patient(real_data: Path) -> None:
    dataset = TumourImages(real_data / "brats15_weak_128" / "training")
    assert (len(dataset), sum(dataset.labels.values())) == (445, 287)
    assert sorted(set(dataset.patients)) == [f"brats15_{n:03d}" for n in (3, 4, 5, 6)]
    case = dataset[0]
    assert case.mask is not None and bool(case.mask.any()) == bool(case.label)
    assert case.image.shape == (1, 128, 128) and float(case.image.max()) <= 1
