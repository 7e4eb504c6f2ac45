"""Jobs score parts of the cases, and one run joins them: the same tables, or what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import refused, script, succeeded
from scoring.test_pool import tables, write_members

from guided_diffusion.data.jobs import Job, divided
from guided_diffusion.errors import UserError
from guided_diffusion.scoring.evaluate import evaluate_all, score_job
from guided_diffusion.scoring.tables import write_tables
from guided_diffusion.tools.phantom_layouts import write_layout


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Truths of five cases, and masks beside each."""
    truth, masks = tmp_path / "gt", tmp_path / "pred"
    write_layout("isic2018", truth, 0, patients=9, slices=1, size=24, training=0)
    write_members(masks, truth)
    return truth, masks


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("scores-*"))


@pytest.mark.parametrize(
    ("layout", "labels"),
    [("isic2018", ""), ("isic2018", "a=255"), ("msd", ""), ("lidc", ""), ("acdc", "")],
)
def test_joined_scores_are_those_of_one_run(
    layout: str, labels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures, volumes that are not divided, several raters, declared classes: bit for bit."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    truth, masks = tmp_path / "gt", tmp_path / "pred"
    write_layout(layout, truth, 0, patients=9, slices=4, size=24, training=0.5)
    write_members(masks, truth)
    for path in sorted(masks.glob("*.png")) if labels else ():
        path.rename(path.with_name(f"{path.stem}_a.png"))
    how: dict[str, Any] = {"mask_labels": labels}
    one = evaluate_all(masks, truth, **how)
    alone = tables(masks)
    assert len(alone) >= 4
    for path in masks.glob("*.csv"):
        if path.name != "predictions.csv":
            path.unlink()
    counts = [score_job(masks, truth, Job(number, 3), **how)[1] for number in (3, 1, 2)]
    assert sum(counts) == len(one.cases) and min(counts) > 0
    joined = evaluate_all(masks, truth, **how)
    assert tables(masks) == alone and parts(masks) == []
    assert str(joined.scores) == str(one.scores)
    assert [case[0].name for case in joined.cases] == [case[0].name for case in one.cases]


def test_the_command_scores_a_part_and_names_those_that_are_missing(
    folders: tuple[Path, Path],
) -> None:
    truth, masks = folders
    line = ["--inp_pth", masks, "--out_pth", truth, "--report", False]
    whole = succeeded(script("segmentation_env", *line))
    alone = tables(masks)
    for number in (1, 3):
        said = succeeded(script("segmentation_env", *line, "--job", f"{number}/3"))
        assert f"of job {number}/3 scored" in said and "next, once all jobs have ended: " in said
    message = refused(script("segmentation_env", *line))
    assert re.search(r"pred: job 2/3 has not scored 2 of 2 cases \(\w+, \w+\)\. ", message)
    assert "Score again with --job 2/3" in message and len(parts(masks)) == 2
    said = succeeded(script("segmentation_env", *line, "--partial", True))
    assert "left out: job 2/3 has not scored 2 of 2 cases" in said and len(parts(masks)) == 2
    succeeded(script("segmentation_env", *line, "--job", "2/3"))
    joined = succeeded(script("segmentation_env", *line))
    assert joined == whole and tables(masks) == alone and parts(masks) == []


@pytest.mark.parametrize(
    ("job", "problem"), [("4/3", "there is no job 4 of 3"), ("x", "is not a job and the number")]
)
def test_a_wrong_job_is_refused(job: str, problem: str, folders: tuple[Path, Path]) -> None:
    truth, masks = folders
    message = refused(
        script("segmentation_env", *("--inp_pth", masks, "--out_pth", truth), "--job", job)
    )
    assert f"--job {job}: {problem}" in message and parts(masks) == []


def test_two_folders_are_not_compared_by_jobs(folders: tuple[Path, Path]) -> None:
    truth, masks = folders
    line = ["--compare", masks, masks, "--out_pth", truth, "--job", "1/2"]
    assert "--job: has no effect with --compare" in refused(script("segmentation_env", *line))


def test_scores_of_masks_that_were_drawn_anew_do_not_count(folders: tuple[Path, Path]) -> None:
    truth, masks = folders
    for number in (1, 2):
        score_job(masks, truth, Job(number, 2))
    changed = sorted(masks.glob("*_output_ens.png"))[1]
    other = sorted(masks.glob("*_output_ens.png"))[0]
    changed.write_bytes(other.read_bytes())
    name = changed.name.removesuffix("_output_ens.png")
    with pytest.raises(UserError, match=rf"job 2/2 has not scored 1 of 2 cases \({name}\)"):
        evaluate_all(masks, truth)
    score_job(masks, truth, Job(2, 2))
    joined = evaluate_all(masks, truth).summary
    assert joined == evaluate_all(masks, truth).summary


def test_parts_that_do_not_belong_together_are_refused(folders: tuple[Path, Path]) -> None:
    truth, masks = folders
    path, _ = score_job(masks, truth, Job(1, 1))
    with pytest.raises(UserError, match=r"was scored with plane 'axial', not 'coronal'"):
        evaluate_all(masks, truth, plane="coronal")
    score_job(masks, truth, Job(1, 2))
    with pytest.raises(UserError, match="scores of 1 jobs and of 2 jobs"):
        evaluate_all(masks, truth)
    (masks / "scores-1-of-2.jsonl").unlink()
    text = path.read_text()
    for wrong in ("", "[1]\n", text.replace('"rows"', '"rows2"'), text[: len(text) // 2]):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"scores-1-of-1.jsonl: is damaged|has not scored"):
            evaluate_all(masks, truth)
    path.write_text(text)
    assert evaluate_all(masks, truth).summary["cases"] == 5


def test_a_job_scores_what_the_same_job_has_drawn(folders: tuple[Path, Path]) -> None:
    """The others may still be drawing; a case of no job is somebody's too."""
    truth, masks = folders
    names = sorted(path.name.removesuffix("_output_ens.png") for path in masks.glob("*_ens.png"))
    own = [names[3], names[0]]
    drawn = {"jobs": 2, "cases": [names[1:3], own]}
    (masks / "jobs.json").write_text(json.dumps(drawn))
    (masks / "predictions.csv").unlink()
    rows = "".join(f"{name},f\n" for name in own)
    (masks / "predictions-2-of-2.csv").write_text(f"name,fingerprint\n{rows}")
    assert divided(masks, 2, dict.fromkeys(names, "")) == [[*names[1:3], names[4]], own]
    assert score_job(masks, truth, Job(2, 2))[1] == 2
    with pytest.raises(
        UserError, match=r"job 1/2 lacks 2 of 2 cases .* Sample again with --job 1/2"
    ):
        score_job(masks, truth, Job(1, 2))


def test_two_runs_may_join_the_same_parts(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts go when the first one has written its tables, which are those of the second."""
    truth, masks = folders
    for number in (1, 2):
        score_job(masks, truth, Job(number, 2))

    def written_by_both(*arguments: Any) -> None:
        write_tables(*arguments)
        for path in masks.glob("scores-*"):
            path.unlink()

    monkeypatch.setattr("guided_diffusion.scoring.evaluate.write_tables", written_by_both)
    assert len(evaluate_all(masks, truth).cases) == 5 and parts(masks) == []
