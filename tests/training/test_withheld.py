"""Training without diffusion, and with the noisy mask withheld in a share of the draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import NETWORK, read_csv, refused, script, succeeded, torchrun
from loops import Discs, batch_of, equal, make_loop
from torch import Tensor
from torch.testing import assert_close

from guided_diffusion.checkpoint import BEST, LATEST, load_checkpoint
from guided_diffusion.scoring.metrics import confusion, dice

UNET = {"version": "unet"}
DROPOUT = {"mask_loss": "dice_ce", "mask_dropout": 0.5}


def command(brats: Path, out_dir: Path, *flags: object) -> list[Any]:
    """The flags of a run of 4 steps at 16 pixels, with dropout inside the network too."""
    return [
        *("--data_dir", brats / "training", "--out_dir", out_dir, *NETWORK),
        *("--diffusion_steps", 100, "--batch_size", 2, "--lr", 3e-3, "--ema_rate", "0.9"),
        *("--save_interval", 2, "--log_interval", 1, "--dropout", 0.1, "--max_steps", 4, *flags),
    ]


@pytest.mark.parametrize("objective", [UNET, DROPOUT], ids=["unet", "dropout"])
def test_a_resumed_run_is_bit_equal(objective: dict[str, Any], brats: Path, tmp_path: Path) -> None:
    flags = [word for name, value in objective.items() for word in (f"--{name}", value)]
    flags += ["--schedule_sampler", "loss-second-moment"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    succeeded(script("segmentation_train", *command(brats, whole, *flags)))
    start = whole / "savedmodel000002.pt"
    again = command(brats, halves, *flags, "--resume_checkpoint", start)
    said = succeeded(script("segmentation_train", *again))
    idle = "--schedule_sampler has no effect with --version unet"
    assert (idle in said) == (objective is UNET)
    one, other = (vars(load_checkpoint(path / LATEST)) for path in (whole, halves))
    assert one.pop("run") != other.pop("run"), "the command differs"
    assert equal(one, other)
    row = read_csv(whole / "progress.csv")[-1]
    assert float(row["ce"]) > 0 and 0 < float(row["dice"]) < 1
    assert ("loss_direct" in row) == (objective is DROPOUT), "one kind of loss is not told apart"


def test_a_resumed_run_keeps_its_objective(brats: Path, tmp_path: Path) -> None:
    succeeded(script("segmentation_train", *command(brats, tmp_path, *("--version", "unet"))))
    again = [*command(brats, tmp_path), "--resume", "auto", "--max_steps", 5]
    succeeded(script("segmentation_train", *again))
    recorded = load_checkpoint(tmp_path / LATEST).options
    assert (recorded["version"], recorded["mask_loss"]) == ("unet", "dice_ce")
    error = refused(script("segmentation_train", *again, "--mask_loss", "bce"))
    assert "--mask_loss bce: contradicts dice_ce" in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--version", "unet"], "validation on 2 cases, 1 mask each in 1 evaluation\n"),
        (
            ["--mask_loss", "bce", "--mask_dropout", 0.5, "--val_steps", 2],
            "validation on 2 cases, 2 masks each in 2 evaluations; "
            "Dice is that of the answer without a noisy mask\n",
        ),
    ],
    ids=["unet", "dropout"],
)
def test_validation_scores_the_direct_answer(
    flags: list[object], said: str, brats: Path, tmp_path: Path
) -> None:
    flags = [*flags, "--val_dir", brats / "testing", "--val_interval", 4]
    assert said in succeeded(script("segmentation_train", *command(brats, tmp_path, *flags)))
    value = float(read_csv(tmp_path / "progress.csv")[-1]["val_dice"])
    assert load_checkpoint(tmp_path / BEST).training["best"]["dice"] == value
    assert (tmp_path / "validation" / "sampling.png").exists()
    out, direct = tmp_path / "masks", ["--sampler", "direct", "--data_dir", brats / "testing"]
    model = ["--model_path", tmp_path / LATEST, "--out_dir", out]
    succeeded(script("segmentation_sample", *model, *direct))
    scores = ["--inp_pth", out, "--out_pth", brats / "testing"]
    succeeded(script("segmentation_env", *scores))
    rows = [row for row in read_csv(out / "scores.csv") if row["name"] in ("000005", "000006")]
    assert len(rows) == 2
    assert sum(float(row["dice"]) for row in rows) / 2 == pytest.approx(value, abs=1e-3)


def test_where_dice_counts_is_said(brats: Path, tmp_path: Path) -> None:
    path, said = "--mask_loss dice_ce adds Dice at the last timestep alone", []
    for flags in (["--mask_loss", "dice_ce"], ["--version", "unet"], ["--mask_loss", "bce"]):
        run = [*command(brats, tmp_path, *flags), "--max_steps", 1, "--val_steps", 3]
        said.append(succeeded(script("segmentation_train", *run)))
    assert [path in text for text in said] == [True, False, False]
    assert "--val_steps has no effect with --version unet" in said[1]
    assert "--val_steps" not in said[0]


@pytest.mark.parametrize("labels", ["1,2,4", "WT,TC,ET"])
@pytest.mark.parametrize("objective", [UNET, DROPOUT], ids=["unet", "dropout"])
def test_several_classes(
    labels: str, objective: dict[str, Any], brats: Path, tmp_path: Path
) -> None:
    flags = [word for name, value in objective.items() for word in (f"--{name}", value)]
    thrifty = ["--precision", "bf16", "--use_checkpoint", True, "--microbatch", 1]
    run = command(brats, tmp_path, *flags, *thrifty, "--mask_labels", labels)
    succeeded(script("segmentation_train", *run))
    model = ["--model_path", tmp_path, "--data_dir", brats / "testing"]
    out = ["--out_dir", tmp_path / "masks", "--sampler", "direct"]
    succeeded(script("segmentation_sample", *model, *out))
    assert len(list((tmp_path / "masks").glob("000005_output0_*.png"))) == 3


@pytest.mark.parametrize("objective", [UNET, DROPOUT], ids=["unet", "dropout"])
def test_the_direct_answer_learns(objective: dict[str, Any], quiet: None, tmp_path: Path) -> None:
    """Bright discs are found without any noise in some dozens of steps."""
    loop = make_loop(tmp_path, lr=1e-2, ema_rate="0", **objective)
    for _ in range(40):
        loop.run_step(batch_of(4))
    net, diffusion, case = loop.net.eval(), loop.diffusion, Discs()[5]
    assert case.mask is not None
    with torch.inference_mode():
        raw = diffusion.direct(net, net.encode(case.image[None]), case.mask[None])
    found = (diffusion.soft_mask(raw)[0, 0] >= 0.5).numpy()
    assert dice(confusion(found, case.mask[0].numpy() >= 0.5)) > 0.9


PROGRAM = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from guided_diffusion import logger
from guided_diffusion.data.batches import collate
from guided_diffusion.dist_util import rank, setup_dist
from loops import Discs, make_loop
setup_dist()
logger.configure(quiet=True)
out, gradients = Path(sys.argv[1]), {}
for name, objective in {"unet": %r, "dropout": %r}.items():
    loop = make_loop(out, batch_size=4, microbatch=2, **objective)
    loop.forward_backward(collate([Discs()[4 * rank() + i] for i in range(4)]))
    gradients[name] = [p.grad.clone() for p in loop.parameters]
torch.save(gradients, out / f"rank{rank()}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(quiet: None, tmp_path: Path) -> None:
    """Every parameter has a gradient, which is that of the whole batch."""
    (tmp_path / "program.py").write_text(PROGRAM % (UNET, DROPOUT), encoding="utf-8")
    done = torchrun(2, tmp_path / "program.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    for name, objective in {"unet": UNET, "dropout": DROPOUT}.items():
        loop = make_loop(tmp_path, batch_size=8, **objective)
        loop.forward_backward(batch_of(8))
        alone: list[Tensor | None] = [parameter.grad for parameter in loop.parameters]
        assert_close(one[name], other[name], rtol=0, atol=0)
        assert_close(one[name], alone, rtol=1e-4, atol=1e-5)
