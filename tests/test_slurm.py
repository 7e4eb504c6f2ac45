"""The scripts for SLURM in docs/training.md run as printed, with stand-ins for SLURM's commands.

``srun`` starts a command once for each node, all on this machine; ``sbatch`` runs a script, all
jobs of an array at once. Commands of the suite are shrunk by further flags.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import DIFFUSION, NETWORK, ROOT, environment, read_csv, script, succeeded
from test_docs import blocks

from guided_diffusion.checkpoint import LATEST, load_checkpoint

PAGE = ROOT / "docs/training.md"
TITLES = ("One node", "Several nodes", "An array of jobs", "Preemption and time limits")
OPTIONS = {  # of sbatch: what their values look like
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "gpus": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d\d:\d\d:\d\d",
    "signal": r"(B:)?TERM@\d+",
    "array": r"1-\d+",
    "open-mode": "append",
    "requeue": "",
}
STAND_INS = {
    "srun": 'for node in $(seq "${SLURM_NNODES:-1}"); do "$@" & done; '
    "trap 'kill -TERM $(jobs -p); wait $(jobs -p)' TERM; code=0; "
    "for job in $(jobs -p); do wait $job || code=$?; done; exit $code",
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >> "$NOTES/requeued"; else '
    "echo localhost; echo localhost; fi",
    "torchrun": 'exec "$PYTHON" -W ignore -m torch.distributed.run --local_addr=127.0.0.1 '
    '"${@/nproc_per_node=4/nproc_per_node=2}" $SHRINK_TRAIN',
    "guided-diffusion": 'name=SHRINK_${1^^}; exec "$PYTHON" -m guided_diffusion "$@" ${!name}',
    "sbatch": 'if [ "$1" = --parsable ]; then shift; fi; for part in "${@:1:$#-1}"; do '
    '[ "$part" = --dependency=afterany:7 ] || exit 9; done; script="${@: -1}"; '
    'last=$(sed -n "s/^#SBATCH --array=1-//p" "$script"); for task in $(seq "${last:-1}"); do '
    'SLURM_ARRAY_TASK_ID=$task bash "$script" >> "$NOTES/log-$task" 2>&1 & done; wait; echo 7',
}


def scripts() -> dict[str, list[str]]:
    """The blocks of shell below each of the titles."""
    text = PAGE.read_text("utf-8").partition("## SLURM")[2]
    found = {}
    for part in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        title, _, rest = part.partition("\n")
        found[title] = re.findall(r"^```bash\n(.*?)^```$", rest, re.DOTALL | re.MULTILINE)
    return found


def test_the_page_has_the_scripts_that_are_run_here() -> None:
    found = scripts()
    assert tuple(found) == TITLES
    below = [text for texts in found.values() for text in texts]
    everywhere = [text for _, text in blocks(PAGE) if "sbatch" in text or "#SBATCH" in text]
    assert below == everywhere and len(below) == 6


@pytest.mark.parametrize("title", TITLES)
def test_every_line_for_sbatch_is_one(title: str) -> None:
    for text in scripts()[title]:
        if not text.startswith("#!/bin/bash\n"):
            continue
        for line in re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE):
            (word,) = shlex.split(line)
            name, _, value = word.removeprefix("--").partition("=")
            assert word.startswith("--") and re.fullmatch(OPTIONS[name], value), line
        exported = dict(re.findall(r'^export (\w+)="?(.*?)"?$', text, re.MULTILINE))
        assert exported["SRUN_CPUS_PER_TASK"] == "$SLURM_CPUS_PER_TASK"
        if "torchrun" in text:
            limit = re.search(r"--signal=TERM@(\d+)", text)
            assert limit and 30 < int(exported["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < int(limit[1])


class Cluster:
    """A folder that looks like a clone, and the environment of a job there."""

    def __init__(self, place: Path, brats: Path) -> None:
        self.place, self.notes = place, place / "notes"
        programs = place / "programs"
        for folder in (self.notes, programs, place / "data"):
            folder.mkdir()
        for name in ("scripts", "guided_diffusion"):
            (place / name).symlink_to(ROOT / name)
        for part in ("training", "testing"):
            (place / "data" / part).symlink_to(brats / part)
        for name, body in STAND_INS.items():
            (programs / name).write_text(f"#!/bin/bash\n{body}\n")
            (programs / name).chmod(0o755)
        train = [*NETWORK, *DIFFUSION, "--batch_size", "2", "--num_workers", "0"]
        train += ["--precision", "fp32", "--save_interval", "2", "--log_interval", "1"]
        self.environment = environment() | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "NOTES": str(self.notes),
            "SHRINK_TRAIN": " ".join([*train, "--max_steps", "4"]),
            "SHRINK_SAMPLE": "--steps 1 --num_ensemble 1",
            "SHRINK_SCORE": "--report False",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[01-02]",
            "SLURM_CPUS_PER_TASK": "2",
        }

    def start(self, text: str, **variables: str) -> subprocess.Popen[str]:
        """Run a script in bash, as a job of its own process group."""
        return subprocess.Popen(
            ["bash", "-c", text],
            cwd=self.place,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, text: str, **variables: str) -> str:
        """Run a script to its end, which has to be a good one."""
        job = self.start(text, **variables)
        said, _ = job.communicate(timeout=300)
        assert job.returncode == 0, said[-3000:]
        return said


@pytest.fixture
def cluster(brats: Path, tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, brats)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.slow
def test_one_node_trains_and_continues(cluster: Cluster) -> None:
    (text,) = scripts()["One node"]
    cluster.run(text)
    again = cluster.environment["SHRINK_TRAIN"].replace("--max_steps 4", "--max_steps 6")
    assert "step 4" in cluster.run(text, SHRINK_TRAIN=again)
    assert load_checkpoint(cluster.place / "results/node" / LATEST).step == 6


@pytest.mark.slow
def test_two_nodes_train_as_one_job(cluster: Cluster) -> None:
    (text,) = scripts()["Several nodes"]
    text = text.replace("29500", str(free_port()))
    cluster.run(text, SLURM_NNODES="2", GLOO_SOCKET_IFNAME="lo")
    again = cluster.environment["SHRINK_TRAIN"].replace("--max_steps 4", "--max_steps 6")
    cluster.run(text, SLURM_NNODES="2", GLOO_SOCKET_IFNAME="lo", SHRINK_TRAIN=again)
    folder = cluster.place / "results/slurm"
    assert load_checkpoint(folder / LATEST).step == 6
    samples = [int(row["samples"]) for row in read_csv(folder / "progress.csv")]
    assert samples == [8, 16, 24, 32, 40, 48], "four processes of two images"


@pytest.mark.slow
def test_an_array_draws_and_scores_together(cluster: Cluster) -> None:
    sample, score, submit = scripts()["An array of jobs"]
    train = cluster.environment["SHRINK_TRAIN"].split()
    flags = ["--data_dir", cluster.place / "data/training", "--out_dir"]
    succeeded(script("segmentation_train", *flags, cluster.place / "results/node", *train))
    (cluster.place / "sample.sh").write_text(sample.replace("1-16", "1-2").replace("/16", "/2"))
    (cluster.place / "score.sh").write_text(score)
    cluster.run(submit)
    folder = cluster.place / "results/node/masks"
    logs = "".join(path.read_text() for path in cluster.notes.glob("log-*"))
    assert len(read_csv(folder / "scores.csv")) == 2, logs
    assert (folder / "predictions-1-of-2.csv").exists() and "dice is" in logs
    assert all(f"1 case of job {job}/2 scored" in logs for job in (1, 2))
    assert not list(folder.glob("scores-*"))


@pytest.mark.slow
def test_a_job_that_is_told_to_end_is_queued_again(cluster: Cluster) -> None:
    (text,) = scripts()["Preemption and time limits"]
    folder = cluster.place / "results/preempted"
    endless = cluster.environment["SHRINK_TRAIN"].replace("--max_steps 4", "--max_steps 0")
    job = cluster.start(text, SHRINK_TRAIN=endless)
    deadline = time.monotonic() + 120
    while not (folder / "savedmodel000002.pt").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)  # to the shell alone, as B: in --signal says
    said, _ = job.communicate(timeout=120)
    step = load_checkpoint(folder / LATEST).step
    assert (cluster.notes / "requeued").read_text() == "7\n", said
    ended = endless.replace("--max_steps 0", f"--max_steps {step + 1}")
    cluster.run(text, SHRINK_TRAIN=ended, SLURM_RESTART_COUNT="1")
    assert load_checkpoint(folder / LATEST).step == step + 1
    assert (cluster.notes / "requeued").read_text() == "7\n", "it has ended by itself"
