"""The flag of all commands that read files."""

from __future__ import annotations

from dataclasses import dataclass

from guided_diffusion.options.flags import flag


@dataclass(frozen=True)
class ReadingOptions:
    """How much a file may ask for."""

    max_read_gib: float = flag(
        8.0,
        "memory, in GiB, that the decoding of one file may take; files that need more are refused; "
        "0: no limit",
        run=True,
        least=0,
    )
