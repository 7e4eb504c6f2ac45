"""Checkpoints in shards: each process writes its part of every tensor, none holds a whole one.

The shards are files of ``torch.distributed.checkpoint`` in a folder of their own. The checkpoint
itself, ``savedmodelNNNNNN.pt``, has tensors without values in their place, and says which file has
which part of which tensor, and the size and checksum of every file. It is written last: a folder
that no checkpoint names was not completed. What ``torch.distributed.checkpoint`` notes beside the
shards is a pickle that could run code; it is never read.
"""

from __future__ import annotations

import math
import re
import shutil
import warnings
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from guided_diffusion.checkpoint.portable import FORMAT
from guided_diffusion.checkpoint.weights import (
    checksums,
    map_named,
    map_tensors,
    named_tensors,
    verify,
)
from guided_diffusion.errors import UserError

SHARDED = "guided_diffusion sharded checkpoint 1"
SUFFIX = ".shards"
_FOLDER = re.compile(r"savedmodel\d+-[0-9a-f]{8}\.shards")
_FILE = re.compile(r"__\d+_\d+\.distcp")
_BLOCK = 2**24
_ABOUT = ("format", "checksums", "shards")
_HINT = (
    "Copy the checkpoint and its folder again from their source, or continue from an earlier one; "
    "shards of two runs cannot be joined."
)


def own_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process has; any other tensor itself."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def is_sharded(value: Any) -> bool:
    """Whether a nested state has tensors that are divided among processes."""
    return any(hasattr(tensor, "to_local") for _, tensor in named_tensors(value))


def without_values(value: Any) -> bool:
    """Whether a nested state has tensors whose values are in shards that are not read yet."""
    return any(tensor.is_meta for _, tensor in named_tensors(value))


# -------------------------------------------------------------------------------------- writing


class ShardSet(NamedTuple):
    """How the processes of a run write the shards of one checkpoint.

    Attributes:
        name: eight random digits, the same in all of them.
        group: of all of them; nothing else may use it meanwhile.
    """

    name: str
    group: dist.ProcessGroup

    @property
    def first(self) -> bool:
        """Whether this process writes the file that names the shards."""
        return dist.get_rank(self.group) == 0


def write_shards(folder: Path, content: Mapping[str, Any], shards: ShardSet) -> dict[str, Any]:
    """Write this process's shards of a state below a run's folder; all processes call this.

    Args:
        folder: of the run.
        content: the parts of a checkpoint, on the CPU.
        shards: which ones.

    Returns:
        The content of the file that names the shards.

    Raises:
        OSError: they cannot be written, by this or another process.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.checkpoint.storage import WriteResult

    class Writer(FileSystemWriter):
        def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
            super().finish(metadata, results)
            # Torch before 2.13 notes this in a copy alone.
            metadata.storage_data = {one.index: one.storage_data for own in results for one in own}

    group = shards.group
    own = {name: value for name, value in named_tensors(content) if is_sharded(value)}
    place = folder / f"savedmodel{content['step']:06d}-{shards.name}{SUFFIX}"
    place.mkdir(exist_ok=True)
    try:
        metadata = save(dict(own), storage_writer=Writer(place), process_group=group)
    except CheckpointException as error:
        shutil.rmtree(place, ignore_errors=True)
        reason = next(iter(error.failures.values()))[0]
        raise OSError(str(reason)) from error
    written = place.glob(f"__{dist.get_rank(group)}_*.distcp")
    parts: list[dict[str, list[int]]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(parts, {file.name: _size_and_sum(file) for file in written}, group)
    rest = map_tensors(lambda value: None if is_sharded(value) else value, dict(content))
    return {
        **map_tensors(lambda v: _valueless(v) if is_sharded(v) else v, dict(content)),
        "format": SHARDED,
        "checksums": checksums(rest),
        "shards": {
            "folder": place.name,
            "processes": len(parts),
            "files": {name: entry for part in parts for name, entry in part.items()},
            "pieces": _pieces(metadata),
        },
    }


def _valueless(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _size_and_sum(file: Path) -> list[int]:
    size, crc = 0, 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _pieces(metadata: Any) -> dict[str, list[list[Any]]]:
    """Where the parts of each tensor are: offsets, sizes, file, and first byte and length in it."""
    pieces: dict[str, list[list[Any]]] = {}
    for index, info in metadata.storage_data.items():
        chunks = metadata.state_dict_metadata[index.fqn].chunks
        sizes = next(chunk.sizes for chunk in chunks if chunk.offsets == index.offset)
        place = [info.relative_path, info.offset, info.length]
        pieces.setdefault(index.fqn, []).append([[*index.offset], [*sizes], *place])
    return pieces


def remove_unnamed(folder: Path) -> None:
    """Remove the folders of shards that no checkpoint of a run's folder names.

    They were not completed, or their checkpoint is deleted. If one checkpoint cannot be read, all
    stay.
    """
    found = [path for path in folder.glob(f"*{SUFFIX}") if _FOLDER.fullmatch(path.name)]
    if not found:
        return
    try:
        named = {_folder_of(path) for path in folder.glob("*.pt")}
    except Exception:  # other files can fail in any way
        return
    for path in found:
        if path.name not in named and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _folder_of(path: Path) -> str:
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    sharded = isinstance(content, dict) and content.get("format") == SHARDED
    return str(content["shards"]["folder"]) if sharded else ""


# -------------------------------------------------------------------------------------- reading


def opened(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Check what a file says of its shards, and return the parts of a checkpoint.

    Raises:
        ValueError: it contradicts itself.
        UserError: a shard is missing or of another size, or there are too many.
    """
    shards = content["shards"]
    folder, files, pieces = _folder(content, path), shards["files"], shards["pieces"]
    sharded = {name: value for name, value in named_tensors(content) if value.is_meta}
    if not _FOLDER.fullmatch(shards["folder"]) or pieces.keys() != sharded.keys():
        raise ValueError
    if type(shards["processes"]) is not int or not all(map(_FILE.fullmatch, files)):
        raise ValueError
    for name, value in sharded.items():
        if sum(_elements(piece, value, files) for piece in pieces[name]) != value.numel():
            raise ValueError
    found = {file.name: file.stat().st_size for file in folder.glob("*.distcp")}
    for name in sorted({*files, *found}):
        if name not in found:
            raise UserError(path, f"the shard {folder.name}/{name} is missing", _HINT)
        if name not in files:
            problem = f"{folder.name}/{name} is not one of its {len(files)} shards"
            raise UserError(path, problem, _HINT)
        if found[name] != files[name][0]:
            raise _foreign(path, folder, name)
    parts = {name: part for name, part in content.items() if name not in _ABOUT}
    verify(map_tensors(lambda v: None if v.is_meta else v, parts), content["checksums"], path)
    return {**parts, "format": FORMAT, "checksums": {}}


