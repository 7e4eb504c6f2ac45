"""Jobs that share the cases of a folder: the same masks, and only their own files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import DIFFUSION, NETWORK, contents, read_csv, refused, script, succeeded
from inference.test_predict import cases_in_memory, make_segmenter

from guided_diffusion import logger
from guided_diffusion.data.classes import find_classes, record_text
from guided_diffusion.data.datasets import Entry
from guided_diffusion.data.jobs import JOBS, UNFINISHED, Job, parse_job, record_parts, write_jobs
from guided_diffusion.errors import UserError
from guided_diffusion.inference import predict, record
from guided_diffusion.inference.predict import segment
from guided_diffusion.inference.record import Record
from guided_diffusion.tools import phantom_folders

NOTES = ("sampling.json", "config.yaml", "report.html", JOBS)


def sampling(data: Path, model: Path, out: Path, *more: object) -> list[object]:
    """Flags for two evaluations and two members, one case at a time."""
    return [
        *("--data_dir", data, "--model_path", model, "--out_dir", out, "--batch_size", 2),
        *("--dpm_solver", True, "--steps", 2, "--num_ensemble", 2, *more),
    ]


def masks(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the records of its runs."""
    return {
        name: content
        for name, content in contents(folder).items()
        if name not in NOTES and not name.endswith(".csv")
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("17/16", "--job 17/16: there is no job 17 of 16. Count jobs from 1 to 16, in SLURM with"),
        ("0/16", "--job 0/16: there is no job 0 of 16"),
        ("1/0", "--job 1/0: there is no job 1 of 0. Write for example"),
        ("3", "--job 3: is not a job and the number of jobs"),
        ("/16", "in a SLURM array --job $SLURM_ARRAY_TASK_ID/16"),
        ("-1/16", "is not a job"),
        ("1/16/2", "is not a job"),
        ("\u0661/16", ""),
        ("1/999999", "at most 100000"),
    ],
)
def test_jobs_that_there_are_not(text: str, problem: str) -> None:
    if not problem:
        assert parse_job(text) == Job(1, 16)
        return
    with pytest.raises(UserError, match=re.escape(problem)):
        parse_job(text)


def test_a_wrong_job_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    message = refused(
        script("segmentation_sample", *sampling(tmp_path, tmp_path, tmp_path), "--job", "17/16")
    )
    assert "there is no job 17 of 16" in message and contents(tmp_path) == {}


def test_every_case_is_one_job_s_and_volumes_are_not_divided() -> None:
    entries = [Entry(f"v{v}_slice{s:03d}", (), None, s) for v in range(7) for s in range(3)]
    entries += [Entry(f"x{number}", (), None) for number in range(6)]
    for of in (1, 2, 3, 5, 20):
        shares = [Job(number, of).share(entries) for number in range(1, of + 1)]
        assert sorted(index for share in shares for index in share) == list(range(len(entries)))
        volumes = [{entries[index].volume for index in share} - {""} for share in shares]
        assert sum(map(len, volumes)) == 7
        groups = [len({entries[i].volume or entries[i].name for i in share}) for share in shares]
        assert max(groups) - min(groups) <= 1


