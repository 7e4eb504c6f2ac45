"""Live displays of a run: a visdom server, and TensorBoard's event files.

Both are optional, and neither delays the run. They show the same numbers, in the same charts, and
the same pictures, under the same names. The visdom sink speaks the server's protocol (JSON over
HTTP) itself, so visdom need not be installed where training runs.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np

from guided_diffusion import logger
from guided_diffusion.errors import UserError
from guided_diffusion.files import expanded
from guided_diffusion.logger import Sink
from guided_diffusion.options.segmentation import LiveOptions, RunOptions
from guided_diffusion.report.canvas import Pixels, save_png

CHARTS = {
    "loss": r"(loss|mse|vb|ce|dice|coarse)(_|$)",
    "accuracy": r"acc",
    "gradient": r"grad_norm$",
    "lr": r"lr$",
    "speed": r"steps_per_s$",
    "validation": r"val_",
}
"""The charts and, as patterns, the numbers of each."""
OTHERS = "run"
"""The chart of all other numbers."""
_MOST_POINTS = 2000


def open_sinks(live: LiveOptions, run: RunOptions) -> list[Sink]:
    """Open the live displays that the flags ask for."""
    folder = expanded(run.out_dir)
    sinks: list[Sink] = []
    if live.tensorboard:
        sinks.append(TensorBoardSink(folder))
    if live.visdom:
        sinks.append(VisdomSink(live.visdom, environment=page_of(run)))
    return sinks


def shown_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Choose the numbers of a row of the log that are shown, under the names that all sinks use."""
    return {
        shown_name(name): float(value)
        for name, value in values.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def shown_name(name: str) -> str:
    """The name of a number or picture: TensorBoard allows letters, digits and ``-_./`` alone."""
    return re.sub(r"[^-/\w.]", "_", name)


def chart_of(name: str) -> str:
    """The chart that a number is a line of."""
    found = (chart for chart, pattern in CHARTS.items() if re.match(pattern, name))
    return next(found, OTHERS)


def page_of(run: RunOptions) -> str:
    """The visdom environment that a run draws on: the name of its result folder."""
    return expanded(run.out_dir).name or "main"


class VisdomSink:
    """Draws lines and pictures on a visdom server; without one, nothing happens.

    Messages wait in a short queue for a thread that posts them, and are dropped while the queue is
    full. After a failure nothing is posted for a while.

    Args:
        port: of the server, on this machine unless ``host`` names another.
        environment: the visdom environment (page) that the run draws on.
        timeout: seconds that a post may take.
        pause: seconds without a post after one that failed.
    """

    def __init__(
        self,
        port: int,
        *,
        environment: str = "main",
        host: str = "localhost",
        timeout: float = 2.0,
        pause: float = 30.0,
    ) -> None:
        self.url = f"http://{host}:{port}"
        self.environment = environment
        self.timeout, self.pause = timeout, pause
        self.lines: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
        self.queue: Queue[tuple[str, dict[str, Any]]] = Queue(maxsize=32)
        self._silent_until = 0.0
        self._opener = build_opener(ProxyHandler({}))  # a proxy is not on this machine
        self._thread: Thread | None = None

    def numbers(self, values: dict[str, Any]) -> None:
        """Draw a row of the log: one window for each chart, one line for each number."""
        step = float(values.get("step", 0))
        changed = {}
        for name, value in shown_numbers(values).items():
            chart = changed[chart_of(name)] = self.lines.setdefault(chart_of(name), {})
            xs, ys = chart.setdefault(name, ([], []))
            xs.append(step)
            ys.append(value)
            del xs[:-_MOST_POINTS], ys[:-_MOST_POINTS]
        for title, chart in changed.items():
            self._put(title, _line_chart(title, chart))

    def picture(self, name: str, pixels: Pixels, step: int) -> None:
        """Show a picture in the window of that name."""
        self._put(shown_name(name), _image(shown_name(name), pixels, step))

    def _put(self, window: str, message: dict[str, Any]) -> None:
        if self._thread is None:
            self._thread = Thread(target=self._work, daemon=True)
            self._thread.start()
        with suppress(Full):
            message |= {"win": window, "eid": self.environment}
            self.queue.put_nowait(("events", message))

    def close(self, patience: float = 2.0) -> None:
        """Wait at most ``patience`` seconds for the queue, unless the server does not answer."""
        limit = time.monotonic() + patience
        while self.queue.unfinished_tasks and time.monotonic() < limit:
            if time.monotonic() < self._silent_until:
                return
            time.sleep(0.02)

    def _work(self) -> None:
        while True:
            with suppress(Empty):
                endpoint, message = self.queue.get(timeout=60)
                if time.monotonic() >= self._silent_until:
                    self._post(endpoint, message)
                self.queue.task_done()

    def _post(self, endpoint: str, message: dict[str, Any]) -> None:
        body = json.dumps(message).encode()
        request = Request(f"{self.url}/{endpoint}", body, {"Content-Type": "application/json"})
        try:
            self._opener.open(request, timeout=self.timeout).close()
        except Exception:  # no failure of the server may end the run
            self._silent_until = time.monotonic() + self.pause


def _line_chart(title: str, lines: dict[str, tuple[list[float], list[float]]]) -> dict[str, Any]:
    """The message of the complete chart, so that a restarted server has it all."""
    data = [
        {"x": list(xs), "y": list(ys), "name": name, "type": "scatter", "mode": "lines"}
        for name, (xs, ys) in lines.items()
    ]
    layout = {
        "title": title,
        "showlegend": len(lines) > 1,
        "xaxis": {"title": "step"},
        "margin": {"l": 60, "r": 20, "t": 40, "b": 40},
    }
    return {"data": data, "layout": layout, "opts": {"title": title}}


def _image(name: str, pixels: Pixels, step: int) -> dict[str, Any]:
    file = io.BytesIO()
    save_png(pixels, file)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = {"src": source, "caption": f"step {step}"}
    height, width = np.shape(pixels)[:2]
    shown = {"title": name, "width": min(width + 20, 1300), "height": min(height + 60, 900)}
    return {"data": [{"content": content, "type": "image"}], "opts": shown}


class TensorBoardSink:
    """Writes TensorBoard's event files; its page of custom scalars has the charts.

    After a failure, such as a full disk, nothing more is written.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "--tensorboard",
                "the package tensorboard is not installed",
                "Run python -m pip install tensorboard, or omit --tensorboard.",
            ) from None
        self.writer = SummaryWriter(str(folder))
        rest = f"(?!{'|'.join(CHARTS.values())}).+"
        charts = {**CHARTS, OTHERS: rest}
        layout = {chart: ["Multiline", [f"^{pattern}"]] for chart, pattern in charts.items()}
        self.writer.add_custom_scalars({"guided-diffusion": layout})

        self.failed = False

    def numbers(self, values: dict[str, Any]) -> None:
        """Write a row of the log."""
        for name, value in shown_numbers(values).items():
            self._try(self.writer.add_scalar, name, value, int(values.get("step", 0)))

    def picture(self, name: str, pixels: Pixels, step: int) -> None:
        """Write a picture."""
        self._try(self.writer.add_image, shown_name(name), pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is buffered."""
        self._try(self.writer.close)

    def _try(self, write: Callable[..., object], *values: Any, **how: Any) -> None:
        if self.failed:
            return
        try:
            write(*values, **how)
        except Exception as error:  # no failure of a display may end the run
            self.failed = True
            logger.log(f"nothing more is written for TensorBoard: {error}")
