"""The temperature of fused masks: fitted by validation, kept by checkpoints, used by sampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refused, script, succeeded
from PIL import Image
from torch import Tensor

from guided_diffusion.checkpoint import LATEST, load_checkpoint, save_checkpoint
from guided_diffusion.data.datasets import Case
from guided_diffusion.inference.segmentation import Segmentation
from guided_diffusion.training import validation
from guided_diffusion.training.validation import Validation


def soft_and_truth(temperature: float, seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities whose log-odds are ``temperature`` times too large, and the truths."""
    noise = torch.Generator().manual_seed(seed)
    log_odds = 2 * torch.randn(1, 64, 64, generator=noise)
    truth = torch.rand(1, 64, 64, generator=noise) < log_odds.sigmoid()
    return (temperature * log_odds).sigmoid(), truth.float()


class Fixed:
    """A segmenter that answers each case with its image."""

    def segment(self, cases: list[Case]) -> list[Segmentation]:
        return [Segmentation(case.image, case.image[0], case.image[0]) for case in cases]


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_validation_fits_the_temperature(
    temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "draw_trajectory", lambda *_: np.zeros((4, 4, 3), np.uint8))
    segmenter = Fixed()
    segmenter.net = torch.nn.Module()  # type: ignore[attr-defined]
    cases = [Case(*soft_and_truth(temperature, seed), f"case{seed}") for seed in range(4)]
    score = Validation(segmenter, cases, folder=tmp_path)({}, 1)  # type: ignore[arg-type]
    assert score is not None and score.mask_temperature == pytest.approx(temperature, rel=0.05)


def test_sampling_divides_the_log_odds_by_it(trained: Path, brats: Path, tmp_path: Path) -> None:
    """The mask stays; a soft mask of p becomes one of the odds p / (1 - p) to the power 1 / 2."""
    checkpoint = load_checkpoint(trained / LATEST)
    checkpoint.training["best"] = {"dice": 0.5, "step": 1, "since": 0, "mask_temperature": 2.0}
    (tmp_path / "model").mkdir()
    save_checkpoint(tmp_path / "model", checkpoint)
    found = {}
    for name, flags in (("plain", []), ("fitted", ["--mask_temperature", 0])):
        where = ["--model_path", tmp_path / "model", "--data_dir", brats / "testing"]
        steps = ["--dpm_solver", True, "--steps", 2, "--out_dir", tmp_path / name]
        succeeded(script("segmentation_sample", *where, *steps, *flags))
        found[name] = [
            np.asarray(Image.open(tmp_path / name / f"000005_{kind}.png"), dtype=float)
            for kind in ("output_ens", "mask")
        ]
    (soft, mask), (tempered, same) = found["plain"], found["fitted"]
    assert np.array_equal(mask, same)
    p = np.clip(soft / 255, 0.5 / 255, 1 - 0.5 / 255)
    expected = 255 / (1 + ((1 - p) / p) ** 0.5)
    inside = (soft > 20) & (soft < 235)
    assert inside.any() and np.abs(tempered - expected)[inside].max() <= 2.5


def test_a_checkpoint_without_a_fit_is_refused(trained: Path, brats: Path, tmp_path: Path) -> None:
    where = ["--model_path", trained, "--data_dir", brats / "testing", "--out_dir", tmp_path]
    assert "--mask_temperature 0" in refused(
        script("segmentation_sample", *where, "--mask_temperature", 0)
    )
