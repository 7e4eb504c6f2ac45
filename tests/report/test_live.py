"""TensorBoard and visdom show the same of every kind of training, under the same names."""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import script, succeeded, training
from PIL import Image

from guided_diffusion.data.batches import TrainingBatch
from guided_diffusion.report.sinks import CHARTS, OTHERS, VisdomSink, chart_of, shown_numbers
from guided_diffusion.tools import phantom_folders
from guided_diffusion.training import live

SMALL = ["--img_size", 16, "--num_channels", 32, "--channel_mult", "1,2", "--num_res_blocks", 1]
SHORT = ["--batch_size", 2, "--log_interval", 2, "--save_interval", 2, "--diffusion_steps", 100]
ALWAYS = {"loss", "grad_norm", "lr", "steps_per_s", "samples"}

Shown = dict[str, dict[int, Any]]
"""What is shown under a name at each step."""


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.values: Shown = {}
        self.pictures: Shown = {}
        self.closed = False

    def numbers(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, {})[values["step"]] = value

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        self.pictures.setdefault(name, {})[step] = pixels

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def weak_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weak")
    phantom_folders.write_weak(folder, 0, patients=6, size=24, training=0.5)
    return folder


def command(kind: str, brats: Path, weak: Path, out: Path) -> list[Any]:
    """The script and the flags of a short training of a kind."""
    if kind == "segmentation":
        more = ["--max_steps", 4, "--val_dir", brats / "testing", "--val_steps", 1]
        return ["segmentation_train", *training(brats, out), *more]
    where = ["--src_dir", weak, "--save_dir", out, *SHORT, "--max_steps", 4]
    if kind == "images":
        return ["train_tumor_ddfm", *where, *SMALL, "--class_cond", True]
    own = ["--img_size", 16, "--classifier_width", 32, "--classifier_depth", 1]
    return ["classifier_tumor_train", *where, *own, "--held_out", 0.4, "--eval_interval", 2]


KINDS = {
    "segmentation": ({"val_dice", "val_iou", "mse"}, {"batch", "sampling", "000005", "000006"}),
    "images": ({"mse"}, {"batch", "sampling"}),
    "classifier": ({"val_accuracy", "val_loss"}, {"batch"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_training_shows_numbers_and_pictures(
    kind: str, brats: Path, weak_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Recorder()
    monkeypatch.setattr(live, "open_sinks", lambda *_: [sink])
    succeeded(script(*command(kind, brats, weak_data, tmp_path / "run")))
    numbers, pictures = KINDS[kind]
    assert sink.values.keys() >= numbers | ALWAYS and sink.closed
    assert set(sink.values["loss"]) == {2, 4}
    assert sink.pictures.keys() == pictures
    assert [*sink.pictures["batch"]] == [0]
    for name in pictures - {"batch"}:
        assert [*sink.pictures[name]] == [2, 4]
        assert not np.array_equal(sink.pictures[name][2], sink.pictures[name][4])


@pytest.mark.parametrize("kind", KINDS)
def test_both_sinks_show_the_same_under_the_same_names(
    kind: str, brats: Path, weak_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalars: Shown = {}
    images: Shown = {}
    layouts: list[dict[str, Any]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert "run" in folder

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.setdefault(name, {})[step] = value

        def add_image(self, name: str, pixels: Any, step: int, *, dataformats: str) -> None:
            assert dataformats == "HWC"
            images.setdefault(name, {})[step] = pixels

        def add_custom_scalars(self, layout: dict[str, Any]) -> None:
            layouts.append(layout)

        def close(self) -> None:
            layouts.append({})

    sent: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    monkeypatch.setattr(
        VisdomSink, "_put", lambda _, window, message: sent.append((window, message))
    )
    line = command(kind, brats, weak_data, tmp_path / "run")
    succeeded(script(*line, "--tensorboard", True, "--visdom", 1))

    charts: dict[str, dict[str, dict[float, float]]] = {}
    shown: Shown = {}
    for window, message in sent:
        (first, *_) = message["data"]
        if first["type"] == "image":
            code = first["content"]["src"].partition(",")[2]
            step = int(first["content"]["caption"].removeprefix("step "))
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
            shown.setdefault(window, {})[step] = pixels
        else:
            charts[window] = {
                line["name"]: dict(zip(line["x"], line["y"], strict=True))
                for line in message["data"]
            }
    assert {name: line for chart in charts.values() for name, line in chart.items()} == scalars
    assert shown.keys() == images.keys()
    for name, steps in images.items():
        assert steps.keys() == shown[name].keys()
        assert all(np.array_equal(steps[step], shown[name][step]) for step in steps), name
    layout, closed = layouts
    (patterns,) = layout.values()
    assert patterns.keys() == {*CHARTS, OTHERS} and closed == {}
    for chart, (form, (pattern,)) in patterns.items():
        assert form == "Multiline"
        assert {name for name in scalars if re.match(pattern, name)} == {*charts.get(chart, {})}


def test_numbers_and_names_that_can_be_shown() -> None:
    row = {"step": 3, "loss": 0.5, "acc@1": 1, "skipped": float("nan"), "note": "text"}
    assert shown_numbers(row) == {"loss": 0.5, "acc_1": 1.0}
    names = ("loss_q0", "dice_direct", "lr", "learned", "acc_1", "val_loss", "memory_gib")
    assert [chart_of(name) for name in names] == [
        *("loss", "loss", "lr", "run", "accuracy", "validation", "run")
    ]


def test_the_picture_of_a_batch() -> None:
    """Images above their masks; of images alone one row."""
    masks, images = torch.zeros(3, 1, 16, 16), torch.ones(3, 4, 16, 16)
    both = live.draw_batch(TrainingBatch(masks, images))
    alone = live.draw_batch(TrainingBatch(images, images[:, :0]))
    assert both.shape[1] == alone.shape[1] and both.shape[0] > 1.7 * alone.shape[0]
    assert (alone == 255).mean() > 0.5


def test_event_files_of_tensorboard(brats: Path, weak_data: Path, tmp_path: Path) -> None:
    """What TensorBoard itself reads, where it is installed."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    line = command("classifier", brats, weak_data, out)
    succeeded(script(*line, "--tensorboard", True))
    found = EventAccumulator(str(out / "classifier")).Reload()
    tags = found.Tags()
    assert {*tags["scalars"]} >= {"loss", "acc_1", "val_accuracy"} and tags["images"] == ["batch"]
    assert [event.step for event in found.Scalars("loss")] == [2, 4]
    assert "custom_scalars__config__" in tags["tensors"]
