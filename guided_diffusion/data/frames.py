"""The geometry between a case and the network's input.

:class:`Frame` is the one place where images and masks are cropped or resized, and restored to their
own size.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from guided_diffusion.data.datasets import Case, SegmentationDataset
from guided_diffusion.data.folders import size_text
from guided_diffusion.errors import UserError

CROPS = ("auto", "none", "wolleb")
WOLLEB_SIZE, WOLLEB_CROP = 240, 8


@dataclass(frozen=True)
class Frame:
    """How a case is brought to the size of the network's input and back.

    ``crop`` = 0 resizes to ``image_size`` x ``image_size``. ``crop`` > 0 removes that many pixels
    from every side and resizes nothing, so the network's input has the cropped size whatever
    ``image_size`` is (Wolleb: 240 -> 224). A case of the target size is not resampled.
    """

    image_size: int
    crop: int = 0

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.crop < 0:
            raise UserError(
                "--image_size / --crop",
                f"image_size {self.image_size} or crop {self.crop} is out of range; the size must "
                "be positive and the crop at least 0",
                "Pass a size such as --image_size 256.",
            )

    def fit_image(self, image: Tensor) -> Tensor:
        """Image float32 [..., H, W] -> [..., h, w]; resizing is bilinear and antialiased."""
        square = (self.image_size, self.image_size)
        return self._cropped(image) if self.crop else _resize(image, square)

    def fit_mask(self, mask: Tensor) -> Tensor:
        """Mask float32 [..., H, W] in [0, 1] -> [..., h, w] in {0, 1}, by the image's geometry.

        The coverage of every target pixel is thresholded once, at one half, after the resize, so
        that areas are kept: a threshold before the resize, or at 0, would dilate the mask.
        """
        return (self.fit_image(mask) >= 0.5).to(mask.dtype)

    def fit(self, case: Case) -> Case:
        """Crop or resize image and mask of ``case``; name and affine are kept."""
        mask = None if case.mask is None else self.fit_mask(case.mask)
        raters = None if case.raters is None else self.fit_mask(case.raters)
        return case._replace(image=self.fit_image(case.image), mask=mask, raters=raters)

    def seen(self, values: Tensor) -> Tensor:
        """The part of a map [..., H, W] at the case's size that the network's input covers."""
        return self._cropped(values) if self.crop else values

    def restore(self, soft: Tensor, size: tuple[int, int]) -> Tensor:
        """Soft map [..., h, w] -> [..., H, W] for ``size`` = (H, W); stays within its own range.

        A cropped border is filled with 0. Raises :class:`UserError` where cropping an image of
        ``size`` cannot give h x w.
        """
        if not self.crop:
            return _resize(soft, size)
        border = 2 * self.crop
        if (soft.shape[-2] + border, soft.shape[-1] + border) != tuple(size):
            raise UserError(
                "--crop",
                f"a map of {size_text(soft)} does not fit an image of {size[0]} x {size[1]}, which "
                f"should be {border} pixels larger on both axes",
                "Use the crop that the checkpoint was trained with.",
            )
        return functional.pad(soft, (self.crop,) * 4)

    def _cropped(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if min(height, width) <= 2 * self.crop:
            raise UserError(
                "--crop",
                f"an image of {height} x {width} is too small, it needs more than "
                f"{2 * self.crop} pixels on both axes",
                "Pass --crop none to resize instead.",
            )
        return image[..., self.crop : height - self.crop, self.crop : width - self.crop]


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., H, W] -> [..., *size]: bilinear, antialiased on shrinking, in the input's range."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    planes = image.reshape(1, -1, *image.shape[-2:])
    resized = functional.interpolate(planes, size=size, mode="bilinear", antialias=True)
    return resized.clamp(image.min(), image.max()).reshape(*image.shape[:-2], *size)


def auto_frame(
    layout: str, size: tuple[int, int], *, version: str, image_size: int, crop: str = "auto"
) -> Frame:
    """Choose the frame for ``--crop auto|none|wolleb`` by layout and the cases' size (H, W).

    auto: BraTS slices of 240 x 240 with the plain network, or the plain U-Net, and ``image_size``
    256 are cropped to 224 as Wolleb et al. (2022) do; everything else is resized to
    ``image_size``.
    """
    if crop not in CROPS:
        raise UserError("--crop", f"{crop!r} is not a crop", f"Choose one of {', '.join(CROPS)}.")
    as_wolleb = (
        layout == "BRATS"
        and tuple(size) == (WOLLEB_SIZE, WOLLEB_SIZE)
        and version in ("plain", "unet")
        and image_size == 256
    )
    cropped = crop == "wolleb" or (crop == "auto" and as_wolleb)
    return Frame(image_size, WOLLEB_CROP if cropped else 0)


class ResizedDataset(Dataset[Case]):
    """A data set at the size of the network's input, with masks in {0, 1}.

    Where two classes that exclude each other cover half of a pixel each, the first one gets it.
    """

    def __init__(self, dataset: SegmentationDataset, frame: Frame) -> None:
        self.dataset = dataset
        self.frame = frame

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Case:
        """Case ``index``, cropped or resized."""
        case, classes = self.frame.fit(self.dataset[index]), self.dataset.classes
        if case.mask is None or classes is None or not classes.exclusive:
            return case
        return case._replace(
            mask=_first_of(case.mask),
            raters=None if case.raters is None else _first_of(case.raters),
        )


def _first_of(mask: Tensor) -> Tensor:
    """Give pixels of several classes to the first one, [..., K, h, w]."""
    return mask * (mask.cumsum(dim=-3) <= 1)
