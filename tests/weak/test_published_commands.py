"""The commands of the published README of weak supervision, in its order and as typed there.

What is added shrinks them: a smaller network and image, fewer steps and images.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill as fill_weights
from helpers import Run, refused, script, succeeded
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from guided_diffusion.checkpoint import load_checkpoint
from guided_diffusion.data.tumorloader import TumourImages
from guided_diffusion.errors import UserError
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.weak import ImageDiffusionOptions, ImageNetworkOptions
from guided_diffusion.sampling import ddim
from guided_diffusion.script_util import create_model
from guided_diffusion.tools import phantom_folders
from guided_diffusion.weak.maps import noisy
from guided_diffusion.weak.models import load_classifier, load_image_model

pytestmark = pytest.mark.slow

DIFFUSION, CLASSIFIER = "runs/results/diff_brats", "runs/results/guided_diff_brats_cls_resnet"
README = {  # by section
    "1": f"""train_tumor_ddfm --save_dir {DIFFUSION} --src_dir DATA --dataset brats
        --num_channels 128 --num_res_blocks 3 --diffusion_steps 4000 --lr 1e-4 --batch_size 4""",
    "1, conditional": f"""train_tumor_ddfm --save_dir {DIFFUSION} --src_dir DATA --dataset brats
        --image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True --class_cond True
        --diffusion_steps 4000 --noise_schedule cosine --rescale_learned_sigmas False
        --rescale_timesteps False --lr 1e-4 --batch_size 4""",
    "2": "image_tumor_sample",
    "3, training": f"""classifier_tumor_train --save_dir {CLASSIFIER} --src_dir DATA --lr 3e-4
        --batch_size 8 --model_type resnet50""",
    "3, sampling": f"classifier_tumor_sample --save_dir {CLASSIFIER} --src_dir DATA",
    "4": f"""image_p_seg --save_dir {CLASSIFIER} --model_path {DIFFUSION} --num_channels 128
        --num_res_blocks 3 --learn_sigma True --class_cond True --diffusion_steps 4000 -f 0
        --batch_size 1 --guided""",
}
NETWORK = "--img_size 16 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --max_steps 2"
FEW = "--num_samples 2 --steps 2"
SHRINK = {
    **{"1": NETWORK, "1, conditional": NETWORK, "2": FEW, "3, sampling": FEW},
    "3, training": "--img_size 32 --iterations 2",
    "4": "--num_channels 32 --num_res_blocks 1",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with phantoms in DATA: 4 patients to train on, 2 to validate on."""
    folder = tmp_path_factory.mktemp("clone")
    phantom_folders.write_weak(folder / "DATA", 3, patients=8, slices=2, size=32, training=0.75)
    return folder


