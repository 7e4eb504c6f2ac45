"""From image-level labels to masks on disk: choose a map, cut it, write it, score it.

A :class:`WeakSegmenter` makes the maps of some images; :func:`segment_images` takes a data set
through it, and :func:`score_masks` hands the folder to the evaluation of every other result.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guided_diffusion import logger
from guided_diffusion.data.datasets import Case
from guided_diffusion.data.folders import counted
from guided_diffusion.data.frames import Frame
from guided_diffusion.data.tumorloader import LabelledImages, TumourImages
from guided_diffusion.errors import UserError
from guided_diffusion.files import atomic_write, make_folder
from guided_diffusion.gaussian_diffusion import Denoiser
from guided_diffusion.inference.cases import run_cases
from guided_diffusion.inference.next_steps import after_scoring
from guided_diffusion.inference.provenance import note_sampling
from guided_diffusion.inference.record import Record
from guided_diffusion.options.weak import WeakOptions
from guided_diffusion.report.canvas import soft_png
from guided_diffusion.report.pictures import map_overlay, write_picture
from guided_diffusion.sampling import MemberNoise, member_seed
from guided_diffusion.scoring import metrics
from guided_diffusion.scoring.calibration import auroc, average_precision
from guided_diffusion.scoring.evaluate import evaluate_all
from guided_diffusion.scoring.predictions import read_soft
from guided_diffusion.scoring.summary import summary_text
from guided_diffusion.weak.levels import levels_of, spread
from guided_diffusion.weak.maps import (
    Map,
    Mask,
    class_difference,
    counterfactual_difference,
    encoded_difference,
    grad_cam,
    heat_of,
    mask_of,
    noisy,
    one_branch_difference,
)
from guided_diffusion.weak.models import ClassifierModel, ImageModel

NORMAL, TUMOUR = 0, 1
LABEL_TIMES = 8
_OF_THE_RUN = (
    *("batch_size", "results_dir", "num_samples", "model_path", "classifier_path", "dry_run"),
)


class WeakSegmenter:
    """Makes maps of images as the options say.

    Args:
        options: with a method.
        model: the diffusion; None for methods that need none.
        classifier: where something is guided, explained or labelled by it.
        seed: of all noise.

    Raises:
        UserError: options that the networks cannot fulfil.
    """

    def __init__(
        self,
        options: WeakOptions,
        model: ImageModel | None,
        classifier: ClassifierModel | None,
        *,
        seed: int,
    ) -> None:
        self.options = options
        self.model = model
        self.classifier = classifier
        self.seed = seed
        self.levels = levels_of(options, model) if model else []

    @property
    def size(self) -> int | None:
        """Height and width at which maps are made; None for the image's own."""
        if self.model:
            return self.model.net.image_size
        return self.classifier.image_size if self.classifier else None

    @property
    def fingerprint(self) -> str:
        """Everything that the masks depend on, in 16 hexadecimal digits."""
        options = {k: v for k, v in asdict(self.options).items() if k not in _OF_THE_RUN}
        digest = hashlib.sha256(json.dumps([options, self.seed]).encode())
        for trained in (self.model, self.classifier):
            digest.update(repr(trained.settings if trained else None).encode())
            for name, value in (trained.net.state_dict() if trained else {}).items():
                digest.update(name.encode())
                digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def differences(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Make the maps of images [B, C, h, w] in [0, 1] of the lesion's class: [B, C or 1, h, w].

        The noise of an image follows from the seed and its name alone.
        """
        if self.options.method == "otsu":
            return images
        if self.options.method == "gradcam":
            return self._class_activation(images)
        model = self._needed_model()
        x0 = model.diffusion.to_range(images.to(model.device))
        draws = [
            self._difference(x0, MemberNoise([member_seed(self.seed, n, k) for n in names])(x0))
            for k in range(self.options.noises)
        ]
        maps = torch.stack(draws).mean(dim=0).cpu()
        if not maps.isfinite().all():
            raise UserError(
                model.source,
                "it predicted NaN or infinite values",
                "Check the loss of its training, or sample with --weights raw.",
            )
        return maps

    def labels(self, images: Tensor, names: Sequence[str], truth: Sequence[int]) -> list[int]:
        """Whether each image is to be segmented, as ``--label`` says: 1 or 0."""
        if self.options.label == "classifier" and self.classifier:
            trained = self.classifier
            x0 = trained.diffusion.to_range(images.to(next(trained.net.parameters()).device))
            with torch.no_grad():
                return trained.at_level(x0, trained.diffusion.schedule.at(0)).argmax(1).tolist()
        if self.options.label == "diffusion":
            return [int(score > 0) for score in self.lesion_scores(images, names)]
        return list(truth) if self.options.label == "truth" else [TUMOUR] * len(images)

    @torch.no_grad()
    def lesion_scores(self, images: Tensor, names: Sequence[str]) -> list[float]:
        """How much better the class of a lesion explains each image than "normal": above 0 if so.

        Li et al. (2023), *Your diffusion model is secretly a zero-shot classifier*: the squared
        error of the noise's prediction, at ``LABEL_TIMES`` evenly spread times up to ``--level``;
        both classes see the same noise.
        """
        model = self._needed_model()
        x0 = model.diffusion.to_range(images.to(model.device))
        scores = torch.zeros(len(x0), device=model.device)
        normal, lesion = model.branch(x0.shape, 0.0), model.branch(x0.shape, 1.0)
        trained = [t for t in model.diffusion.kept if t <= self.options.level]
        for number, t in enumerate(spread(trained, LABEL_TIMES + 1)[-2::-1]):
            level = model.diffusion.schedule.at(t)
            noise = MemberNoise([member_seed(self.seed, n, number) for n in names])
            x = noisy(x0, noise(x0), level)
            errors = [(denoise(x, level).x0 - x0).square() for denoise in (normal, lesion)]
            snr = (level.alpha / level.sigma) ** 2
            scores += snr * (errors[0] - errors[1]).flatten(1).mean(dim=1)
        return scores.tolist()

    def _difference(self, x0: Tensor, eps: Tensor) -> Tensor:
        options, levels = self.options, self.levels
        normal = self._branch(x0, NORMAL, 0.0)
        if options.method == "counterfactual":
            return counterfactual_difference(normal, x0, eps, levels)
        if options.method == "one-branch":
            return one_branch_difference(normal, x0, eps, levels)
        if options.method == "encoded":
            encoder = self._branch(x0, TUMOUR, 1.0, guided=False)
            return encoded_difference(encoder, normal, x0, levels)
        lesion, other = self._branch(x0, TUMOUR, 1.0), self._branch(x0, NORMAL, options.tau)
        x = noisy(x0, eps, levels[0])
        return class_difference(lesion, other, x, levels, tau=options.tau)

    def _branch(self, x0: Tensor, label: int, share: float, *, guided: bool = True) -> Denoiser:
        """The denoiser of ``share`` lesion and the rest normal, guided towards ``label``."""
        guide = self.classifier if guided and self.options.guided else None
        scale = self.options.classifier_scale
        return self._needed_model().branch(x0.shape, share, guide=guide, label=label, scale=scale)

    def _class_activation(self, images: Tensor) -> Tensor:
        assert self.classifier is not None
        x0 = self.classifier.diffusion.to_range(images)
        device = next(self.classifier.net.parameters()).device
        t = torch.zeros(len(images), device=device)
        y = torch.full((len(images),), TUMOUR, device=device)
        absolute, shrink = self.options.difference == "absolute", self.options.cam_shrink
        net, x = self.classifier.net, x0.to(device)
        return grad_cam(net, x, t, y, shrink=shrink, absolute=absolute).cpu()

    def _needed_model(self) -> ImageModel:
        assert self.model is not None
        return self.model


def segment_images(segmenter: WeakSegmenter, dataset: LabelledImages, folder: Path) -> list[str]:
    """Make the masks of a data set, write the files of every case, and return the cases' names.

    ``<name>_mask.png`` and ``<name>_output_ens.png`` (the mask, 0 and 255), ``<name>_heat.png``
    (the map in its own range), ``<name>_overlay.png``, and a row of ``predictions.csv``. Finished
    cases of the same settings are kept.

    Raises:
        UserError: some cases failed; all others are finished.
    """
    make_folder(folder, flag="--results_dir")
    method, plane = segmenter.options.method, dataset.plane
    text = f"{segmenter.fingerprint} {dataset.positive}"
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    record = Record(folder, fingerprint, ("label",), with_members=False)
    record.refuse_other_run(dataset, flag="--results_dir")
    note_sampling(
        *(folder, fingerprint),
        model=method,
        seed=segmenter.seed,
        options={"plane": plane},
    )
    chosen = _evenly(dataset, segmenter.options.num_samples)
    entries = [dataset.entries[i] for i in chosen]
    todo = [i for i, entry in enumerate(entries) if not record.finished(entry.name)]
    record.begin([entries[i].name for i in todo], of=len(entries))

    def draw(indices: Sequence[int]) -> list[Drawn]:
        return _draw(segmenter, [dataset.picture(chosen[i]) for i in indices])

    def write(index: int, drawn: Drawn, seconds: float) -> dict[str, Any]:
        _write(folder, drawn, dataset.read_mask(entries[index]))
        area = int(drawn.mask.sum())
        return {"members": 1, "area": area, "label": drawn.label, "seconds": round(seconds, 4)}

    together = segmenter.options.batch_size
    run_cases(entries, todo, record, draw=draw, write=write, together=together)
    logger.log(
        f"{counted(len(entries), 'image')} in {folder}: <name>_mask.png, _heat.png, _overlay.png"
    )
    return [entry.name for entry in entries]


def _evenly(dataset: LabelledImages, count: int) -> list[int]:
    """Choose images evenly spread over each of the classes, in their order; 0 for all."""
    total = len(dataset)
    by_class = sorted(range(total), key=lambda i: dataset.labels[dataset.entries[i].name])
    count = min(count or total, total)
    return sorted(by_class[i * total // count] for i in range(count))


class Drawn(NamedTuple):
    """A case, whether it was segmented (1) or left empty (0), its map and its mask [H, W]."""

    case: Case
    label: int
    heat: Map
    mask: Mask


def _draw(segmenter: WeakSegmenter, cases: Sequence[Case]) -> list[Drawn]:
    """Segment some cases; of one size together, else one by one."""
    if segmenter.size is None and len({case.image.shape for case in cases}) > 1:
        return [drawn for case in cases for drawn in _draw(segmenter, [case])]
    frame = Frame(segmenter.size) if segmenter.size else None
    images = torch.stack([frame.fit_image(case.image) if frame else case.image for case in cases])
    names = [case.name for case in cases]
    labels = segmenter.labels(images, names, [case.label or 0 for case in cases])
    maps = segmenter.differences(images, names)
    return [
        Drawn(case, label, *_cut(segmenter.options, case, label, difference, frame))
        for case, label, difference in zip(cases, labels, maps, strict=True)
    ]


def _cut(
    options: WeakOptions, case: Case, label: int, difference: Tensor, frame: Frame | None
) -> tuple[Map, Mask]:
    """Map and mask of one case at its own size; the mask of a normal one is empty."""
    height, width = case.image.shape[-2:]
    own = frame.restore(difference, (height, width)) if frame else difference
    heat = heat_of(own, kind=options.difference, smooth=options.smooth)
    if label == NORMAL:
        return heat, np.zeros(heat.shape, dtype=bool)
    return heat, mask_of(
        heat,
        cut_at=options.cut_at,
        cuts=options.cuts,
        largest=int(options.largest or 0),
        fill_holes=options.fill_holes,
    )


def _write(folder: Path, drawn: Drawn, truth: Tensor | None) -> None:
    case, _, heat, mask = drawn
    true = None if truth is None else (truth[0] >= 0.5).numpy()
    pictures = {
        "mask": soft_png(mask),
        "output_ens": soft_png(mask),
        "heat": soft_png(heat),
        "overlay": map_overlay(case.image.numpy(), true, mask, heat, name=case.name),
    }
    for kind, pixels in pictures.items():
        write_picture(folder / f"{case.name}_{kind}.png", pixels)


def score_masks(dataset: LabelledImages, folder: Path) -> list[str]:
    """Score a folder against the masks of a data set, and return the lines to log.

    Writes what scoring writes, if the mask of any lesion is known; ``normal.json``: how many normal
    images were left empty, and the share of their pixels that was; and ``maps.json``: how well the
    maps rank the pixels of each image with a lesion, before any cut.
    """
    truths: Path | None = dataset.directory
    if not isinstance(dataset, TumourImages):
        truths = _written_truths(dataset, folder)
    known = [e for e in dataset.entries if dataset.labels[e.name] and dataset.has_mask(e)]
    lines, after = ["not scored: no image with a lesion has a mask"], f"next: look into {folder}"
    if known:
        evaluation = evaluate_all(folder, truths, partial=True, one_class=True)
        lines, after = [summary_text(evaluation.summary)], after_scoring(evaluation, report=False)
        lines += _map_scores(dataset, folder)
    counts = [
        _empty_truth(path)
        for name, label in dataset.labels.items()
        if label == NORMAL and (path := folder / f"{name}_mask.png").exists()
    ]
    if counts:
        left = sum(count.empty_prediction for count in counts)
        mean = float(np.mean([metrics.specificity(count) for count in counts]))
        found = {"normal": len(counts), "left_empty": left, "specificity": mean}
        with atomic_write(folder / "normal.json") as part:
            part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        lines.append(
            f"normal images: {left} of {len(counts)} left empty, specificity {mean:.4f} by pixel"
        )
    return [*lines, after]


def _map_scores(dataset: LabelledImages, folder: Path) -> list[str]:
    """Score the maps of a folder by pixel, the means over images with a lesion."""
    scores = []
    for entry in dataset.entries:
        path = folder / f"{entry.name}_heat.png"
        truth = dataset.read_mask(entry) if dataset.labels[entry.name] and path.exists() else None
        if truth is not None and (lesion := (truth[0] >= 0.5).numpy()).any():
            heat = read_soft(path)
            scores.append((auroc(heat.ravel(), lesion.ravel()), average_precision(heat, lesion)))
    if not scores:
        return []
    areas, precisions = zip(*scores, strict=True)
    area, precision = _mean(areas), _mean(precisions)
    found = {"images": len(scores), "auroc": area, "average_precision": precision}
    with atomic_write(folder / "maps.json") as part:
        part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return [
        f"maps of {counted(len(scores), 'image')} with a lesion, by pixel: "
        f"AUROC {'unknown' if area is None else f'{area:.4f}'}, average precision {precision:.4f}"
    ]


def _mean(values: Sequence[float]) -> float | None:
    """The mean of what is known of some values; None where nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else None


def _empty_truth(path: Path) -> metrics.Confusion:
    mask = read_soft(path) > 0
    return metrics.confusion(mask, np.zeros_like(mask))


def _written_truths(dataset: LabelledImages, folder: Path) -> Path:
    """Write the masks of a data set that has no files of them, and return their folder."""
    truths = make_folder(folder / "truth", flag="--results_dir")
    for entry in dataset.entries:
        path = truths / f"{entry.name}.png"
        mask = dataset.read_mask(entry)
        if mask is not None:
            write_picture(path, soft_png(mask[0]))
    return truths
