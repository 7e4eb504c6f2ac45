"""The flags of the weak-supervision scripts: masks from image-level labels.

Names and types are those of the published scripts (Hu et al., 2023), whose defaults contradict each
other between training and use; ours agree with one another and with the supervised scripts. Their
names for what the other scripts have too (``--img_size``, ``--save_dir``, ``--workers``,
``--iterations``) are aliases. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from guided_diffusion.options.flags import flag
from guided_diffusion.options.network import (
    MOST_INPUTS,
    MOST_PIXELS,
    MOST_PROCESSES,
    MOST_STEPS,
    DiffusionOptions,
    NetworkOptions,
)
from guided_diffusion.options.presets import PresetOptions
from guided_diffusion.options.segmentation import LiveOptions, RunOptions, TrainingOptions

METHODS = ("cdm", "cg-cdm", "one-branch", "counterfactual", "encoded", "gradcam", "otsu")


@dataclass(frozen=True)
class SourceOptions:
    """Where the labelled images are."""

    src_dir: str = flag(
        "./data/weak",
        "folder with training/ and validate/ (or validation/), each with normal/ and tumor/ and "
        "perhaps seg/; or with splits.pkl and NumPy volumes; trained networks bring theirs",
        run=True,
    )
    data_folder: str = flag("preprocessed", "folder of the NumPy volumes below src_dir", run=True)
    fold: int = flag(0, "which split of splits.pkl", alias="-f", least=0, run=True)
    class_index: int = flag(
        1,
        "NumPy volumes: the label that makes a slice positive; 2 stands for 2 and 3; published "
        "weights: the class of a lesion",
        least=1,
    )
    dataset: str = flag(
        "brats", "name of the data set", dead="channels and layout follow the data", run=True
    )
    data_dir: str = flag("", "folder of the data", dead="--src_dir names it", run=True)


@dataclass(frozen=True)
class ImageNetworkOptions(NetworkOptions):
    """The network that denoises images; recorded in the checkpoint."""

    version: str = flag("plain", "network; only plain diffuses images")
    image_size: int = flag(
        128,
        "height and width the network works at, in pixels",
        alias="--img_size",
        cap=MOST_PIXELS,
    )
    in_ch: int = flag(1, "image channels; follows the data")
    class_cond: bool = flag(False, "condition on the image-level label; segmentation needs it")
    ss_blocks: int = flag(2, "SS-Former blocks", dead="the plain network has none", least=1)
    model_name: str = flag("unet", "network", choices=("unet",), run=True)


@dataclass(frozen=True)
class ImageDiffusionOptions(DiffusionOptions):
    """The diffusion of images; recorded in the checkpoint."""

    rescale_timesteps: bool = flag(True, "give the networks t * 1000 / T as the timestep")
    rescale_learned_sigmas: bool = flag(True, "weigh the bound by T / 1000 in the hybrid loss")
    mask_range: str = flag(
        "-1,1", "values of black and white in diffusion; 0,1 for weights of the published code"
    )
    mask_loss: str = flag("mse", "loss; images have mse alone", choices=("mse",))
    mask_dropout: float = flag(0.0, "for the diffusion of masks only", least=0, most=0)
    noise_share: float = flag(0.0, "for the diffusion of masks only", least=0, most=0)
    input_scale: float = flag(
        1.0, "factor of the image before it is noised, as in 0.5", least=1e-3, most=1e3
    )


@dataclass(frozen=True)
class ClassifierOptions:
    """The classifier of noisy images; recorded in its checkpoint."""

    model_type: str = flag("encoder", "classifier", choices=("encoder", "resnet50"))
    image_size: int = flag(
        128,
        "height and width the classifier works at, in pixels",
        alias="--img_size",
        cap=MOST_PIXELS,
    )
    in_channel: int = flag(1, "image channels; follows the data", least=1)
    num_classes: int = flag(5, "classes; follows the data", least=2, most=1000)
    classifier_width: int = flag(128, "width of the first level, a multiple of 32")
    classifier_depth: int = flag(2, "residual blocks on each level", least=1, cap=100)
    classifier_attention_resolutions: str = flag(
        "32,16,8", "feature map sizes, in pixels, that get attention"
    )
    classifier_use_scale_shift_norm: bool = flag(
        True, "the timestep scales and shifts after normalisation"
    )
    classifier_resblock_updown: bool = flag(True, "resample inside residual blocks")
    classifier_pool: str = flag(
        "attention",
        "how maps become one vector",
        choices=("adaptive", "attention", "spatial", "spatial_v2"),
    )
    classifier_told_time: bool = flag(
        True, "condition the ResNet on the timestep; the published one is not"
    )
    classifier_use_fp16: bool = flag(
        False, "compute in half precision", dead="--precision sets it for all networks", run=True
    )


@dataclass(frozen=True)
class ImageTrainingOptions(TrainingOptions):
    """The training loop."""

    rater_choice: str = flag("random", "mask", dead="images are trained on, not masks", run=True)
    foreground_share: float = flag(0.0, "share", dead="images are trained on, not masks")
    fsdp: str = flag("off", "divide the network", dead="each process has a copy")
    batch_size: int = flag(8, "images in one step", least=1)
    log_interval: int = flag(10, "steps between two lines of the log", least=1)
    save_interval: int = flag(1000, "steps between two checkpoints", least=1)
    num_workers: int = flag(
        -1,
        "processes that read data; 0: the training process itself; -1: up to 4 beside a CUDA "
        "device, else 0",
        least=-1,
        cap=MOST_PROCESSES,
        alias="--workers",
    )
    sigma_small: bool = flag(
        False, "the smaller variance in sampling", dead="training does not depend on it"
    )
    distributed: bool = flag(
        False, "share the work", dead="torchrun or --multi_gpu share it", switch=True
    )
    cache_gib: float = flag(
        0.0, "disk space for decoded images", dead="images are small, and read each time"
    )


@dataclass(frozen=True)
class ClassifierTrainingOptions(ImageTrainingOptions):
    """The training loop of the classifier."""

    max_steps: int = flag(
        150_000, "stop after this many steps; 0: never", least=0, alias="--iterations"
    )
    lr: float = flag(3e-4, "learning rate", least=0)
    anneal_lr: bool = flag(False, "let the rate fall linearly to 0 over max_steps")
    noised: bool = flag(True, "train on noisy images; False: on clean ones")
    eval_interval: int = flag(0, "steps between two validations; 0: at every checkpoint", least=0)
    held_out: float = flag(
        0.1, "share of the training patients kept for validation; 0: none", least=0, most=0.9
    )
    val_data_dir: str = flag("", "validation data", dead="--held_out sets the share")


@dataclass(frozen=True)
class WeakRunOptions(RunOptions):
    """Output folder, seed, devices and precision."""

    out_dir: str = flag(
        "./results/weak",
        "folder of both networks: the diffusion's files, and the classifier's in classifier/",
        alias="--save_dir",
    )


@dataclass(frozen=True)
class ImageSamplingOptions:
    """How images are drawn."""

    model_path: str = flag(
        "", "checkpoint of the diffusion, or its folder; empty: save_dir, or the only one beside it"
    )
    classifier_path: str = flag(
        "", "checkpoint of the classifier, or its folder; empty: save_dir/classifier_model.pt"
    )
    classifier_scale: float = flag(1.0, "strength of the classifier's guidance", least=0)
    guided: bool = flag(False, "follow the classifier's gradient", switch=True)
    class_index: int = flag(
        -1,
        "class of every image; -1: 0 or 1, drawn for each; published weights may have others",
        least=-1,
    )
    num_samples: int = flag(8, "images to draw", least=1, cap=1_000_000)
    batch_size: int = flag(8, "images at a time", least=1, cap=MOST_INPUTS)
    use_ddim: bool = flag(False, "sample with DDIM")
    steps: int = flag(0, "network evaluations per image; 0: every trained timestep", least=0)
    clip_denoised: bool = flag(True, "clip the predicted clean image at every evaluation")
    sigma_small: bool = flag(False, "the smaller of DDPM's two variances")
    weights: str = flag("ema", "averaged or last weights", choices=("ema", "raw"))
    trained_steps: int = flag(
        0, "schedule length of bare weights; 0: 1000", least=0, cap=MOST_STEPS
    )
    dry_run: bool = flag(False, "do everything up to the first image, and write nothing", run=True)
    dataset: str = flag("brats", "name of the data set", dead="the checkpoint knows its channels")
    src_dir: str = flag("", "folder of the data", dead="images are drawn from noise")


@dataclass(frozen=True)
class WeakOptions:
    """How masks are made from class labels."""

    method: str = flag(
        "",
        "two branches: cdm, or guided cg-cdm; one-branch; difference from a healthy version: "
        "counterfactual from drawn noise, encoded from the image's own; gradcam; otsu: of the "
        "image itself; empty: cg-cdm with guided, else cdm",
        choices=("", *METHODS),
    )
    guided: bool = flag(False, "follow the classifier's gradient: cg-cdm", switch=True)
    classifier_scale: float = flag(10.0, "strength of the classifier's guidance", least=0)
    model_path: str = flag(
        "", "checkpoint of the diffusion, or its folder; empty: save_dir, or the only one beside it"
    )
    classifier_path: str = flag(
        "", "checkpoint of the classifier, or its folder; empty: save_dir/classifier_model.pt"
    )
    level: int = flag(400, "Q, the timestep to which images are noised", least=0)
    steps: int = flag(10, "R, steps of each branch, or of the whole reconstruction", least=1)
    stride: int = flag(1, "trained timesteps between two steps of the branches", least=1)
    tau: float = flag(
        0.95, "share of the lesion's embedding in the second branch's", least=0, most=0.9999
    )
    noises: int = flag(1, "draws of the noise whose maps are averaged", least=1)
    difference: str = flag(
        "signed",
        "signed finds what is brighter than without a lesion; positive: the same, with what is "
        "darker set to 0 before the cut; absolute: what is different. Of Grad-CAM, the positive "
        "part or the absolute value",
        choices=("signed", "positive", "absolute"),
    )
    cam_shrink: int = flag(
        8,
        "Grad-CAM reads the deepest map that is at most this many times smaller than the image",
        least=1,
    )
    smooth: float = flag(0.0, "standard deviation in pixels by which maps are smoothed", least=0)
    cut_at: float = flag(
        0.0,
        "cut maps at this fraction of their own range; 0: at Otsu's threshold",
        least=0,
        most=0.9999,
    )
    cuts: int = flag(
        1, "times that Otsu's threshold is applied, each to what lies above the last", least=1
    )
    largest: str = flag(
        "", "keep the largest component, 4- or 8-connected; empty: all", choices=("", "4", "8")
    )
    fill_holes: bool = flag(False, "fill the holes of masks")
    label: str = flag(
        "truth",
        "which images are segmented: truth, those in the tumor folder; classifier, those that it "
        "calls positive; diffusion, those whose noise it predicts better as a lesion; tumor, all. "
        "The others get empty masks",
        choices=("truth", "classifier", "diffusion", "tumor"),
    )
    part: str = flag("validation", "images to segment", choices=("validation", "training"))
    results_dir: str = flag(
        "",
        "folder for masks and scores; empty: save_dir/<method>, or save_dir/<method>_training",
    )
    num_samples: int = flag(0, "images to segment, evenly spread; 0: all", least=0)
    batch_size: int = flag(8, "images at a time", least=1, cap=MOST_INPUTS)
    weights: str = flag("ema", "averaged or last weights", choices=("ema", "raw"))
    trained_steps: int = flag(
        0, "schedule length of bare weights; 0: 1000", least=0, cap=MOST_STEPS
    )
    dry_run: bool = flag(False, "do everything up to the first image, and write nothing", run=True)


@dataclass(frozen=True)
class ArrayOptions:
    """How the branches of a diffusion are written as arrays."""

    guided: bool = flag(False, "follow the classifier's gradient", switch=True)
    classifier_scale: float = flag(1.0, "strength of the classifier's guidance", least=0)
    model_path: str = flag(
        "", "checkpoint of the diffusion, or its folder; empty: save_dir, or the only one beside it"
    )
    classifier_path: str = flag(
        "", "checkpoint of the classifier, or its folder; empty: save_dir/classifier_model.pt"
    )
    level: int = flag(500, "Q, the timestep to which images are noised", least=0)
    steps: int = flag(10, "R, steps of each branch", least=1)
    stride: int = flag(1, "trained timesteps between two steps of the branches", least=1)
    tau: float = flag(
        0.95, "share of the lesion's embedding in the second branch's", least=0, most=0.9999
    )
    part: str = flag("validation", "images to use", choices=("validation", "training"))
    num_samples: int = flag(
        12, "images with a lesion to use, evenly spread; 0: all", least=0, cap=1_000_000
    )
    batch_size: int = flag(8, "images at a time", least=1, cap=MOST_INPUTS)
    weights: str = flag("ema", "averaged or last weights", choices=("ema", "raw"))
    trained_steps: int = flag(
        0, "schedule length of bare weights; 0: 1000", least=0, cap=MOST_STEPS
    )
    dry_run: bool = flag(False, "do everything up to the first image, and write nothing", run=True)


@dataclass(frozen=True)
class UnusedOptions:
    """Flags of the published script that have no effect here."""

    schedule_sampler: str = flag("uniform", "how timesteps are drawn", dead="only training has it")
    lr: float = flag(1e-4, "learning rate", dead="only training has it")
    weight_decay: float = flag(0.0, "weight decay", dead="only training has it")
    lr_anneal_steps: int = flag(0, "steps of annealing", dead="only training has it")
    microbatch: int = flag(-1, "images in one pass", dead="--batch_size sets it")
    ema_rate: str = flag("0.9999", "decay of the averages", dead="--weights chooses them")
    log_interval: int = flag(10, "steps between lines", dead="only training has it")
    save_interval: int = flag(10, "steps between checkpoints", dead="only training has it")
    resume_checkpoint: str = flag("", "checkpoint to continue", dead="only training has it")
    fp16_scale_growth: float = flag(1e-3, "growth of the loss scale", dead="only training has it")
    num_workers: int = flag(
        8, "processes that read data", dead="the main process reads", alias="--workers"
    )
    distributed: bool = flag(False, "share the work", dead="one device is used", switch=True)
    aug_smooth: bool = flag(False, "smooth a CAM", dead="--smooth smooths any map", switch=True)
    eigen_smooth: bool = flag(False, "smooth a CAM", dead="--smooth smooths any map", switch=True)


TRAIN_IMAGES = (
    PresetOptions,
    SourceOptions,
    ImageNetworkOptions,
    ImageDiffusionOptions,
    ImageTrainingOptions,
    LiveOptions,
    WeakRunOptions,
)
TRAIN_CLASSIFIER = (
    PresetOptions,
    SourceOptions,
    ClassifierOptions,
    ImageDiffusionOptions,
    ClassifierTrainingOptions,
    LiveOptions,
    WeakRunOptions,
)
SAMPLE_IMAGES = (
    ImageSamplingOptions,
    ImageNetworkOptions,
    ImageDiffusionOptions,
    ClassifierOptions,
    WeakRunOptions,
)
SEGMENT_WEAKLY = (
    PresetOptions,
    WeakOptions,
    SourceOptions,
    ImageNetworkOptions,
    ImageDiffusionOptions,
    ClassifierOptions,
    WeakRunOptions,
    UnusedOptions,
)
WRITE_ARRAYS = (
    ArrayOptions,
    SourceOptions,
    ImageNetworkOptions,
    ImageDiffusionOptions,
    ClassifierOptions,
    WeakRunOptions,
    UnusedOptions,
)
