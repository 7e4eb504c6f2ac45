"""The images that trained networks are used on: found, opened, and compared with the networks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields

from guided_diffusion import logger
from guided_diffusion.data.folders import counted
from guided_diffusion.data.tumorloader import LabelledImages
from guided_diffusion.errors import UserError
from guided_diffusion.files import expanded
from guided_diffusion.inference.trained import Trained
from guided_diffusion.networks.resnet import ResNet50
from guided_diffusion.options.flags import Flags, mistyped, unfit
from guided_diffusion.options.weak import SourceOptions
from guided_diffusion.weak.models import ClassifierModel, ImageModel
from guided_diffusion.weak.train import open_labelled, source_notes


def open_images(
    flags: Flags, part: str, model: ImageModel | None, classifier: ClassifierModel | None
) -> tuple[Flags, LabelledImages]:
    """Open a part of the images for trained networks, and log what is used.

    Returns:
        The flags, completed by what the networks' training records where they do not name the data,
        and the images.

    Raises:
        UserError: there are none, or the networks do not fit them or each other.
    """
    networks = [network for network in (model, classifier) if network]
    for network in networks:
        logger.log(network.source)
    flags, notes = with_recorded_source(flags, [network.trained for network in networks])
    dataset = open_labelled(flags.group(SourceOptions), part)
    bare = model is not None and not model.trained.is_own
    notes += source_notes(flags, dataset, used=("class_index",) if bare else ())
    for note in [*notes, *size_notes(model, classifier)]:
        logger.log(note)
    for network in networks:
        dataset.convert_to(network.net.in_channels)
        if network.net.in_channels != dataset.channels:
            raise UserError(
                dataset.directory,
                f"its images have {counted(dataset.channels, 'channel')}, {network.source} was "
                f"trained on {network.net.in_channels}",
                "Use images like those of training.",
            )
    return flags, dataset


def with_recorded_source(flags: Flags, networks: Sequence[Trained]) -> tuple[Flags, list[str]]:
    """Take ``--src_dir`` and what belongs to it from the first network that records it.

    Given flags win. Networks without a record leave the flags as they are.

    Returns:
        The flags, and what to log of it.

    Raises:
        UserError: the recorded folder does not exist here.
    """
    if flags.get("src_dir"):
        return flags, []
    for trained in networks:
        run = trained.checkpoint.run
        record = {**_flags_in(run, "other"), **_flags_in(run, "given")}
        values = {
            entry.name: record[entry.name]
            for entry in fields(SourceOptions)
            if entry.name in record and entry.name not in flags.given
            if not mistyped(SourceOptions, entry, record[entry.name])
            if not unfit(entry, record[entry.name]) and not entry.metadata["dead"]
        }
        places = [values.get("src_dir"), _flags_in(run, "data").get("path")]
        known = [place for place in places if isinstance(place, str) and place]
        if not known:
            continue
        folder = next((place for place in known if _exists(place)), "")
        if not folder:
            raise UserError(
                "--src_dir",
                f"is missing, and there is no {known[0]}, on which {trained.path} was trained",
                "Name the folder of the images.",
            )
        note = f"--src_dir {folder}, on which {trained.path} was trained"
        return flags.with_resolved(**{**values, "src_dir": folder}), [note]
    return flags, []


def _exists(place: str) -> bool:
    with suppress(OSError, UserError, ValueError):
        return expanded(place).exists()
    return False


def _flags_in(run: object, part: str) -> dict[str, object]:
    found = run.get(part) if isinstance(run, dict) else None
    return found if isinstance(found, dict) else {}


def size_notes(model: ImageModel | None, classifier: ClassifierModel | None) -> list[str]:
    """Say that a classifier was trained at another size than the diffusion.

    Raises:
        UserError: it can work at its own size only.
    """
    if not (model and classifier) or classifier.image_size == model.net.image_size:
        return []
    if not isinstance(classifier.net, ResNet50):  # which is convolutional
        raise UserError(
            classifier.source,
            f"the classifier works at {classifier.image_size} pixels, {model.source} at "
            f"{model.net.image_size}",
            "Train both networks with one --img_size.",
        )
    own = f"the classifier was trained at {classifier.image_size} pixels and is used at "
    note = f"{own}{model.net.image_size}: for better guidance train both with one --img_size"
    return [note] * classifier.trained.is_own
