"""Write safetensors files one tensor at a time, in the memory of one tensor, with checksums on the way.

The format (8 bytes of header length, a JSON header, the raw bytes) is that of huggingface/safetensors, whose own
reader opens these files. Its writer wants all tensors at once; checkpoints and consolidation stream instead.

    entries = [Entry("weight", torch.float32, (2, 3), lambda: tensor)]
    written = write_tensors(path, entries)
    written.num_bytes, written.sha256
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from cloze.utils.heartbeat import beat

_WRITTEN_AT_ONCE = 64 << 20  # bytes

_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `read` is called when its turn to be written comes."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Return the size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What went into a file: its size and its SHA-256."""

    num_bytes: int
    sha256: str


def write_tensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> Written:
    """Write `entries` to `path` and flush it to the disk. OSError passes through (disk full, ...)."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        header[entry.key] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file, ThreadPoolExecutor(1) as beside:
        for chunk in (len(encoded).to_bytes(8, "little"), encoded):
            digest.update(chunk)
            file.write(chunk)
        for entry in entries:
            data = tensor_bytes(entry.read().to(entry.dtype))
            if len(data) != entry.num_bytes:
                raise ValueError(f"{entry.key}: {len(data)} bytes where {entry.num_bytes} were announced")
            hashing = beside.submit(digest.update, data)
            for begin in range(0, len(data), _WRITTEN_AT_ONCE):
                file.write(data[begin : begin + _WRITTEN_AT_ONCE])
                beat()
            hashing.result()
        file.flush()
        os.fsync(file.fileno())
        return Written(file.tell(), digest.hexdigest())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the raw little-endian bytes of a tensor, without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
