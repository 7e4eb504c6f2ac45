"""Compare methods of weak supervision: masks from image-level labels, scored against true masks.

    python benchmarks/weak.py
    python benchmarks/weak.py --src_dir $REAL_DATA/brats15_weak_128 --augment --out results/brats

trains a diffusion of images and a classifier on labels alone and, as an upper bound, a segmenter on
masks; then prints one Markdown table of all methods. Without ``--src_dir`` it makes phantoms, whose
lesions are not the brightest structure. Every stage runs one of the scripts in one thread, and a
second run resumes the first; ``--write`` saves the table to a file. Times are CPU times.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

MAPS = ("level", "steps", "stride", "tau", "noises", "smooth", "classifier_scale")
ROOT = Path(__file__).resolve().parents[1]
NETWORK = ["--num_channels", "32", "--num_res_blocks", "1", "--num_heads", "1"]
METHODS = {
    "CDM": ["--method", "cdm"],
    "CG-CDM": ["--method", "cg-cdm"],
    "one branch": ["--method", "one-branch"],
    "counterfactual": ["--method", "counterfactual"],
    "counterfactual, guided": ["--method", "counterfactual", "--guided"],
    "Grad-CAM": ["--method", "gradcam"],
    "Grad-CAM, absolute, half size": [
        *("--method", "gradcam", "--difference", "absolute", "--cam_shrink", "2"),
    ],
    "Otsu on the image": ["--method", "otsu"],
}


def main() -> None:
    options = parse()
    out = options.out.resolve()
    src = options.src_dir or out / "phantoms"
    stages = Stages(out / "minutes.json")
    train(options, src, out, stages)
    segment(options, src, out)
    text = table(out, src, stages.minutes, options)
    print(text)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text + "\n", encoding="utf-8")


def train(options: argparse.Namespace, src: Path, out: Path, stages: Stages) -> None:
    """Make phantoms if needed; train image diffusion, classifier and supervised segmenter."""
    if options.src_dir is None and not (src / "validate").exists():
        run(
            *("make_phantoms", "--layout", "weak", "--out", src, "--seed", options.seed),
            *("--patients", options.patients, "--split", 0.9),
        )
    data = ["--src_dir", src, "--save_dir", out]
    size = ["--image_size", options.image_size, "--augment", options.augment]
    common = [*size, "--log_interval", 50, "--save_interval", 500, "--keep", 1, "--resume", "auto"]
    noise = ["--timestep_respacing", options.times]
    stages.run(
        "diffusion",
        *("train_tumor_ddfm", *data, *common, *noise, *NETWORK, "--channel_mult", "1,2,4"),
        *("--attention_resolutions", "8", "--class_cond", True, "--predict_v", True),
        *("--batch_size", 32, "--lr", 1e-3, "--ema_rate", "0.99"),
        *("--max_steps", options.diffusion_iterations),
    )
    stages.run(
        "classifier",
        *("classifier_tumor_train", *data, *common, *noise, "--classifier_width", 32),
        *("--classifier_depth", 1, "--classifier_attention_resolutions", "8"),
        *("--batch_size", 32, "--lr", 1e-3, "--ema_rate", "0.99"),
        *("--iterations", options.classifier_iterations),
    )
    stages.run(
        "supervised",
        *("segmentation_train", "--data_dir", src / "training", "--out_dir", out / "supervised"),
        *(*common, *NETWORK, "--channel_mult", "1,2,4", "--attention_resolutions", "8"),
        *("--predict_xstart", True, "--mask_range=-1,1", "--batch_size", 32, "--lr", 1e-3),
        *("--ema_rate", "0.99", "--max_steps", options.supervised_iterations),
    )


def segment(options: argparse.Namespace, src: Path, out: Path) -> None:
    """Draw and score the masks of all methods."""
    data = ["--src_dir", src, "--save_dir", out]
    maps = [word for name in MAPS for word in (f"--{name}", getattr(options, name))]
    maps += ["--batch_size", 30, *options.cut.split()]
    for name, words in METHODS.items():
        run("image_p_seg", *data, *maps, *words, "--results_dir", out / folder_of(name))
    labelled = ["--method", "otsu", "--label", "classifier"]
    run("image_p_seg", *data, *labelled, "--results_dir", out / folder_of("classifier"))
    supervised = out / folder_of("supervised")
    run("segmentation_sample", "--data_dir", src / "validate", "--model_path", out / "supervised",
        "--out_dir", supervised, "--dpm_solver", True, "--steps", 5)  # fmt: skip
    run("segmentation_env", "--inp_pth", supervised, "--out_pth", src / "validate")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--augment", action="store_true", help="augment the images in all three trainings")
    add("--src_dir", type=Path, help="labelled images; default: phantoms are made")
    add("--out", type=Path, default=Path("results/weak_benchmark"), help="working folder")
    add("--write", type=Path, help="file for the table, such as results/weak.md")
    add("--seed", type=int, default=0, help="of the phantoms")
    add("--patients", type=int, default=600, help="phantom patients, half of them healthy")
    add("--image_size", type=int, default=32, help="of the networks, not of the masks")
    add("--times", default="500,1", help="trained timesteps, as --timestep_respacing")
    add("--diffusion_iterations", type=int, default=600)
    add("--classifier_iterations", type=int, default=400)
    add("--supervised_iterations", type=int, default=400)
    add("--level", type=int, default=250)
    add("--steps", type=int, default=5)
    add("--stride", type=int, default=40)
    add("--tau", type=float, default=0.0)
    add("--noises", type=int, default=4)
    add("--smooth", type=float, default=1.0)
    add("--classifier_scale", type=float, default=3.0)
    add("--cut", default="--largest 8 --fill_holes True", help="flags of image_p_seg")
    return parser.parse_args()


def folder_of(name: str) -> str:
    return "_".join(["masks", *name.lower().replace(",", "").split()])


class Stages:
    """CPU minutes of each finished stage, saved on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.minutes = json.loads(path.read_text()) if path.exists() else {}

    def run(self, name: str, *words: object) -> None:
        """Run a stage, unless it is recorded as done with the same command."""
        command = [str(word) for word in words]
        known = self.minutes.get(name, {"minutes": 0.0, "command": None})
        if known["command"] == command:
            return
        known["minutes"] += run(*words)
        self.minutes[name] = {**known, "command": command}
        self.path.write_text(json.dumps(self.minutes, indent=2))