@pytest.fixture(scope="module")
def said(place: Path) -> dict[str, str]:
    """What each command says, run in order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return {name: succeeded(run(name)) for name in README}


def run(name: str, more: str = "") -> Run:
    return script(*shlex.split(f"{README[name]} {SHRINK[name]} {more}"))


def test_every_command_runs_in_order_on_the_networks_that_it_means(
    said: dict[str, str], place: Path
) -> None:
    trained = load_checkpoint(place / DIFFUSION / "model.pt")
    assert (trained.options["class_cond"], trained.options["diffusion_steps"]) == (True, 4000)
    judge = load_checkpoint(place / CLASSIFIER / "classifier_model.pt")
    assert (judge.options["model_type"], judge.options["diffusion_steps"]) == ("resnet50", 1000)
    for name in ("2", "3, sampling", "4"):
        file = "savedmodel.pt" if name == "4" else "model.pt"
        assert f"{DIFFUSION}/{file}: averaged weights" in said[name]
    for folder in ("results/weak", CLASSIFIER):
        with np.load(place / folder / "samples_2x16x16x1.npz") as arrays:
            assert arrays["arr_0"].shape == (2, 16, 16, 1) and arrays["arr_1"].shape == (2,)
    names = TumourImages(place / "DATA" / "validate").labels
    masks = {path.name for path in (place / CLASSIFIER / "cg-cdm").glob("*_mask.png")}
    assert masks == {f"{name}_mask.png" for name in names}


def test_what_the_user_did_not_say_is_said(said: dict[str, str]) -> None:
    assert f"--src_dir DATA, on which {DIFFUSION}/savedmodel.pt was trained" in said["4"]
    assert "--fold 0 has no effect: DATA/validate holds folders of images" in said["4"]
    assert "the classifier was trained at 32 pixels and is used at 16" in said["4"]


def test_each_command_names_the_next_one(said: dict[str, str]) -> None:
    last = {name: text.splitlines()[-1] for name, text in said.items()}
    assert last["1"].startswith(
        f"next: python scripts/image_tumor_sample.py --save_dir {DIFFUSION} "
    )
    assert last["1"].endswith("; to segment, train with --class_cond True")
    assert last["1, conditional"] == (
        "next: python scripts/classifier_tumor_train.py --src_dir DATA --save_dir "
        f"{DIFFUSION} --img_size 16"
    )
    assert last["2"] == "next: open results/weak/samples_2x16x16x1.png"
    assert last["3, training"] == (
        f"next: python scripts/image_p_seg.py --src_dir DATA --save_dir {CLASSIFIER} --guided True"
    )
    assert last["3, sampling"] == f"next: open {CLASSIFIER}/samples_2x16x16x1.png"
    assert last["4"].startswith(f"next: open {CLASSIFIER}/cg-cdm/")


def test_a_dry_run_ends_before_the_first_step_or_image(
    said: dict[str, str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    for name, found in {
        "1, conditional": "dry run: the first batch was read, images (4, 1, 16, 16); it would",
        "2": "2 images by ddpm\ndry run: they would be written to ./results/weak\n",
        "3, training": "dry run: the first batch was read, images (8, 1, 32, 32); it would be",
        "4": f"dry run: 4 images would be segmented; they would be written to {CLASSIFIER}/cg",
    }.items():
        assert found in succeeded(run(name, "--dry_run True"))
    assert "dry run: 2 images" in succeeded(script("image_p_sample", *arrays_of(), "--dry_run", 1))
    elsewhere = "--save_dir elsewhere --dry_run True"
    succeeded(run("1", elsewhere))
    succeeded(run("2", f"{elsewhere} --model_path {DIFFUSION}"))
    assert sorted(place.rglob("*")) == before


def test_the_classifier_is_told_the_time_of_its_own_schedule(
    said: dict[str, str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The diffusion has 4000 cosine steps and tells no scaled times, the classifier 1000 linear."""
    monkeypatch.chdir(place)
    model = load_image_model(Flags(), folder=DIFFUSION)
    judge = load_classifier(Flags(), folder=CLASSIFIER)
    heard: list[Tensor] = []
    judge.net.register_forward_pre_hook(lambda net, given: heard.append(given[1]))
    level = model.diffusion.schedule.at(2000)
    x = torch.randn(2, 1, 16, 16)
    model.branch(x.shape, 1.0, guide=judge, label=1)(x, level)
    own = judge.diffusion.schedule
    assert own.at(float(heard[0][0])).alpha == pytest.approx(level.alpha, rel=1e-6)
    assert abs(float(heard[0][0]) - 500) > 100, "not a quarter of 2000"


def arrays_of(*more: object) -> list[object]:
    where = ["--save_dir", CLASSIFIER, "--model_path", DIFFUSION, "--level", 400, "--steps", 3]
    return [*where, "--tau", 0.5, "--num_samples", 2, *more]


