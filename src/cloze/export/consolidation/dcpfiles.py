"""The files of torch.distributed.checkpoint (DCP), which FSDP of transformers' Trainer, accelerate and torch write.

    .metadata             a pickle: name, shape and type of each tensor, the place of its chunks in it, and their files
    __0_0.distcp ...      what each rank wrote: a stream of torch.save for every chunk, one after the other

Of the pickle only the classes of DCP's own metadata are admitted, and as records without any code of theirs; chunks
are read with `weights_only`, one at a time.

    files = DcpFiles(folder)
    files.trained["bert.pooler.dense.weight"].pieces()     # (offset, elements [n])
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from cloze.errors import CheckpointError, ConfigError
from cloze.export.consolidation.zerofiles import plain_name
from cloze.utils.foreign.paths import check_regular, is_plain_name, open_regular, printable
from cloze.utils.foreign.pickles import NO_ARCHIVE, damaged_member, load_torch_stream, read_pickle, reason, sizes
from cloze.utils.terminal.console import progress

METADATA = ".metadata"
MAX_PATH = 64
_HINT = "use an earlier checkpoint"
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor: it begins at `offsets`, has `sizes`, and is stored in `file` at [start, start +
    length)."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class Chunked:
    """The chunks of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]

    def pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (offset, elements [n]); one chunk is in memory at a time. Raises CheckpointError if one is damaged."""
        for chunk in self.chunks:
            flat = _load(chunk, self).reshape(-1)
            for place, offset, length in runs(self.shape, chunk.offsets, chunk.sizes):
                yield offset, flat[place : place + length]


class DcpFiles:
    """An opened checkpoint. `trained`: the tensors of its model by name, trained or not. The other attributes, as in
    `zerofiles.ZeroFiles`, are empty: DCP does not record what was trained, tied or a buffer."""

    stage = None

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.trained = _model_tensors(_read_metadata(folder / METADATA), folder)
        except (AttributeError, TypeError, LookupError, ValueError) as error:
            raise CheckpointError(f"it is damaged ({error})", where=folder / METADATA, hint=_HINT) from None
        self.frozen: dict[str, Chunked] = {}
        self.module: dict[str, torch.Tensor] = {}
        self.buffers: list[str] = []
        self.aliases: dict[str, str] = {}

    def verify(self) -> None:
        """Compare every chunk with the checksums inside (CRC-32 of each record of torch.save). Raises CheckpointError
        naming file and tensor."""
        with progress("verify", total=len(self.trained), unit="tensors") as advance:
            for tensor in self.trained.values():
                for chunk in tensor.chunks:
                    try:
                        with _opened(chunk) as stream:
                            bad = damaged_member(stream)
                    except NO_ARCHIVE as error:
                        raise _damaged(chunk, tensor.name, error) from None
                    if bad is not None:
                        raise _damaged(chunk, tensor.name, f"checksum of {bad}")
                advance()


def holds_metadata(folder: Path) -> bool:
    """Return whether a folder is a checkpoint of DCP."""
    return (folder / METADATA).is_file()


def runs(shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Yield the contiguous runs of a rectangle of a tensor: (place in the rectangle, offset in the tensor, length), in
    the order of the rectangle. One run if only rows are cut, as FSDP does."""
    cut = max((d for d in range(len(shape)) if sizes[d] != shape[d]), default=0)
    length = math.prod(sizes[cut:])
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    begin = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    if not math.prod(sizes):
        return
    for number, places in enumerate(itertools.product(*(range(size) for size in sizes[:cut]))):
        yield number * length, begin + sum(p * s for p, s in zip(places, strides, strict=False)), length


def _read_metadata(file: Path) -> Any:
    found = read_pickle(file, _RECORDS)
    if not isinstance(getattr(found, "state_dict_metadata", None), dict):
        raise CheckpointError(
            "it is damaged (it is no metadata of torch.distributed.checkpoint)", where=file, hint=_HINT
        )
    return found


def _model_tensors(metadata: Any, folder: Path) -> dict[str, Chunked]:
    """Return the tensors of the model: those under `model`, where Trainer and accelerate put it, else all."""
    paths = metadata.planner_data if isinstance(getattr(metadata, "planner_data", None), dict) else {}
    named = {name: _names(paths.get(name, (name,))) for name in metadata.state_dict_metadata}
    nested = any(path[0] == "model" and len(path) > 1 for path in named.values())
    where = {(_name(index.fqn), sizes(index.offset or ())): info for index, info in metadata.storage_data.items()}
    found: dict[str, Chunked] = {}
    for name, facts in metadata.state_dict_metadata.items():
        path = named[name]
        if not hasattr(facts, "chunks") or (nested and path[0] != "model"):
            continue
        plain = plain_name(".".join(path[1:] if nested else path))
        found[plain] = _chunked(plain, name, facts, where, folder)
    if not found:
        raise CheckpointError("no tensors of a model are in it", where=folder, hint=_HINT)
    return found


