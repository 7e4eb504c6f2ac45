"""Compare methods of weak supervision: masks from image-level labels, against simple baselines.

    python benchmarks/weak.py --data $REAL_DATA

Three tasks: half-slices of BraTS at equal heights (``halves``, see ``weak_halves.py``), phantoms
whose lesions are not the brightest structure (``phantoms``), and slices whose class follows from
their height (``slices``, one seed). For every task and seed, the scripts train a diffusion of
images and a classifier on labels alone, and a plain U-Net on true masks as an upper bound. The
settings of the maps are chosen on training images with the first seed (``slices`` takes those of
``halves``); then all methods are scored on held-out patients. The second stage is a U-Net trained
on the weak masks of the encoded maps.

Every finished row is a line of ``results/weak.jsonl``, from which ``results/weak.md`` is made; a
second run goes on after the last one. One thread; minutes are of processor time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from method import commit
from versions import read
from weak_halves import PARTS, save, write_halves
from weak_tables import CEILING, PRESET, SAME_CLASS, STUDENT, WITH_MASKS, tables

from guided_diffusion import logger
from guided_diffusion.data.datasets import Case
from guided_diffusion.data.frames import Frame
from guided_diffusion.data.tumorloader import TumourImages, patient_of
from guided_diffusion.options.flags import Flags
from guided_diffusion.options.weak import WeakOptions
from guided_diffusion.scoring import metrics
from guided_diffusion.scoring.calibration import auroc, average_precision
from guided_diffusion.segmenter import Segmenter
from guided_diffusion.weak.maps import Map, Mask, encoded_difference, heat_of, mask_of
from guided_diffusion.weak.models import load_classifier, load_image_model
from guided_diffusion.weak.predict import WeakSegmenter

Json = dict[str, Any]
NETWORKS = ("diffusion", "classifier", "supervised", "student")
TASKS = ("halves", "phantoms", "slices")
NETWORK = [
    *("--num_channels", 32, "--num_res_blocks", 1, "--num_heads", 1, "--channel_mult", "1,2,4"),
    *("--attention_resolutions", "12"),
]
FITTED = [
    *("--lr", 1e-3, "--warmup_steps", 50, "--grad_clip", 1, "--ema_rate", 0.99, "--augment", True),
    *("--precision", "auto", "--log_interval", 50, "--save_interval", 500, "--keep", 1),
    *("--resume", "auto"),
]
CLEAN_UP: Json = {"largest": "8", "fill_holes": True}
PUBLISHED: Json = {"method": "cdm", "level": 400, "steps": 10, "stride": 1, "tau": 0.95}
FIXED: dict[str, Json] = {
    "Otsu": {"method": "otsu"},
    "Otsu twice": {"method": "otsu", "cuts": 2, **CLEAN_UP},
    "CDM, published settings": PUBLISHED,
    "CG-CDM, published settings": PUBLISHED | {"method": "cg-cdm", "classifier_scale": 10.0},
    "Grad-CAM": {"method": "gradcam"},
}
CUTS: list[Json] = [
    {"difference": difference, "smooth": smooth, "cut_at": cut_at, **CLEAN_UP}
    for difference, smooth, cut_at in itertools.product(
        ("signed", "positive"), (0.0, 1.0, 2.0), (0.0, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
    )
]
IMAGE_CUTS: list[Json] = [
    {"method": "otsu", "smooth": smooth, **cut, **CLEAN_UP}
    for smooth in (0.0, 1.0, 2.0)
    for cut in ({"cut_at": 0.0, "cuts": 2}, *({"cut_at": k / 20} for k in range(8, 19)))
]


def candidates() -> dict[str, list[Json]]:
    """The settings of each method among which training images choose."""
    branches = [
        {"level": level, "steps": 5, "stride": stride, "tau": 0.0, "noises": 2}
        for level, stride in ((250, 40), (400, 60), (550, 80))
    ]
    walks = [{"level": level, "steps": 10} for level in (300, 400, 500, 600)]
    return {
        "image, chosen cut": IMAGE_CUTS,
        "CDM": [{"method": "cdm", **own} for own in branches],
        "CG-CDM": [{"method": "cg-cdm", "classifier_scale": 3.0, **own} for own in branches],
        "counterfactual": [{"method": "counterfactual", "noises": 2, **own} for own in walks[:3]],
        "encoded": [{"method": "encoded", **own} for own in walks],
        "encoded, guided": [
            {"method": "encoded", "guided": True, "classifier_scale": 3.0, **own} for own in walks
        ],
        "Grad-CAM, absolute": [
            {"method": "gradcam", "difference": "absolute", "cam_shrink": shrink}
            for shrink in (2, 4)
        ],
    }


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    logger.configure(quiet=True)
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    for seed, task in itertools.product(arguments.seeds, arguments.tasks):
        if task == "slices" and seed != arguments.seeds[0]:
            continue
        for row in Study(arguments, task, seed).rows():
            keep(row, arguments.rows)
    for row in preset_rows(arguments):
        keep(row, arguments.rows)
    write_page(arguments.rows)


def keep(row: Json, rows: Path) -> None:
    """Add a row to the file, and make the page anew."""
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print({name: row[name] for name in ("task", "seed", "method")}, row["dice"], flush=True)
    write_page(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of brats15_2d and brats15_weak_128")
    add("--out", type=Path, default=Path("results/weak_benchmark"), help="working folder")
    add("--rows", type=Path, default=Path("results/weak.jsonl"))
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--image_size", type=int, default=48, help="of the networks, not of the masks")
    add("--patients", type=int, default=600, help="phantoms, half of them healthy")
    add("--diffusion_steps", type=int, default=1000)
    add("--classifier_steps", type=int, default=400)
    add("--supervised_steps", type=int, default=1000)
    add("--batch_size", type=int, default=16)
    add("--chosen_on", type=int, default=40, help="training images on which settings are chosen")
    add("--cases", type=int, default=0, help="to score at most, of each class; 0: all")
    return parser.parse_args()


def preset_rows(arguments: argparse.Namespace) -> Iterator[Json]:
    """Score the encoded maps whose settings are the best of halves and phantoms together."""
    both = [task for task in ("halves", "phantoms") if task in arguments.tasks]
    first = [Study(arguments, task, arguments.seeds[0]) for task in both]
    if len(both) < 2 or any(study.lacks("encoded") for study in first):
        return
    known = [row["settings"] for study in first for row in study.known if row["method"] == PRESET]
    if not known:
        tables = [{json.dumps(own): dice for dice, own in s.tried("encoded")} for s in first]
        best = max(tables[0], key=lambda own: sum(table[own] for table in tables))
        known = [json.loads(best)]
    for task, seed in itertools.product(both, arguments.seeds):
        study = Study(arguments, task, seed)
        if study.lacks(PRESET) and not study.lacks("encoded"):
            testing = study.cases("validate", label=1, most=arguments.cases)
            yield study.score_weak(PRESET, testing, known[0])


def write_page(rows: Path) -> None:
    """Make the page of what is known."""
    rows.with_suffix(".md").write_text(tables(read(rows)), encoding="utf-8")


@dataclass
class Study:
    """One task with one seed: its data, its networks and its rows."""

    arguments: argparse.Namespace
    task: str
    seed: int

    def __post_init__(self) -> None:
        self.known = read(self.arguments.rows) if self.arguments.rows.exists() else []
        self.folder = self.arguments.out / self.task / str(self.seed)
        self.data = self.prepared()
        self.frame = Frame(self.arguments.image_size)

    def prepared(self) -> Path:
        """The images of the task; halves and phantoms are made where they are missing."""
        if self.task == "slices":
            return self.arguments.data / "brats15_weak_128"
        folder = self.arguments.out / self.task / "data"
        if folder.exists():
            return folder
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        if self.task == "halves":
            for name, own in PARTS.items():
                write_halves(self.arguments.data / "brats15_2d" / name, part / own)
        else:
            run("make_phantoms", "--layout", "weak", "--out", part, "--split", 0.9,
                "--patients", self.arguments.patients)  # fmt: skip
        part.rename(folder)
        return folder

    def rows(self) -> Iterator[Json]:
        """Train what is missing, and yield the rows that are not known yet."""
        if not any(map(self.lacks, (*methods(), SAME_CLASS, *WITH_MASKS, CEILING, STUDENT))):
            return
        self.train()
        testing = self.cases("validate", label=1, most=self.arguments.cases)
        for name in filter(self.lacks, methods()):
            yield self.score_weak(name, testing)
        if self.lacks(SAME_CLASS):
            yield self.score_same_class(testing)
        if self.lacks(CEILING):
            yield self.score_ceiling(testing)
        if self.lacks(STUDENT):
            self.train_second_stage()
            yield self.score_network(STUDENT, "student", testing)
        for name in filter(self.lacks, WITH_MASKS):
            yield self.score_network(name, "supervised", testing)

    def lacks(self, method: str) -> bool:
        """Whether there is no row of a method yet."""
        return not any(self.is_of(row, method) for row in self.known)

    def is_of(self, row: Json, method: str, *, task: str = "", seed: int | None = None) -> bool:
        """Whether a row is that of a method, of this task and seed unless others are named."""
        wanted = (task or self.task, self.seed if seed is None else seed, method)
        size, steps = self.arguments.image_size, self.arguments.diffusion_steps
        return (row["task"], row["seed"], row["method"]) == wanted and (
            (row["image_size"], row["steps"]) == (size, steps)
        )

    # ---------------------------------------------------------------------------- training

    def train(self) -> None:
        """Train what saw labels alone, and the plain U-Net on true masks."""
        own, options = self.folder, self.arguments
        size = ["--image_size", options.image_size, "--seed", self.seed]
        data = ["--src_dir", self.data, "--save_dir", own, *size, *FITTED]
        noise = ["--timestep_respacing", "334,333,1"]
        self.stage("diffusion", "train_tumor_ddfm", *data, *noise, *NETWORK, "--class_cond", True,
                   "--predict_v", True, "--batch_size", options.batch_size,
                   "--max_steps", options.diffusion_steps)  # fmt: skip
        self.stage("classifier", "classifier_tumor_train", *data, *noise,
                   "--classifier_width", 32, "--classifier_depth", 1,
                   "--classifier_attention_resolutions", "12", "--batch_size", options.batch_size,
                   "--iterations", options.classifier_steps)  # fmt: skip
        self.train_segmenter("supervised", self.data / "training")

    def train_segmenter(self, name: str, data: Path) -> None:
        """Train a plain U-Net on masks; ``supervised`` and ``student`` differ in these alone."""
        steps = self.arguments.supervised_steps
        self.stage(name, "segmentation_train", "--data_dir", data, "--out_dir", self.folder / name,
                   "--image_size", self.arguments.image_size, "--seed", self.seed, *FITTED,
                   *NETWORK, "--version", "unet", "--mask_loss", "dice_ce",
                   "--batch_size", min(8, self.arguments.batch_size),
                   "--max_steps", steps, "--lr_anneal_steps", steps)  # fmt: skip

    def train_second_stage(self) -> None:
        """Train a plain U-Net on the weak masks of the training images."""
        folder, best = self.folder / "student_data", self.settings("encoded")
        shutil.rmtree(folder, ignore_errors=True)
        for source in (self.data / "training/normal", self.data / "training/tumor"):
            shutil.copytree(source, folder / source.name)
        cases = self.cases("training", label=1)
        segmenter = self.segmenter(best)
        for case, difference in zip(cases, self.differences(segmenter, cases), strict=True):
            save(folder / "seg" / f"{case.name}.png", self.mask(best, case, difference)[1])
        self.train_segmenter("student", folder)

    def stage(self, name: str, *words: object) -> None:
        """Run a script to its end, unless it got there before."""
        done = self.folder / f"{name}.json"
        if not done.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            minutes = run(*words)
            done.write_text(json.dumps({"minutes": round(minutes, 2)}))

    def minutes(self) -> dict[str, float]:
        """Of every finished training."""
        files = {name: self.folder / f"{name}.json" for name in NETWORKS}
        return {
            name: json.loads(file.read_text())["minutes"]
            for name, file in files.items()
            if file.exists()
        }

    # ----------------------------------------------------------------------------- scoring

    def cases(self, part: str, *, label: int, most: int = 0) -> list[Case]:
        """The images of a class with their masks, evenly spread where there are more."""
        images = TumourImages(self.data / part)
        own = [i for i, name in enumerate(images.names) if images.labels[name] == label]
        number = min(most or len(own), len(own))
        return [images[own[i * len(own) // number]] for i in range(number)]

    def segmenter(self, settings: Json) -> WeakSegmenter:
        """What makes the maps of some settings, with the networks of this task and seed."""
        options = WeakOptions(**settings)
        guided = options.guided or options.method == "cg-cdm"
        options = WeakOptions(**settings | {"guided": guided})
        model = classifier = None
        if options.method not in ("otsu", "gradcam"):
            model = load_image_model(Flags(), folder=str(self.folder))
        if guided or options.method == "gradcam":
            classifier = load_classifier(Flags(), folder=str(self.folder))
        return WeakSegmenter(options, model, classifier, seed=self.seed)

    def differences(self, segmenter: WeakSegmenter, cases: Sequence[Case]) -> list[Tensor]:
        """The maps of cases at the size at which they are made."""
        found: list[Tensor] = []
        for first in range(0, len(cases), 30):
            some = cases[first : first + 30]
            images = torch.stack([self.frame.fit_image(case.image) for case in some])
            found += segmenter.differences(images, [case.name for case in some])
        return found

    def mask(self, settings: Json, case: Case, difference: Tensor) -> tuple[Map, Mask]:
        """The map of a case at its own size, and the mask that is cut from it."""
        if settings["method"] == "otsu":
            difference = case.image
        else:
            difference = self.frame.restore(difference, tuple(case.image.shape[-2:]))
        options = WeakOptions(**settings)
        heat = heat_of(difference, kind=options.difference, smooth=options.smooth)
        return heat, mask_of(
            heat,
            cut_at=options.cut_at,
            cuts=options.cuts,
            largest=int(options.largest or 0),
            fill_holes=options.fill_holes,
        )

    def settings(self, name: str) -> Json:
        """Those of a method: fixed ones, or those chosen on training images with the first seed."""
        if name in FIXED:
            return FIXED[name]
        task = "halves" if self.task == "slices" else self.task
        first = self.arguments.seeds[0]
        for row in self.known:
            if self.is_of(row, name, task=task, seed=first):
                return row["settings"]
        if task != self.task:
            raise SystemExit("the task slices takes the settings of halves: run that one first")
        assert self.seed == first
        return max(self.tried(name), key=lambda pair: pair[0])[1]

    def tried(self, name: str) -> list[tuple[float, Json]]:
        """The mean Dice of all settings of a method on training images."""
        cases = self.cases("training", label=1, most=self.arguments.chosen_on)
        tried: list[tuple[float, Json]] = []
        for walk in candidates()[name]:
            differences = self.differences(self.segmenter(walk), cases)
            for cut in [{}] if "cut_at" in walk else CUTS:
                own = {**cut, **walk}
                dices = [
                    dice_of(self.mask(own, case, difference)[1], case)
                    for case, difference in zip(cases, differences, strict=True)
                ]
                tried.append((float(np.mean(dices)), own))
        return tried

    def score_weak(self, name: str, testing: Sequence[Case], settings: Json | None = None) -> Json:
        """Score a method without masks; its own settings unless others are given."""
        settings = settings or self.settings(name)
        segmenter = self.segmenter(settings)
        before = time.process_time()
        differences = self.differences(segmenter, testing)
        pairs = [self.mask(settings, *both) for both in zip(testing, differences, strict=True)]
        seconds = time.process_time() - before
        row = self.row(name, testing, pairs, seconds) | {"settings": settings}
        if name == "encoded":
            row["labels"] = self.label_scores(segmenter)
            row["embeddings"] = self.embeddings()
        self.known.append(row)
        return row

    def embeddings(self) -> Json:
        """Length of the difference of the two classes' embeddings, and of the time's at Q = 400."""
        net = load_image_model(Flags(), folder=str(self.folder)).net
        normal, lesion = net.label_emb.weight.detach()
        with torch.no_grad():
            time_at_400 = net.embed(torch.tensor([400.0]), torch.zeros(1, 2))[0]
        lengths = {"classes": (lesion - normal).norm(), "time": time_at_400.norm()}
        return {name: round(float(length), 2) for name, length in lengths.items()}

    def score_same_class(self, testing: Sequence[Case]) -> Json:
        """Score a control: encoded maps of images that are decoded as what they are, a lesion."""
        settings = self.settings("encoded")
        segmenter = self.segmenter(settings)
        model, levels = segmenter.model, segmenter.levels
        assert model is not None
        before = time.process_time()
        pairs = []
        for case in testing:
            x0 = model.diffusion.to_range(self.frame.fit_image(case.image)[None])
            lesion = model.denoiser(x0.shape, torch.ones(1, dtype=torch.int64))
            with torch.no_grad():
                difference = encoded_difference(lesion, lesion, x0, levels)[0]
            pairs.append(self.mask(settings, case, difference))
        seconds = time.process_time() - before
        return self.row(SAME_CLASS, testing, pairs, seconds) | {"settings": {}}

    def score_ceiling(self, testing: Sequence[Case]) -> Json:
        """Score what no network of this size can exceed: true masks, scaled down and up again."""
        pairs = []
        for case in testing:
            assert case.mask is not None
            size = (case.mask.shape[-2], case.mask.shape[-1])
            soft = self.frame.restore(self.frame.fit_image(case.mask), size)[0].numpy()
            pairs.append((soft, soft >= 0.5))
        return self.row(CEILING, testing, pairs, 0.0) | {"settings": {}}

    def label_scores(self, segmenter: WeakSegmenter) -> Json:
        """How well the diffusion and the classifier tell normal images from those with a lesion."""
        judge = load_classifier(Flags(), folder=str(self.folder))
        scores: dict[str, list[float]] = {"diffusion": [], "classifier": []}
        truth = []
        for label in (0, 1):
            for case in self.cases("validate", label=label, most=self.arguments.cases):
                image = self.frame.fit_image(case.image)[None]
                scores["diffusion"] += segmenter.lesion_scores(image, [case.name])
                x0 = judge.diffusion.to_range(image)
                logits = judge.at_level(x0, judge.diffusion.schedule.at(0))
                scores["classifier"].append(float((logits[:, 1] - logits[:, 0]).detach()))
                truth.append(label == 1)
        return {
            name: {
                "auroc": round(auroc(values, truth), 4),
                "accuracy": round(float(np.mean((np.array(values) > 0) == np.array(truth))), 4),
            }
            for name, values in scores.items()
        }

    def score_network(self, name: str, folder: str, testing: Sequence[Case]) -> Json:
        """Score a plain U-Net; its map is the soft mask."""
        segmenter = Segmenter.load(self.folder / folder, sampler="direct")
        before = time.process_time()
        soft = [segmenter(case.image, case.name).fused.numpy() for case in testing]
        seconds = time.process_time() - before
        pairs = [(heat, heat >= 0.5) for heat in soft]
        return self.row(name, testing, pairs, seconds) | {"settings": {}}

    def row(
        self, name: str, testing: Sequence[Case], pairs: Sequence[tuple[Map, Mask]], seconds: float
    ) -> Json:
        """The row of a method: scores of the maps and masks of its cases."""
        dices: dict[str, list[float]] = {}
        ranked = []
        for case, (heat, mask) in zip(testing, pairs, strict=True):
            dices.setdefault(patient_of(case.name), []).append(dice_of(mask, case))
            lesion = truth_of(case)
            ranked.append((auroc(heat.ravel(), lesion.ravel()), average_precision(heat, lesion)))
        area, precision = np.nanmean(ranked, axis=0).tolist()
        every = [dice for own in dices.values() for dice in own]
        return {
            **{"task": self.task, "seed": self.seed, "method": name, "images": len(testing)},
            "dice": round(float(np.mean(every)), 4),
            "patients": {owner: round(float(np.mean(own)), 4) for owner, own in dices.items()},
            **{"auroc": round(area, 4), "average_precision": round(precision, 4)},
            **{"seconds": round(seconds / len(testing), 3), "minutes": self.minutes()},
            **{"image_size": self.arguments.image_size, "steps": self.arguments.diffusion_steps},
            **{"device": "CPU, one thread", "torch": torch.__version__, "commit": commit()},
        }


def methods() -> list[str]:
    """All methods without masks but the second stage."""
    return [*FIXED, *candidates()]


def truth_of(case: Case) -> Mask:
    assert case.mask is not None
    return np.asarray(case.mask[0].numpy() >= 0.5)


def dice_of(mask: Mask, case: Case) -> float:
    return metrics.dice(metrics.confusion(mask, truth_of(case)))


def run(script: object, *words: object) -> float:
    """Run a script in one thread, and return its minutes of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60


if __name__ == "__main__":
    main()