def _folder(content: Mapping[str, Any], path: Path) -> Path:
    return path.parent / str(content["shards"]["folder"])


def _elements(piece: list[Any], value: Tensor, files: Mapping[str, list[int]]) -> int:
    """Count the elements of a piece of a tensor.

    Raises:
        ValueError: it is not within its tensor, or not within its file.
    """
    offsets, sizes, name, start, length = piece
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    count = math.prod(sizes)
    inside = all(0 <= low <= end for low, end in zip(offsets, ends, strict=True))
    inside &= all(end <= most for end, most in zip(ends, value.shape, strict=True))
    if not (inside and start >= 0 and start + length <= files[name][0]):
        raise ValueError
    if count * value.element_size() > length:
        raise ValueError
    return count


def _foreign(path: Path, folder: Path, name: str) -> UserError:
    problem = f"the shard {folder.name}/{name} is damaged or of another run"
    return UserError(path, problem, _HINT)


def damage(content: Mapping[str, Any], path: Path, part: tuple[int, int] = (0, 1)) -> str:
    """Compare shards with their checksums, and name the first that differs; empty if none does.

    Args:
        content: of the file that names them.
        path: of that file.
        part: which of how many parts of the files to look at, as of several processes.
    """
    folder, files = _folder(content, path), content["shards"]["files"]
    for name in sorted(files)[part[0] :: part[1]]:
        if _size_and_sum(folder / name) != files[name]:
            return str(name)
    return ""


def read_shards(content: Mapping[str, Any], path: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole or sharded ones, from shards; each process reads what it needs.

    Args:
        content: of the file that names the shards.
        path: of that file.
        targets: by their path in the checkpoint's content, on any device.

    Raises:
        Exception: any of torch's, for files that are damaged.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch takes a process that reads alone for an accident
        reader = _reader(_folder(content, path), content, targets)
        load(dict(targets), storage_reader=reader, no_dist=True)


def _reader(folder: Path, content: Mapping[str, Any], names: Collection[str]) -> Any:
    """A reader that knows the shards from the checkpoint, not from a pickle beside them."""
    from torch.distributed.checkpoint import metadata
    from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo

    pieces = content["shards"]["pieces"]
    tensors: dict[str, Any] = {}
    places = {}
    for name, value in named_tensors(content):
        if name not in names:
            continue
        tensors[name] = metadata.TensorStorageMetadata(
            metadata.TensorProperties(value.dtype),
            value.shape,
            [
                metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                for offsets, sizes, *_ in pieces[name]
            ],
        )
        for offsets, _, *place in pieces[name]:
            places[metadata.MetadataIndex(name, offsets)] = _StorageInfo(*place)

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
            meta = metadata.StorageMeta(load_id=self.load_id)
            return metadata.Metadata(tensors, storage_data=places, storage_meta=meta)

    return Reader(folder)


def joined(content: Mapping[str, Any], path: Path, *, training: bool = True) -> dict[str, Any]:
    """Return the parts of a checkpoint with whole tensors, in one process.

    Args:
        content: of the file that names the shards.
        path: of that file.
        training: read the optimiser's moments, too; otherwise they are left out.

    Raises:
        UserError: a shard is missing, damaged or of another run.
        Exception: any other, for a file that is damaged.
    """
    whole = opened(content, path)
    if name := damage(content, path):
        raise _foreign(path, _folder(content, path), name)
    if not training:
        kept = {name: part for name, part in whole["training"].items() if name != "optimizer"}
        whole["training"] = kept
    shards = {name: value for name, value in named_tensors(whole) if value.is_meta}
    targets = {name: torch.empty_like(value, device="cpu") for name, value in shards.items()}
    read_shards(content, path, targets)
    filled: dict[str, Any] = map_named(lambda name, value: targets.get(name, value), whole)
    return filled


def refuse_damaged(content: Mapping[str, Any], path: Path, name: str) -> None:
    """Raise a UserError for a shard that differs from what was saved, if a name is given."""
    if name:
        raise _foreign(path, _folder(content, path), name)
