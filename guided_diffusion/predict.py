"""From images to fused masks: draw ensembles, fuse them, and write a result folder.

:class:`Segmenter` draws: mask i of case c depends on the seed, c and i alone, for any batch size,
order or device. :func:`segment` walks a data set through it and writes the files of every case,
whole or not at all, skipping cases that an earlier run with the same settings has finished. Wired
by ``script_util``.
"""

from __future__ import annotations

import csv
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from guided_diffusion import logger
from guided_diffusion.datasets import Case, Frame, SegmentationDataset, collate
from guided_diffusion.dist_util import autocast
from guided_diffusion.ensemble import FUSIONS, disagreement, uncertainty
from guided_diffusion.files import make_folder, whole
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.pictures import overlay, soft_png
from guided_diffusion.sampling import SAMPLERS, STOCHASTIC
from guided_diffusion.schedule import NoiseLevel
from guided_diffusion.unet import UNetModel


@dataclass(frozen=True)
class Plan:
    """How masks are drawn.

    Attributes:
        sampler: a name of :data:`guided_diffusion.sampling.SAMPLERS`.
        levels: what it walks through; one network evaluation for each but the last.
        options: its keywords.
        clip: the range x0 is clamped to at every evaluation, or None.
        num_ensemble: masks a case.
        fusion: a name of :data:`guided_diffusion.ensemble.FUSIONS`.
        seed: of all randomness.
        batch_size: network inputs at a time.
        precision: fp32, bf16 or fp16.
    """

    sampler: str
    levels: tuple[NoiseLevel, ...]
    options: dict[str, Any] = field(default_factory=dict)
    clip: tuple[float, float] | None = (-1.0, 1.0)
    num_ensemble: int = 5
    fusion: str = "mean"
    seed: int = 10
    batch_size: int = 8
    precision: str = "fp32"

    @property
    def evaluations(self) -> int:
        """Network evaluations per mask."""
        return len(self.levels) - 1


class Segmentation(NamedTuple):
    """What a case became, at its own size.

    Attributes:
        members: every drawn mask, soft, float32 [E, H, W] in [0, 1].
        fused: the ensemble's mask, soft, float32 [H, W] in [0, 1].
        uncertainty: standard deviation of the members, float32 [H, W] in [0, 0.5].
    """

    members: Tensor
    fused: Tensor
    uncertainty: Tensor

    @property
    def mask(self) -> Tensor:
        """The binary mask, bool [H, W]: fused at least one half."""
        return self.fused >= 0.5


class Segmenter:
    """A trained network that turns cases into :class:`Segmentation` s."""

    def __init__(
        self, net: UNetModel, diffusion: GaussianDiffusion, *, frame: Frame, plan: Plan
    ) -> None:
        self.net = net.eval()
        self.diffusion = diffusion
        self.frame = frame
        self.plan = plan
        self.device = next(net.parameters()).device

    @torch.inference_mode()
    def draw(self, images: Tensor, names: Sequence[str]) -> Tensor:
        """Draw the members of some cases.

        Args:
            images: at the network's size, float32 [B, C, h, w].
            names: of the B cases; they seed the noise.

        Returns:
            Soft masks, float32 [B, E, K, h, w] in [0, 1], on the CPU.
        """
        plan = self.plan
        condition = self.net.encode(images.to(self.device))
        shape = (self.net.mask_channels, *images.shape[-2:])
        rows = [(case, i) for case in range(len(images)) for i in range(plan.num_ensemble)]
        drawn = []
        for start in range(0, len(rows), plan.batch_size):
            chunk = rows[start : start + plan.batch_size]
            noise = MemberNoise([member_seed(plan.seed, names[case], i) for case, i in chunk])
            of_case = torch.tensor([case for case, _ in chunk], device=self.device)
            denoise = self.diffusion.denoiser(self.net, condition.rows(of_case), clip=plan.clip)
            x = noise(torch.empty(len(chunk), *shape, device=self.device))
            options = plan.options | ({"randn_like": noise} if plan.sampler in STOCHASTIC else {})
            with autocast(self.device, plan.precision):
                x0 = SAMPLERS[plan.sampler](denoise, x, plan.levels, **options)
            drawn.append(self.diffusion.from_range(x0).float().cpu())
        return torch.cat(drawn).unflatten(0, (len(images), plan.num_ensemble))

    def __call__(self, cases: Sequence[Case]) -> list[Segmentation]:
        """Segment cases of any size: bring them to the network's, draw, bring back, fuse."""
        batch = collate([self.frame.fit(case) for case in cases])
        drawn = self.draw(batch.image, batch.names)
        return [
            self._fuse(self.frame.restore(members[:, 0], _size(case)))
            for members, case in zip(drawn, cases, strict=True)
        ]

    def _fuse(self, members: Tensor) -> Segmentation:
        fused = FUSIONS[self.plan.fusion](members)
        return Segmentation(members, fused, uncertainty(members))


