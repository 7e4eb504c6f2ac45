"""Live display of a run: curves, no TensorBoard, a visdom server that answers or does not."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from helpers import contents, refused, script, succeeded, training
from PIL import Image

from guided_diffusion.checkpoint import LATEST, load_checkpoint
from guided_diffusion.report.curves import draw_curves, read_points, smoothed
from guided_diffusion.report.sinks import TensorBoardSink, VisdomSink

# ------------------------------------------------------------------------------ curves


def test_the_points_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "progress.csv"
    path.write_text("step,loss,val_dice\n1,0.5,\n2,nan,\n2,,0.7\n3,0.25,\n4,0.1", "utf-8")
    assert read_points(path)["loss"] == ([1, 3], [0.5, 0.25]) or read_points(path)["loss"] == (
        [1, 3, 4],
        [0.5, 0.25, 0.1],
    )
    assert read_points(path)["val_dice"] == ([2], [0.7])
    assert read_points(tmp_path / "none.csv") == {}


def test_a_running_mean() -> None:
    assert smoothed([1.0, 2, 6, 3], 0) == [1, 2, 6, 3]
    assert smoothed([1.0, 2, 6, 3], 1) == pytest.approx([1.5, 3, 11 / 3, 4.5])


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("count", [1, 400])
def test_curves_are_drawn(count: int, validated: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ["step", "loss", "loss_q0", "loss_q3", "grad_norm", "lr", "steps_per_s"]
    names += ["val_dice"] * validated
    lines = [",".join(names)]
    for step in range(1, count + 1):
        lines.append(",".join(str(v) for v in [step, *[1 / step] * (len(names) - 1)]))
    (tmp_path / "progress.csv").write_text("\n".join(lines), "utf-8")
    assert draw_curves(tmp_path / "progress.csv", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > (1400 if validated else 900) and picture.size[1] > 600
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize(
    ("kinds", "labels"),
    [
        ([], None),
        (["loss_q0", "loss_direct"], ["first quarter of t", "no noisy mask"]),
        (["loss_direct"], ["no noisy mask"]),
    ],
)
def test_kinds_of_losses_have_a_panel_where_there_are_any(
    kinds: list[str], labels: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain U-Net has losses of one kind alone."""
    figures: list[Any] = []
    own = pytest.importorskip("matplotlib.figure").Figure.savefig

    def kept(figure: Any, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        own(figure, *arguments, **options)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", kept)
    lines = [",".join(["step", "loss", *kinds]), ",".join(["1", "0.5", *["0.4"] * len(kinds)])]
    (tmp_path / "progress.csv").write_text("\n".join(lines), "utf-8")
    assert draw_curves(tmp_path / "progress.csv", tmp_path / "curves.png")
    panels = {axes.get_title(loc="left"): axes for axes in figures[0].axes}
    assert ("loss by time t" in panels) == (labels is not None)
    if labels:
        shown = panels["loss by time t"].get_legend_handles_labels()[1]
        assert shown == labels


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert not draw_curves(tmp_path / "progress.csv", tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_a_run_says_so_once(
    brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("guided_diffusion.training.validation.find_spec", lambda name: None)
    said = succeeded(script("segmentation_train", *training(brats, tmp_path), "--max_steps", 4))
    assert said.count("pip install matplotlib") == 1
    assert not (tmp_path / "curves.png").exists()


def test_without_tensorboard_there_is_one_line(
    brats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    command = [*training(brats, tmp_path), "--max_steps", 1, "--tensorboard", True]
    assert "pip install tensorboard" in refused(script("segmentation_train", *command))


def test_a_full_disk_ends_tensorboard_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Writer:
        """Fails as TensorBoard's does once its thread could not write."""

        def __init__(self, folder: str) -> None:
            self.calls = 0

        def add_custom_scalars(self, layout: object) -> None:
            pass

        def fail(self, *values: object, **how: object) -> None:
            self.calls += 1
            raise OSError(28, "No space left on device")

        add_scalar = add_image = close = fail

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    sink = TensorBoardSink(tmp_path)
    sink.numbers({"step": 1, "loss": 0.5, "lr": 0.1})
    sink.picture("batch", np.zeros((2, 2, 3), np.uint8), 1)
    sink.close()
    said = "nothing more is written for TensorBoard: [Errno 28] No space left on device\n"
    assert capsys.readouterr().out == said and sink.writer.calls == 1


# ------------------------------------------------------------------------------ visdom


class Server:
    """A visdom server's protocol: POST of JSON, answered with a window's name."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        posts = self.posts

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Type"] == "application/json"
                posts.append((self.path, json.loads(body)))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(posts[-1][1]["win"].encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_the_messages_of_lines(server: Server) -> None:
    sink = VisdomSink(server.port, environment="mine")
    sink.numbers({"step": 10, "loss": 0.5, "loss_q0": 0.7, "lr": 1e-3, "memory_gib": 1.0})
    sink.numbers({"step": 20, "loss": 0.25, "lr": 1e-3})
    sink.numbers({"step": 20, "val_dice": 0.8, "skipped": float("nan")})
    sink.close()
    assert {path for path, _ in server.posts} == {"/events"}
    assert {post["eid"] for _, post in server.posts} == {"mine"}
    last = {post["win"]: post for _, post in server.posts}
    assert last.keys() == {"loss", "lr", "validation", "run"}
    lines = {line["name"]: (line["x"], line["y"]) for line in last["loss"]["data"]}
    assert lines == {"loss": ([10, 20], [0.5, 0.25]), "loss_q0": ([10], [0.7])}
    assert all(line["type"] == "scatter" for line in last["loss"]["data"])
    assert last["loss"]["layout"]["title"] == last["loss"]["opts"]["title"] == "loss"


def test_the_message_of_a_picture(server: Server) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    sink = VisdomSink(server.port)
    sink.picture("sampling", pixels, 7)
    sink.close()
    ((path, post),) = server.posts
    assert (path, post["win"], post["eid"]) == ("/events", "sampling", "main")
    (data,) = post["data"]
    assert data["type"] == "image" and data["content"]["caption"] == "step 7"
    head, _, code = data["content"]["src"].partition(",")
    assert head == "data:image/png;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
    np.testing.assert_array_equal(shown, pixels)


@pytest.mark.slow
def test_a_real_server_keeps_lines_and_pictures(tmp_path: Path) -> None:
    """A real visdom, if it is installed, stores what was sent."""
    pytest.importorskip("visdom", reason="visdom is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from visdom.server.run_server import main; main()"
    flags = ["-port", str(port), "-bind_local", "-env_path", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", start, *flags]) as process:
        try:
            _wait_for(port)
            sink = VisdomSink(port, environment="mine", timeout=10)
            sink.numbers({"step": 10, "loss": 0.5, "lr": 1e-3})
            sink.numbers({"step": 20, "loss": 0.25, "lr": 1e-3})
            sink.picture("sampling", np.zeros((4, 5, 3), np.uint8), 7)
            sink.close(patience=20)
            body = json.dumps({"eid": "mine", "win": None}).encode()
            with urlopen(f"http://127.0.0.1:{port}/win_data", body, timeout=10) as answer:
                windows = json.loads(answer.read())
        finally:
            process.kill()
    assert windows.keys() == {"loss", "lr", "sampling"}
    (line,) = windows["loss"]["content"]["data"]
    assert (line["x"], line["y"]) == ([10, 20], [0.5, 0.25])
    assert windows["sampling"]["type"] == "image"
    assert windows["sampling"]["content"]["caption"] == "step 7"


def _wait_for(port: int) -> None:
    for _ in range(300):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"no server on port {port}")


def test_an_absent_server_does_not_delay_a_run() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert seconds_of(VisdomSink(port)) < 1


def test_a_server_that_never_answers_does_not_delay_a_run() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        sink = VisdomSink(silent.getsockname()[1], timeout=0.3)
        assert seconds_of(sink) < 1.5


def seconds_of(sink: VisdomSink) -> float:
    """Return how long 200 lines and pictures, and closing, delay a run."""
    started = time.monotonic()
    for step in range(200):
        sink.numbers({"step": step, "loss": 1.0})
        sink.picture("x", np.zeros((4, 4, 3), np.uint8), step)
    sink.close()
    return time.monotonic() - started


def test_a_restarted_server_gets_all_points(server: Server) -> None:
    sink = VisdomSink(1, pause=0.05)
    sink.numbers({"step": 1, "loss": 1.0})
    sink.close()
    time.sleep(0.1)
    sink.url = f"http://127.0.0.1:{server.port}"
    sink.numbers({"step": 2, "loss": 2.0})
    sink.close()
    assert server.posts[-1][1]["data"][0]["x"] == [1, 2]


def test_live_display_does_not_change_sampling(
    server: Server, brats: Path, trained: Path, tmp_path: Path
) -> None:
    for name, extra in (("plain", ()), ("shown", ("--visdom", server.port))):
        flags = ["--data_dir", brats / "testing", "--model_path", trained, "--sampler", "ddim"]
        flags += ["--steps", 9, "--num_ensemble", 2, "--out_dir", tmp_path / name, *extra]
        succeeded(script("segmentation_sample", *flags))
    shown = [post for _, post in server.posts]
    assert {(post["win"], post["eid"]) for post in shown} == {("sampling", "shown")}
    captions = [post["data"][0]["content"]["caption"] for post in shown]
    assert captions[-6:] == ["step 0", "step 2", "step 3", "step 5", "step 6", "step 8"]
    one, other = contents(tmp_path / "plain"), contents(tmp_path / "shown")
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name.endswith(".png"))


def test_an_absent_server_does_not_delay_sampling(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        flags = ["--data_dir", brats / "testing", "--model_path", trained, "--out_dir", tmp_path]
        flags += ["--steps", 2, "--visdom", silent.getsockname()[1]]
        succeeded(script("segmentation_sample", *flags))
    assert time.monotonic() - started < 60
    assert (tmp_path / "000005_mask.png").exists()


def test_live_display_does_not_change_training(
    server: Server, brats: Path, trained: Path, tmp_path: Path
) -> None:
    command = [*training(brats, tmp_path / "run"), "--max_steps", 4, "--visdom", server.port]
    succeeded(script("segmentation_train", *command))
    windows = [post["win"] for _, post in server.posts]
    assert {"loss", "gradient", "lr", "speed", "run", "batch", "sampling"} == set(windows)
    assert windows.count("sampling") == 2
    one, other = load_checkpoint(trained / LATEST), load_checkpoint(tmp_path / "run" / LATEST)
    assert all((one.model[name] == value).all() for name, value in other.model.items())