def _names(path: Any) -> tuple[str, ...]:
    """Return the path to a value in nested mappings and lists, as the planner of DCP records it."""
    if not isinstance(path, tuple | list) or not 1 <= len(path) <= MAX_PATH:
        raise ValueError("a path to a tensor is not a few names")
    return tuple(str(one) if type(one) is int else _name(one) for one in path)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("a tensor has no name")
    return value


def _chunked(plain: str, name: str, facts: Any, where: dict[Any, Any], folder: Path) -> Chunked:
    """Return the chunks of a tensor. They must not exceed the sizes of the files, which bounds work and memory."""
    shape, dtype, chunks = sizes(facts.size), facts.properties.state[0], []
    if not isinstance(dtype, torch.dtype) or not isinstance(facts.chunks, list):
        raise ValueError(f"{plain} is described in another way")
    if len(facts.chunks) > len(where):
        raise CheckpointError(f"the parts of {plain} do not fit together", where=folder, hint=_HINT)
    for one in facts.chunks:
        offsets, extent = sizes(one.offsets), sizes(one.sizes)
        info = where.get((name, offsets))
        if info is None:
            raise CheckpointError(f"a part of {plain} is not there", where=folder, hint=_HINT)
        relative = str(info.relative_path)
        if not is_plain_name(relative):
            raise ConfigError(
                f"it names a file outside, {printable(relative)}",
                where=folder / METADATA,
                hint="do not use it: the files of a checkpoint are in one folder",
            )
        if getattr(info, "transform_descriptors", None):
            raise ConfigError(
                "compressed checkpoints are not read", where=folder, hint="save it again without transforms"
            )
        file = folder / relative
        if not file.exists() and not file.is_symlink():
            raise CheckpointError(f"it is missing, with a part of {plain}", where=file, hint=_HINT)
        size = check_regular(file, error=CheckpointError).stat().st_size
        start, length = sizes((info.offset, info.length))
        if start + length > size or math.prod(extent) * dtype.itemsize > length:
            raise CheckpointError(f"the part of {plain} in it is damaged (it is too short)", where=file, hint=_HINT)
        if len(extent) != len(shape) or len(offsets) != len(shape):
            raise CheckpointError(f"the parts of {plain} do not fit together", where=folder, hint=_HINT)
        chunks.append(Chunk(offsets, extent, file, start, length))
    position = 0
    for offset, length in sorted(run[1:] for one in chunks for run in runs(shape, one.offsets, one.sizes)):
        if offset != position:
            raise CheckpointError(f"the parts of {plain} do not fit together", where=folder, hint=_HINT)
        position += length
    if position != math.prod(shape):
        raise CheckpointError(
            f"{position} of {math.prod(shape)} elements of {plain} are there", where=folder, hint=_HINT
        )
    return Chunked(plain, shape, dtype, chunks)


class _Part(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file."""

    def __init__(self, chunk: Chunk):
        self._file: Any = open_regular(chunk.file, error=CheckpointError)
        self._chunk, self._at = chunk, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._chunk.length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._chunk.start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._chunk.length - self._at)])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _opened(chunk: Chunk) -> IO[bytes]:
    return io.BufferedReader(_Part(chunk))


def _load(chunk: Chunk, tensor: Chunked) -> torch.Tensor:
    try:
        with _opened(chunk) as stream:
            found = load_torch_stream(stream)
        if not torch.is_tensor(found) or tuple(found.shape) != chunk.sizes or found.dtype != tensor.dtype:
            raise ValueError(f"not a {tensor.dtype} tensor of shape {chunk.sizes}")
        return found
    except pickle.UnpicklingError:
        raise ConfigError(
            f"the part of {tensor.name} in it is more than a tensor, and reading it could run code",
            where=chunk.file,
            hint="do not use it: it is not a checkpoint written by torch",
        ) from None
    except Exception as error:  # torch raises different errors for damaged files
        raise _damaged(chunk, tensor.name, error) from None


def _damaged(chunk: Chunk, name: str, why: object) -> CheckpointError:
    return CheckpointError(f"the part of {name} in it is damaged ({reason(why)})", where=chunk.file, hint=_HINT)