class MemberNoise:
    """Standard normal noise in which every row has a generator of its own.

    Drawn on the CPU, so that a device does not change it.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, x: Tensor) -> Tensor:
        """Draw noise of the shape of ``x`` [B, ...], row b from generator b."""
        rows = [torch.randn(x.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(rows).to(x.device, x.dtype)


def member_seed(seed: int, name: str, member: int) -> int:
    """Make the seed of one mask: 63 bits of a hash of the run's seed, the case and the member."""
    digest = hashlib.sha256(f"{seed}/{name}/{member}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def segment(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    out_dir: Path,
    *,
    fingerprint: str,
    num_samples: int = 0,
) -> list[str]:
    """Segment a data set into a result folder and return the names of its cases.

    Args:
        segmenter: draws and fuses.
        dataset: cases at their own size; with masks, the overlays show them.
        out_dir: where ``predictions.csv`` and the files of each case go.
        fingerprint: of everything the masks depend on; finished cases that bear it are kept.
        num_samples: the first so many cases; 0 for all.
    """
    make_folder(out_dir)
    names = dataset.names[: num_samples or None]
    record = Record(out_dir / "predictions.csv", fingerprint)
    todo = [index for index, name in enumerate(names) if not record.finished(name)]
    if len(todo) < len(names):
        logger.log(f"{len(names) - len(todo)} of {len(names)} cases are finished and kept")
    if record.stale:
        logger.log(f"{record.stale} cases of other settings in {out_dir} are drawn anew")

    plan = segmenter.plan
    group = max(1, plan.batch_size // plan.num_ensemble)
    with tqdm(total=len(todo), unit="case", disable=None) as progress:
        for indices in _batched(todo, group):
            started = time.perf_counter()
            cases = [dataset[index] for index in indices]
            for case, result in zip(cases, segmenter(cases), strict=True):
                write_case(out_dir, case, result)
                seconds = (time.perf_counter() - started) / len(cases)
                record.add(_row(case, result, seconds))
            progress.update(len(cases))
            drawn = progress.n * plan.num_ensemble * plan.evaluations
            rate = drawn / max(progress.format_dict["elapsed"], 1e-9)
            progress.set_postfix_str(f"{rate:.0f} evaluations/s")
    return names


def _row(case: Case, result: Segmentation, seconds: float) -> dict[str, Any]:
    return {
        "name": case.name,
        "members": len(result.members),
        "area": int(result.mask.sum()),
        "disagreement": round(disagreement(result.members), 4),
        "uncertainty": round(float(result.uncertainty.mean()), 6),
        "seconds": round(seconds, 3),
    }


class Record:
    """``predictions.csv``: one row per finished case, appended once its files are in place."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.rows = {row["name"]: row for row in self._read()}
        self.stale = sum(row["fingerprint"] != fingerprint for row in self.rows.values())

    def _read(self) -> Iterator[dict[str, str]]:
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row.get("fingerprint") and row.get("name"):
                        yield row

    def finished(self, name: str) -> bool:
        """Whether a case is done, with these settings."""
        return self.rows.get(name, {}).get("fingerprint") == self.fingerprint

    def add(self, row: dict[str, Any]) -> None:
        """Note a finished case; the file appears whole."""
        self.rows[row["name"]] = {**row, "fingerprint": self.fingerprint}
        with whole(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*row, "fingerprint"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows.values())


def write_case(out_dir: Path, case: Case, result: Segmentation) -> None:
    """Write the files of one case, each at the case's own size.

    ``<name>_output_ens.png`` (soft, 8 bit), ``<name>_mask.png`` (0 and 255),
    ``<name>_uncertainty.png`` (255 is a standard deviation of 0.5), ``<name>_output<i>.png`` (the
    members, soft) and ``<name>_overlay.png``; for NIfTI input also the first three as ``.nii.gz``
    with the input's affine.
    """
    stem = f"{out_dir / case.name}"
    truth = None if case.mask is None else (case.mask[0] >= 0.5).numpy()
    pictures = {
        "output_ens": soft_png(result.fused),
        "mask": soft_png(result.mask.float()),
        "uncertainty": soft_png(2 * result.uncertainty),
        **{f"output{i}": soft_png(member) for i, member in enumerate(result.members)},
        "overlay": overlay(
            case.image.numpy(),
            truth,
            result.fused.numpy(),
            result.uncertainty.numpy(),
            name=case.name,
            members=len(result.members),
        ),
    }
    for kind, pixels in pictures.items():
        with whole(Path(f"{stem}_{kind}.png")) as part:
            Image.fromarray(pixels).save(part, format="PNG")
    if case.affine is not None:
        _write_nifti(stem, "output_ens", result.fused.numpy(), case.affine)
        _write_nifti(stem, "mask", result.mask.numpy().astype(np.uint8), case.affine)
        _write_nifti(stem, "uncertainty", result.uncertainty.numpy(), case.affine)


def _write_nifti(stem: str, kind: str, values: np.ndarray, affine: np.ndarray) -> None:
    with whole(Path(f"{stem}_{kind}.nii.gz")) as part:
        nib.save(nib.Nifti1Image(values, affine), part)


def _size(case: Case) -> tuple[int, int]:
    height, width = case.image.shape[-2:]
    return height, width


def _batched(values: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
