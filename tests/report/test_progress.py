"""Progress off a terminal: a line now and then, also while a step takes long."""

import re
import time

from guided_diffusion.report import progress
from guided_diffusion.report.progress import FIRST, LATE, LATER, Progress


def lines_of(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_line_has_speed_time_left_and_loss(capsys):
    with Progress(unit="step", total=1000, initial=100, first=0, later=60) as bar:
        bar.started -= 10
        bar.step(20, say=lambda: "loss 0.1234")
        bar.step(say=lambda: "not due")
    (line,) = lines_of(capsys)
    found = re.fullmatch(r"step 120 of 1000, (\S+) steps/s, (\d+) min left, loss 0.1234", line)
    assert found and 1.8 < float(found[1]) <= 2 and found[2] == "7"


def test_without_an_end_there_is_no_time_left(capsys):
    with Progress(unit="case", first=0) as bar:
        bar.started -= 40
        bar.step(2)
    assert lines_of(capsys) == ["case 2, 20 s a case"]


def test_a_long_step_does_not_silence_it(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LATE", 0.0)
    with Progress(unit="step", total=5, first=0.05, later=0.05):
        time.sleep(0.6)
    lines = lines_of(capsys)
    assert len(lines) > 1 and all(
        re.fullmatch(r"step 0 of 5, 0 s in the first|.*1 s.*", x) for x in lines
    )


def test_a_quiet_one_says_nothing_and_the_end_stops_the_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LATE", 0.0)
    with Progress(unit="step", total=5, quiet=True, first=0) as bar:
        bar.step(say=lambda: 1 / 0)
    with Progress(unit="step", total=5, first=0.1):
        pass
    time.sleep(0.3)
    assert lines_of(capsys) == []


def test_the_first_line_comes_within_30_seconds_and_later_ones_within_a_minute():
    assert FIRST + LATE < 30
    assert LATER + LATE < 60