def test_the_arrays_are_both_branches_and_their_difference(
    said: dict[str, str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    succeeded(script("image_p_sample", *arrays_of("--batch_size", 1)))
    with np.load(place / CLASSIFIER / "p_sample_ddim_cond_eg.npz") as file:
        found = [torch.from_numpy(file[f"arr_{k}"]) for k in range(6)]
    images, masks, x, lesion, other, difference = found
    assert all(array.shape == (2, 1, 16, 16) for array in found)
    assert images.min() >= 0 and images.max() <= 1
    assert masks.unique().tolist() == [0, 1]

    model = load_image_model(Flags(), folder=DIFFUSION)
    levels = model.diffusion.schedule.levels([400, 399, 398, 397], end=None)
    x0 = 2 * images - 1
    eps = (x - levels[0].alpha * x0) / levels[0].sigma
    assert_close(x, noisy(x0, eps, levels[0]))
    assert 0.8 < float(eps.std()) < 1.2
    ends, total = [x, x], torch.zeros_like(x)
    with torch.no_grad():
        for step in pairwise(levels):
            y = [model.branch(x.shape, share) for share in (1.0, 0.5)]
            ends = [ddim(branch, end, step) for branch, end in zip(y, ends, strict=True)]
            total += (ends[0] - ends[1]).abs()
    assert_close([lesion, other, difference], [*ends, total], atol=1e-5, rtol=1e-4)

    said_guided = succeeded(script("image_p_sample", *arrays_of("--guided")))
    assert f"in {CLASSIFIER}/p_sample_ddim_eg.npz" in said_guided
    with np.load(place / CLASSIFIER / "p_sample_ddim_eg.npz") as file:
        assert (file["arr_2"] == x.numpy()).all() and (file["arr_3"] != lesion.numpy()).any()


# ------------------------------------------------------------------------- which network it is


def copy_of(place: Path, tmp_path: Path) -> Path:
    """A folder with the same runs; their files are links, which saving replaces."""
    shutil.copytree(place / "runs/results", tmp_path / "runs/results", copy_function=os.link)
    return tmp_path


def test_two_diffusions_beside_a_classifier_are_too_many(
    said: dict[str, str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_of(place, tmp_path))
    shutil.copytree(DIFFUSION, "runs/results/again", copy_function=os.link)
    told = refused(run("3, sampling"))
    assert "--model_path: is needed" in told
    assert "2 folders beside it have one: runs/results/again, runs/results/diff_brats" in told


def test_a_missing_classifier_is_called_missing(
    said: dict[str, str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_of(place, tmp_path))
    own = ["--src_dir", place / "DATA", "--save_dir", DIFFUSION, "--guided"]
    for name in ("image_p_seg", "classifier_tumor_sample"):
        told = refused(script(name, *own))
        assert f"there is no file {DIFFUSION}/classifier_model.pt: the folder has no" in told
        assert f"Train one with scripts/classifier_tumor_train.py --save_dir {DIFFUSION}" in told
    told = refused(script("image_p_seg", *own, "--classifier_path", DIFFUSION))
    assert told.startswith(f"error: --classifier_path: there is no file {DIFFUSION}/classifier")


def test_a_classifier_may_lie_where_the_published_code_looks_for_it(
    said: dict[str, str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``model.pt`` in ``save_dir``, and also as the training itself names it."""
    monkeypatch.chdir(copy_of(place, tmp_path))
    named = Path(CLASSIFIER, "classifier_model.pt")
    assert load_classifier(Flags(), folder=CLASSIFIER).trained.path == named
    named.rename(Path(CLASSIFIER, "model.pt"))
    own = load_classifier(Flags(), folder=CLASSIFIER).trained.path
    assert own == Path(CLASSIFIER, "classifier", "savedmodel.pt")
    shutil.rmtree(Path(CLASSIFIER, "classifier"))
    assert load_classifier(Flags(), folder=CLASSIFIER).trained.path.name == "model.pt"
    with pytest.raises(UserError, match=r"the folder has no classifier"):
        load_classifier(Flags(), folder=DIFFUSION)


def test_recorded_data_that_are_gone_are_named(
    said: dict[str, str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_of(place, tmp_path))
    assert f"--src_dir {place / 'DATA'}, on which" in succeeded(run("4")), "by its absolute path"
    (place / "DATA").rename(place / "GONE")
    try:
        told = refused(run("4"))
    finally:
        (place / "GONE").rename(place / "DATA")
    assert told.startswith("error: --src_dir: is missing, and there is no DATA, on which ")


def published(folder: Path) -> dict[str, Tensor]:
    """A diffusion as the published scripts save it: bare, with a label embedding of 1000 rows."""
    network = ImageNetworkOptions(
        image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,2", class_cond=True
    )
    net = create_model(network, ImageDiffusionOptions(learn_sigma=True), of_images=True)
    weights = dict(fill_weights(net).state_dict())
    weights["label_emb.weight"] = torch.randn(1000, weights["label_emb.weight"].shape[1])
    torch.save(OrderedDict((k, nn.Parameter(v)) for k, v in weights.items()), folder / "model.pt")
    return weights


BARE = ["--img_size", 16, "--num_channels", 32, "--channel_mult", "1,2", "--num_res_blocks", 1]


@pytest.mark.parametrize(("index", "row"), [(None, 1), (1, 1), (2, 2), (7, 7)])
def test_published_weights_use_the_class_row_that_was_trained(
    tmp_path: Path, index: int | None, row: int
) -> None:
    rows = published(tmp_path)["label_emb.weight"]
    given = {"image_size": 16, "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1}
    more = {} if index is None else {"class_index": index}
    model = load_image_model(Flags(given={**given, **more}), folder=str(tmp_path))
    assert torch.equal(model.net.label_emb.weight, rows[[0, row]])
    assert model.source.endswith(
        "bare weights, taken as trained on 1000 steps (--trained_steps), classes in rows 0 and "
        f"{row} of its label embedding"
    )


def test_training_goes_on_from_the_class_row_that_was_trained(place: Path, tmp_path: Path) -> None:
    rows = published(tmp_path)["label_emb.weight"]
    common = ["--src_dir", place / "DATA", "--save_dir", tmp_path / "run", *BARE, "--lr", 0]
    more = ["--learn_sigma", True, "--class_cond", True, "--class_index", 2, "--max_steps", 1]
    resume = ["--resume_checkpoint", tmp_path / "model.pt"]
    told = succeeded(script("train_tumor_ddfm", *common, *more, *resume))
    assert f"{tmp_path}/model.pt: classes in rows 0 and 2 of its label embedding" in told
    assert "--class_index 2 has no effect" not in told
    saved = load_checkpoint(tmp_path / "run" / "model.pt").model["label_emb.weight"]
    assert_close(saved, rows[[0, 2]])


def test_a_mistyped_folder_is_not_replaced_by_one_beside_it(
    said: dict[str, str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    told = refused(script("image_p_seg", "--save_dir", "runs/results/diff_brat"))
    assert "Did you mean runs/results/diff_brats?" in told
    assert not Path("runs/results/diff_brat").exists()
    told = refused(script("image_p_seg", "--save_dir", "nowhere"))
    assert "--save_dir: there is no file nowhere. Name a checkpoint or a folder" in told


def test_a_damaged_diffusion_is_not_replaced_by_one_beside_it(
    said: dict[str, str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy_of(place, tmp_path))
    shutil.copytree(DIFFUSION, "runs/results/again", copy_function=os.link)
    for name in ("model.pt", "savedmodel.pt"):
        path = Path(DIFFUSION, name)
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[:2000])
    told = refused(script("image_tumor_sample", "--save_dir", DIFFUSION))
    assert told.startswith(f"error: {DIFFUSION}/savedmodel.pt: ")


def test_published_weights_of_4000_steps_are_taken_as_typed(place: Path, tmp_path: Path) -> None:
    published(tmp_path)
    common = ["--src_dir", place / "DATA", "--save_dir", tmp_path, *BARE, "--diffusion_steps", 4000]
    told = succeeded(script("image_p_seg", *common, "--steps", 1, "--class_index", 2))
    assert "taken as trained on 4000 steps (--trained_steps), classes in rows 0 and 2" in told
    assert "--class_index" not in told.split("label embedding")[1]
    told = refused(script("image_p_seg", *common, "--class_index", 1000))
    assert f"--class_index 1000: {tmp_path}/model.pt has only 1000 classes" in told


def test_images_of_any_published_class_are_drawn(
    said: dict[str, str], place: Path, tmp_path: Path
) -> None:
    published(tmp_path)
    few = ["--save_dir", tmp_path, *BARE, "--num_samples", 1, "--use_ddim", True, "--steps", 20]
    drawn = {}
    for index in (1, 2):
        succeeded(script("image_tumor_sample", *few, "--class_index", index))
        with np.load(tmp_path / "samples_1x16x16x1.npz") as arrays:
            drawn[index] = arrays["arr_0"]
            assert arrays["arr_1"].tolist() == [index]
    assert (drawn[1] != drawn[2]).any()
    own = ["--save_dir", place / DIFFUSION, "--num_samples", 1, "--class_index", 2]
    assert "has the classes 0 and 1. " in refused(script("image_tumor_sample", *own))


def test_flags_of_the_diffusion_of_masks_are_refused_by_name(place: Path, tmp_path: Path) -> None:
    common = ["--src_dir", place / "DATA", "--save_dir", tmp_path / "run", *BARE]
    told = refused(script("train_tumor_ddfm", *common, "--mask_dropout", 0.5))
    assert told == (
        "error: --mask_dropout 0.5: is for the diffusion of masks only. Omit it for the default, "
        "0.0.\n"
    )


# --------------------------------------------------------------------------- the second stage


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_weak_masks_are_trained_on_by_two_commands(
    said: dict[str, str], place: Path, tmp_path: Path
) -> None:
    data, weak, out = place / "DATA", place / DIFFUSION, tmp_path / "otsu"
    masks = ["--src_dir", data, "--save_dir", weak, "--method", "otsu", "--results_dir", out]
    told = succeeded(script("image_p_seg", *masks, "--part", "training"))
    dataset = out / "dataset"
    assert told.splitlines()[-1] == (
        f"next: python scripts/segmentation_train.py --preset small --data_dir {dataset} "
        f"--out_dir {out / 'supervised'}"
    )
    source, written = TumourImages(data / "training"), TumourImages(dataset)
    assert written.labels == source.labels and written.patients == source.patients
    for name, label in source.labels.items():
        case, own = written[written.names.index(name)], source[source.names.index(name)]
        assert own.mask is not None and case.mask is not None
        assert torch.equal(case.image, own.image)
        found = torch.from_numpy(pixels(out / f"{name}_mask.png") > 0)[None]
        assert torch.equal(case.mask > 0.5, found)
        assert bool(case.mask.any()) == bool(label), "normal images have empty masks"
        assert not label or not torch.equal(case.mask, own.mask), "the true mask is not used"

    train = ["--data_dir", dataset, "--out_dir", tmp_path / "second", "--image_size", *BARE[1:]]
    told = succeeded(script("segmentation_train", *train, "--batch_size", 2, "--max_steps", 1))
    assert "12 TUMOR cases" in told

    few = ["--part", "training", "--num_samples", 3, "--label", "tumor", "--smooth", 1]
    succeeded(script("image_p_seg", *masks, *few))
    again = TumourImages(dataset)
    assert len(again) == 3 and set(again.labels.values()) == {1}, "all are segmented, none is left"
    assert len(list((dataset / "seg").iterdir())) == 3


def test_training_masks_have_a_folder_of_their_own_and_need_no_truth(
    said: dict[str, str], place: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(place / "DATA", tmp_path / "data"))
    shutil.rmtree(data / "training" / "seg")
    masks = ["--src_dir", data, "--save_dir", tmp_path, "--method", "otsu", "--part", "training"]
    told = succeeded(script("image_p_seg", *masks))
    assert "not scored: no image with a lesion has a mask" in told
    assert "normal images: 6 of 6 left empty" in told
    written = TumourImages(tmp_path / "otsu_training" / "dataset")
    assert sorted(written.labels.values()) == 6 * [0] + 6 * [1]

    told = succeeded(script("image_p_seg", *masks, "--num_samples", 3))
    assert "3 images in" in told
    assert sorted(TumourImages(tmp_path / "otsu_training" / "dataset").labels.values()) == [0, 0, 1]
    assert "12 images in" in succeeded(script("image_p_seg", *masks, "--num_samples", 99))