def test_the_jobs_together_draw_what_one_run_draws(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    one, jobs = tmp_path / "one", tmp_path / "jobs"
    data = brats / "training"
    succeeded(script("segmentation_sample", *sampling(data, trained, one)))
    for number in (3, 1, 5, 2):  # of 4 cases: the fifth has nothing to do
        said = succeeded(
            script("segmentation_sample", *sampling(data, trained, jobs, "--job", f"{number}/5"))
        )
        assert f"predictions-{number}-of-5.csv" in said
        last = f"--inp_pth {jobs} --out_pth {data} --job {number}/5"
        assert said.splitlines()[-1] == f"next: python scripts/segmentation_env.py {last}"
    dry = sampling(data, trained, jobs, "--job", "4/5", "--dry_run", True)
    assert "dry run: 1 case would" in succeeded(script("segmentation_sample", *dry))
    scoring = ["--out_pth", data, "--report", False]
    message = refused(script("segmentation_env", "--inp_pth", jobs, *scoring))
    assert "job 4/5 lacks 1 of 1 case (" in message and "Sample again with --job 4/5" in message
    assert "job 1/5" not in message and "job 5/5" not in message
    name = read_csv(one / "predictions.csv")[3]["name"]
    partial = succeeded(script("segmentation_env", "--inp_pth", jobs, *scoring, "--partial", True))
    assert f"left out: job 4/5 lacks 1 of 1 case ({name})" in partial
    assert len(read_csv(jobs / "scores.csv")) == 3

    succeeded(script("segmentation_sample", *sampling(data, trained, jobs, "--job", "4/5")))
    assert masks(one) == {k: v for k, v in masks(jobs).items() if k != "summary.json"}
    for folder in (one, jobs):
        assert "left out" not in succeeded(
            script("segmentation_env", "--inp_pth", folder, *scoring)
        )
    for table in ("scores.csv", "masks.csv", "patients.csv"):
        assert (one / table).read_bytes() == (jobs / table).read_bytes()
    summary = json.loads((jobs / "summary.json").read_text())
    assert summary["settings"] == 1 and summary["unfinished"] == []

    given = yaml.safe_load((jobs / "config.yaml").read_text())["sample"]["given"]
    assert "job" not in given, "--config of this file would draw a part alone"
    said = succeeded(script("segmentation_sample", *sampling(data, trained, jobs)))
    assert "4 of 4 cases are finished and kept" in said
    assert not record_parts(jobs) and not (jobs / JOBS).exists()
    own, joined = (read_csv(folder / "predictions.csv") for folder in (one, jobs))
    assert [{**row, "seconds": ""} for row in own] == [{**row, "seconds": ""} for row in joined]


@pytest.mark.slow
def test_jobs_write_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    phantom_folders.write_brats_volumes(tmp_path, 3, patients=4, size=24, slices=12, training=0.25)
    flags = ("--out_dir", tmp_path / "run", "--max_steps", 1, *NETWORK, *DIFFUSION)
    succeeded(script("segmentation_train", "--data_dir", tmp_path / "training", *flags))
    one, two = tmp_path / "one", tmp_path / "two"
    for out, job in ((one, ""), (two, "2/2"), (two, "1/2")):
        more = ("--slices", "3:7", "--job", job)
        line = sampling(tmp_path / "testing", tmp_path / "run", out, *more)
        succeeded(script("segmentation_sample", *line))
    assert len(list(two.glob("*.nii.gz"))) == 9 and masks(one) == masks(two)


def inode(path: Path) -> tuple[int, int]:
    """What changes when a file is written anew or changed."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def run(folder: Path, job: Job | None = None, fingerprint: str = "f", **named: Any) -> list[str]:
    """Segment three cases in memory."""
    return segment(
        make_segmenter(), cases_in_memory(), folder, fingerprint=fingerprint, job=job, **named
    )


def interrupt_after(count: int, patch: pytest.MonkeyPatch) -> None:
    """Interrupt the writing of a case after so many, at its second file."""
    write, done = predict.write_case, []

    def interrupted(out_dir: Path, case: Any, result: Any, **more: Any) -> None:
        if len(done) == count:
            (out_dir / f"{case.name}_mask.png").unlink(missing_ok=True)
            raise KeyboardInterrupt
        done.append(case.name)
        write(out_dir, case, result, **more)

    patch.setattr(predict, "write_case", interrupted)


def test_a_job_that_was_killed_continues_its_own_part(tmp_path: Path, quiet: None) -> None:
    run(tmp_path, Job(2, 2))
    others = {name: inode(tmp_path / name) for name in contents(tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, Job(1, 2))
    (row,) = read_csv(tmp_path / "predictions-1-of-2.csv")
    before = inode(tmp_path / f"{row['name']}_mask.png")
    assert run(tmp_path, Job(1, 2)) == ["case0", "case2"]
    assert inode(tmp_path / f"{row['name']}_mask.png") == before
    assert len(read_csv(tmp_path / "predictions-1-of-2.csv")) == 2
    assert {name: inode(tmp_path / name) for name in others} == others
    assert run(tmp_path) == ["case0", "case1", "case2"]
    assert [row["name"] for row in read_csv(tmp_path / "predictions.csv")] == [
        *("case0", "case1", "case2")
    ]


def test_a_case_that_a_job_was_drawing_anew_is_nobody_s(tmp_path: Path, quiet: None) -> None:
    """A run of the earlier settings would take what the killed job has left for its own."""
    run(tmp_path, fingerprint="old")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, Job(1, 2), "new")
    known = {row["name"]: row["fingerprint"] for row in read_csv(tmp_path / "predictions.csv")}
    assert known == dict.fromkeys(["case0", "case1", "case2"], "old"), "others may be reading it"
    own = {r["name"]: r["fingerprint"] for r in read_csv(tmp_path / "predictions-1-of-2.csv")}
    assert own == {"case0": "new", "case2": UNFINISHED}
    again = Record(tmp_path, "old", job=Job(2, 3), names=["case1", "case2"])
    assert again.finished("case1") and not again.finished("case2")
    assert not again.is_uniform
    run(tmp_path, fingerprint="old")
    assert {row["fingerprint"] for row in read_csv(tmp_path / "predictions.csv")} == {"old"}


def test_records_of_another_number_of_jobs_count_by_their_age(tmp_path: Path, quiet: None) -> None:
    for number in (1, 2):
        run(tmp_path, Job(number, 2), "first")
    run(tmp_path, Job(1, 3), "second")  # draws case0 anew
    record = Record(tmp_path, "first", job=Job(1, 2), names=["case0", "case2"])
    assert not record.finished("case0") and record.finished("case2")
    before = contents(tmp_path)
    run(tmp_path, Job(1, 3), "second")
    assert contents(tmp_path) == before


def test_a_record_that_another_job_is_writing_is_left_alone(tmp_path: Path, quiet: None) -> None:
    run(tmp_path, Job(1, 2))
    other = tmp_path / "predictions-1-of-2.csv"
    torn = other.read_bytes()[:-9]
    other.write_bytes(torn)
    run(tmp_path, Job(2, 2))
    assert other.read_bytes() == torn and not list(tmp_path.glob("*.damaged"))


def test_results_of_other_classes_are_refused_by_jobs_too(
    brats: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    succeeded(
        script("segmentation_sample", *sampling(brats / "testing", trained, out, "--job", "1/2"))
    )
    classes = find_classes("a=1")
    assert classes is not None
    (out / "classes.json").write_text(record_text(classes))
    before = contents(out)
    done = script("segmentation_sample", *sampling(brats / "testing", trained, out, "--job", "2/2"))
    assert "classes" in refused(done) and contents(out) == before


def test_what_a_job_looks_at_grows_with_its_own_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100,000 cases, a job that continues opens the files of its own alone."""
    logger.configure(quiet=True)
    entries = [Entry(f"case{number:06d}", (), None) for number in range(100_000)]
    job = Job(3, 1000)
    names = [entries[index].name for index in job.share(entries)]
    for number in (3, 4):
        part = Job(number, job.of)
        with (tmp_path / part.record).open("w", newline="") as file:
            file.write("name,members,area,fingerprint\n")
            for index in part.share(entries):
                file.write(f"{entries[index].name},2,7,f\n")
    write_jobs(tmp_path, job.of, entries)
    noted = inode(tmp_path / JOBS)
    write_jobs(tmp_path, job.of, entries)
    assert inode(tmp_path / JOBS) == noted

    opened: list[Path] = []
    monkeypatch.setattr(record, "is_whole_png", lambda path: not opened.append(path))
    own = Record(tmp_path, "f", job=job, names=names)
    assert own.rows.keys() == {*names} and all(map(own.finished, names))
    assert len(opened) == 4 * len(names) == 400


def test_scoring_says_whose_cases_are_missing(brats: Path, trained: Path, tmp_path: Path) -> None:
    """A case whose files are there and whose row is not was being written."""
    out, data = tmp_path / "out", brats / "training"
    for number in (1, 2):
        succeeded(
            script("segmentation_sample", *sampling(data, trained, out, "--job", f"{number}/2"))
        )
    part = out / "predictions-2-of-2.csv"
    header, first, second = part.read_text().splitlines(keepends=True)
    part.write_text(header + first)
    name = second.split(",")[0]
    scoring = ["--inp_pth", out, "--out_pth", data, "--report", False]
    assert f"job 2/2 lacks 1 of 2 cases ({name})" in refused(script("segmentation_env", *scoring))
    succeeded(script("segmentation_env", *scoring, "--partial", True))
    assert name not in {row["name"] for row in read_csv(out / "scores.csv")}
    (out / JOBS).write_text('{"cases": 3}')
    assert f"{JOBS}: is damaged" in refused(script("segmentation_env", *scoring))
    shutil.rmtree(out)
