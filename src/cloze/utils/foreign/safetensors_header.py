"""The header of a safetensors file, checked before any tensor is read; the files opened through it.

    read_header(folder / "model.safetensors")       # {"bert.pooler.dense.weight": Header("F32", (8, 8), 0, 256)}
    with open_tensors(folder / file) as tensors: tensors.get_tensor(name)
    shard_names(folder / "model.safetensors.index.json")

A file is the header's length (8 bytes), the header (JSON) and the tensors' bytes, without gaps. safetensors is
imported in the functions that need it: the report reads headers only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloze.errors import CheckpointError, ClozeError
from cloze.utils.foreign.json_yaml import parse_json, read_json
from cloze.utils.foreign.paths import open_regular, plain_name, printable

MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
MAX_DIMENSIONS = 64
INDEX = "model.safetensors.index.json"
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_HINT = "it is damaged or not a safetensors file: get it again"


@dataclass(frozen=True)
class Header:
    """One tensor of a file: its type as safetensors writes it, its shape, and its bytes [start, stop) after the
    header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


def read_header(
    path: Path | str, *, folder: Path | str | None = None, error: type[ClozeError] = CheckpointError
) -> dict[str, Header]:
    """Return the tensors of a file by name. Raises `error` if the header is not valid JSON of names, types, shapes and
    places that fill the file exactly."""
    with open_regular(path, folder=folder, error=error) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise error(f"its header cannot be {length:,} bytes long", where=path, hint=_HINT)
        header = parse_json(file.read(length), path, max_depth=4, error=error)
    header.pop("__metadata__", None)
    found = {name: _facts(name, facts, path, error) for name, facts in header.items()}
    position = 0
    for name, one in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if one.start != position:
            raise error(f"the bytes of {printable(name)} do not follow the ones before", where=path, hint=_HINT)
        position = one.stop
    if position != size - 8 - length:
        raise error(f"its tensors are {position:,} bytes, but {size - 8 - length:,} are there", where=path, hint=_HINT)
    return found


def _facts(name: str, facts: Any, path: Path | str, error: type[ClozeError]) -> Header:
    facts = facts if isinstance(facts, dict) else {}
    dtype, shape, offsets = facts.get("dtype"), facts.get("shape"), facts.get("data_offsets")
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise error(f"{printable(name)} has the unknown type {printable(str(dtype))}", where=path, hint=_HINT)
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise error(f"{printable(name)} has no valid shape and place", where=path, hint=_HINT)
    if math.prod(shape) * bits != (offsets[1] - offsets[0]) * 8:
        raise error(f"{printable(name)} has more or fewer bytes than its shape needs", where=path, hint=_HINT)
    return Header(dtype, tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 1 << 63 for one in value)


@contextmanager
def open_tensors(
    path: Path | str, *, folder: Path | str | None = None, error: type[ClozeError] = CheckpointError
) -> Iterator[Any]:
    """Open a file with safetensors' `safe_open` (torch tensors, mapped), its header checked. Raises `error`."""
    yield map_tensors(path, folder=folder, error=error)


def map_tensors(
    path: Path | str, *, folder: Path | str | None = None, error: type[ClozeError] = CheckpointError
) -> Any:
    """Return safetensors' `safe_open` of a file, whose header was checked. Raises `error`."""
    from safetensors import SafetensorError, safe_open

    read_header(path, folder=folder, error=error)
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as problem:
        raise error(f"cannot be read ({printable(str(problem))})", where=path, hint=_HINT) from None


def load_tensors(
    path: Path | str, *, folder: Path | str | None = None, error: type[ClozeError] = CheckpointError
) -> dict[str, Any]:
    """Return all tensors of a file, by name. Raises `error`."""
    tensors = map_tensors(path, folder=folder, error=error)
    return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def shard_names(index: Path | str, error: type[ClozeError] = CheckpointError) -> dict[str, str]:
    """Return the file of each tensor that an index of weights names. Raises `error` if it is not an index, or names a
    file outside its folder."""
    found = read_json(index, error=error).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise error("not an index of weights", where=index, hint="get it again")
    for name in set(map(str, found.values())):
        plain_name(name, where=index, error=error)
    return {str(tensor): str(name) for tensor, name in found.items()}
