"""The flags of the network and of its diffusion, which a checkpoint records."""

from __future__ import annotations

from dataclasses import dataclass

from guided_diffusion.options.flags import flag

# Far above what anybody has used; beyond, a typing mistake would fill the memory before it fails.
MOST_PIXELS = 16_384
MOST_STEPS = 100_000
MOST_PROCESSES = 256
MOST_INPUTS = 65_536


@dataclass(frozen=True)
class NetworkOptions:
    """The network's architecture; recorded in the checkpoint."""

    version: str = flag(
        "plain",
        "network: plain concatenates image and noisy mask; 1 and new are MedSegDiff's, 2 is "
        "MedSegDiff-V2's; unet is the plain one without diffusion, one evaluation of the image",
        choices=("plain", "1", "new", "2", "unet"),
    )
    image_size: int = flag(64, "height and width the network works at, in pixels", cap=MOST_PIXELS)
    in_ch: int = flag(5, "image channels plus noisy mask channels; follows the data")
    num_channels: int = flag(128, "width of the first level, a multiple of 32")
    num_res_blocks: int = flag(2, "residual blocks on each level", least=1, cap=100)
    channel_mult: str = flag("", "width of each level, as in 1,2,3,4; empty: from image_size")
    attention_resolutions: str = flag("16,8", "feature map sizes, in pixels, that get attention")
    num_heads: int = flag(4, "attention heads", least=1)
    num_heads_upsample: int = flag(-1, "attention heads on the way up; -1: as num_heads", least=-1)
    num_head_channels: int = flag(
        -1, "channels of one head, instead of num_heads; -1: unused", least=-1
    )
    use_scale_shift_norm: bool = flag(True, "the timestep scales and shifts after normalisation")
    resblock_updown: bool = flag(False, "resample inside residual blocks")
    use_new_attention_order: bool = flag(False, "split query, key, value before the heads")
    class_cond: bool = flag(False, "condition on a class label (not in segmentation)")
    ss_blocks: int = flag(2, "SS-Former blocks of version 2", least=1, cap=100)
    dropout: float = flag(0.0, "dropout probability inside residual blocks", least=0, most=1)
    use_checkpoint: bool = flag(False, "the same as --checkpoint_levels all", run=True)
    checkpoint_levels: str = flag(
        "",
        "levels whose activations are recomputed to save memory: fine, the two finest, which have "
        "most of them; empty: by use_checkpoint",
        choices=("", "all", "fine", "none"),
        run=True,
    )


@dataclass(frozen=True)
class DiffusionOptions:
    """The diffusion a network is trained for; recorded in the checkpoint."""

    diffusion_steps: int = flag(
        1000,
        "training: length of the schedule; sampling: network evaluations per mask",
        cap=MOST_STEPS,
    )
    noise_schedule: str = flag("linear", "noise schedule", choices=("linear", "cosine"))
    timestep_respacing: str = flag(
        "", "timesteps to use, as in 50 or 10,20,30 or ddim50; empty: all"
    )
    learn_sigma: bool = flag(False, "learn the variance of the reverse process")
    predict_xstart: bool = flag(False, "predict the clean mask instead of the noise")
    use_kl: bool = flag(False, "train on the variational bound")
    rescale_timesteps: bool = flag(False, "give the network t * 1000 / T as the timestep")
    rescale_learned_sigmas: bool = flag(False, "weigh the bound by T / 1000 in the hybrid loss")
    mask_range: str = flag("0,1", "values of background and foreground in diffusion: 0,1 or -1,1")
    predict_v: bool = flag(False, "predict v = alpha * noise - sigma * mask instead of the noise")
    min_snr_gamma: float = flag(
        0.0, "cap of the signal-to-noise ratio in the loss's weight, as in 5; 0: no weight", least=0
    )
    mask_loss: str = flag(
        "auto",
        "loss of the predicted mask: mse; bce, cross-entropy of the clean mask; dice_ce, the same "
        "plus Dice where no noisy mask is seen; auto: dice_ce for version unet, else mse",
        choices=("auto", "mse", "bce", "dice_ce"),
    )
    mask_dropout: float = flag(
        0.0,
        "share of training draws without the noisy mask, so that one evaluation of the image gives "
        "a mask too, as in 0.5",
        least=0,
        most=1,
    )
    noise_share: float = flag(
        0.0,
        "share of training draws at the last timestep, where the mask is pure noise, so that one "
        "evaluation from noise gives a good mask, as in 0.3",
        least=0,
        most=1,
    )
    input_scale: float = flag(
        1.0,
        "factor of the mask before it is noised; below 1, as in 0.2, less of it is left at every "
        "timestep",
        least=1e-3,
        most=1e3,
    )
    coarse_loss: str = flag(
        "auto",
        "loss of the condition network's own mask: mse (times 10), dice_ce (Dice + 10 x "
        "cross-entropy where t is a multiple of 5), none; auto: as the version's paper",
        choices=("auto", "mse", "dice_ce", "none"),
    )
