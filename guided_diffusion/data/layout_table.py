"""The layouts of data sets that need no code: where their images and masks are, a line each.

A pattern is a path below the data set's folder, without the file's ending, in any case:

* ``{case}`` names the case, ``{patient}`` its patient, ``{part}`` its part (``Tr``, ``test``, ...);
  ``{channel}`` is four digits, ``{modality}`` a word, and each is a channel of the image;
* ``{case:patient#_frame#}`` says what the name looks like;
* ``#`` is a number, ``*`` any text within a name, ``**/`` any folders, ``(a|b)`` one of several,
  and ``[x]`` may be missing.

A file that fits both patterns is a mask. Image and mask belong together by ``{case}``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

IMAGES = "(images|image|imgs|img)"
LABELS = "(masks|mask|labels|label|seg|segmentation|segmentations|gt|annotations|annotation)"
MARK = "(mask|seg|segmentation|gt|label)"
"""How the name of a mask ends, after that of its image."""
PARTS = {
    "training": ("train", "training", "tr"),
    "validation": ("val", "valid", "validate", "validation"),
    "testing": ("test", "testing", "ts"),
}
_PART_OF = {name: part for part, names in PARTS.items() for name in names}
CURRENT_NAMES = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"}
"""The names of modalities since BraTS 2023, and those that stand for them here."""
_WORDS = {
    "case": "[^/]+?",
    "patient": "[^/]+",
    "part": "|".join(sorted((name for names in PARTS.values() for name in names), key=len)[::-1]),
    "channel": r"\d{4}",
    "modality": "[a-z][a-z0-9]*",
}
_TOKEN = re.compile(r"\{(\w+)(?::([^}]*))?\}|\*\*/|[*#()|\[\]]|[^*#()|\[\]{}]+")
_PLAIN = {
    "**/": "(?:[^/]+/)*",
    "*": "[^/]*",
    "#": r"\d+",
    "(": "(?:",
    ")": ")",
    "|": "|",
    "[": "(?:",
    "]": ")?",
}


@dataclass(frozen=True)
class Layout:
    """A layout: its name for ``--data_name``, and the patterns of its files.

    Attributes:
        name: several lines may share one; the first that fits a folder counts.
        images: the pattern of image files.
        masks: the pattern of mask files; empty where there are none.
        united: whether a case may have several masks, whose union counts.
        by_pairs: whether only a mask beside its image shows that a folder has this layout, for its
            pattern fits images of any name.
    """

    name: str
    images: str
    masks: str = ""
    united: bool = False
    by_pairs: bool = False

    @cached_property
    def image(self) -> re.Pattern[str]:
        """The images as a regular expression of paths without ending."""
        return compiled(self.images)

    @cached_property
    def mask(self) -> re.Pattern[str]:
        """The masks as a regular expression of paths without ending."""
        return compiled(self.masks) if self.masks else re.compile(r"(?!)")

    @property
    def is_particular(self) -> bool:
        """Whether the images' names show the layout, so that their masks are no others."""
        return "{case:" in self.images

    @property
    def is_general(self) -> bool:
        """Whether a mask is known by the end of its name alone."""
        return MARK in self.masks

    @property
    def several(self) -> str:
        """What tells the files of an image apart: 'channel', 'modality', or nothing."""
        return next((name for name in ("channel", "modality") if f"{{{name}}}" in self.images), "")


TABLE = [
    Layout("NNUNET", "images{part}/{case}_{channel}", "labels{part}/{case}"),
    Layout("MSD", "images{part}/{case}", "labels{part}/{case}"),
    Layout(
        "ACDC", "[**/{patient:patient#}/]{case:patient#_frame#}", "**/{case:patient#_frame#}_gt"
    ),
    Layout("DRIVE", "images/{case:#}_(training|test)", "1st_manual/{case:#}_manual1"),
    Layout("REFUGE", "**/*{part}400/**/{case}", "**/Disc_Cup_Masks/**/{case}"),
    Layout(
        "BUSI",
        "**/(benign|malignant|normal)/{case}",
        "**/(benign|malignant|normal)/{case}_mask[_#]",
        united=True,
    ),
    Layout("PAIRS", f"{IMAGES}/{{case}}", f"{LABELS}/{{case}}"),
    Layout("PAIRS", f"{IMAGES}/{{case}}", f"{LABELS}/{{case}}(_|-){MARK}"),
    Layout("PAIRS", f"{IMAGES}/{{case}}_{{channel}}", f"{LABELS}/{{case}}[_{MARK}]"),
    Layout("PAIRS", f"{IMAGES}/{{part}}/{{case}}", f"{LABELS}/{{part}}/{{case}}[_{MARK}]"),
    Layout("CASES", "**/{case}/(image|img)", f"**/{{case}}/{MARK}"),
    Layout("CASES", "{case}/images/*", "{case}/masks/*", united=True),
    Layout("SUFFIX", "**/{case}_(image|img)", f"**/{{case}}(_|-){MARK}", by_pairs=True),
    Layout("SUFFIX", "**/{case}", f"**/{{case}}(_|-){MARK}", by_pairs=True),
    Layout("CHANNELS", "**/{case}_{modality}", f"**/{{case}}_{MARK}", by_pairs=True),
    Layout(
        "CHANNELS",
        f"{IMAGES}/{{case}}_{{modality}}",
        f"{LABELS}/{{case}}[_{MARK}]",
        by_pairs=True,
    ),
    Layout("CHANNELS", "**/{case}/{modality}", f"**/{{case}}/{MARK}", by_pairs=True),
]
"""The layouts, the most particular first; a line that is added here is read by every command."""
NUMBERED = Layout("NNUNET", "{case}_{channel}")
BARE = Layout("IMAGES", "{case}")
"""Images without masks, directly in their folder: to be segmented."""


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression, with a group for each name in it."""
    return re.compile(_translated(pattern, set()), re.IGNORECASE)


def _translated(pattern: str, known: set[str]) -> str:
    return "".join(_token(match, known) for match in _TOKEN.finditer(pattern))


def _token(match: re.Match[str], known: set[str]) -> str:
    text, name, shape = match[0], match[1], match[2]
    if name is None:
        return _PLAIN.get(text) or re.escape(text)
    if name in known:
        return f"(?P={name})"
    known.add(name)
    return f"(?P<{name}>{_translated(shape, known) if shape else _WORDS[name]})"


def part_of(text: str | None) -> str:
    """The part that a name of a folder says, as splits call it; empty for any other."""
    return _PART_OF.get(text.lower(), "") if text else ""