def run(script: object, *words: object) -> float:
    """Run a script in one thread, and return its CPU minutes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent / 60


def table(out: Path, src: Path, minutes: dict, options: argparse.Namespace) -> str:
    """Return the table of all methods and their scores."""
    tumours = {path.stem for path in (src / "validate" / "tumor").iterdir()}
    lines = [
        "| method | Dice, images with a lesion | Dice per patient | seconds per image |",
        "|---|---|---|---|",
    ]
    for name in [*METHODS, "supervised"]:
        folder = out / folder_of(name)
        scores = [row for row in rows(folder / "scores.csv") if row["name"] in tumours]
        patients = [row for row in rows(folder / "patients.csv") if int(row["tp"]) + int(row["fn"])]
        seconds = [float(row["seconds"]) for row in rows(folder / "predictions.csv")]
        lines.append(
            f"| {name} | {mean(row['dice'] for row in scores):.3f} | "
            f"{patient_text(patients)} | {mean(seconds):.2f} |"
        )
    spent = ", ".join(f"{name} {stage['minutes']:.1f}" for name, stage in minutes.items())
    settings = " ".join(
        f"--{name} {value}" for name, value in vars(options).items() if name in MAPS
    )
    return "\n".join(
        [
            f"{len(tumours)} images with a lesion, networks at {options.image_size} px, {settings} "
            f"{options.cut}",
            "",
            *lines,
            "",
            f"CPU minutes of training: {spent}.",
            normal_text(out, tumours),
        ]
    )


def normal_text(out: Path, tumours: set[str]) -> str:
    """Say how many normal images the classifier and the supervised masks leave empty."""
    scores = json.loads((out / folder_of("classifier") / "normal.json").read_text())
    labels = rows(out / folder_of("classifier") / "predictions.csv")
    found = sum(row["label"] == "1" for row in labels if row["name"] in tumours)
    drawn = rows(out / folder_of("supervised") / "predictions.csv")
    empty = [row["area"] == "0" for row in drawn if row["name"] not in tumours]
    return (
        f"The classifier calls {scores['left_empty']} of {scores['normal']} normal images normal, "
        f"and {found} of {len(tumours)} with a lesion abnormal; the supervised masks leave "
        f"{sum(empty)} of {len(empty)} normal images empty."
    )


def patient_text(patients: list[dict[str, str]]) -> str:
    """Return the Dice of every patient if there are few, else their mean."""
    dice = [float(row["dice"]) for row in patients]
    if len(dice) > 4:
        return f"{mean(dice):.3f} ({len(dice)} patients)"
    return ", ".join(f"{value:.3f}" for value in dice)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mean(values) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    main()
