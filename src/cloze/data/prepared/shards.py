"""A prepared folder: blocks on disk, written once and then memory-mapped.

prepared/eli5/
  manifest.json            tokenizer, block size, packing, source, split rule, counts, checksum of each shard
  tokenizer/               so that nothing but this folder is needed later
  dataset_dict.json        with the next two, what `datasets.load_from_disk` opens
  train/                   data-00000-of-00002.arrow ..., dataset_info.json, state.json
  validation/

prepared = open_prepared("prepared/eli5")
prepared.blocks("train").read(np.array([7, 3]))      # [2, block_size] int32
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
from numpy.typing import NDArray

from cloze import __version__
from cloze.data.manifest import MANIFEST, MAX_MANIFEST_BYTES, TOKENIZER, check_manifest
from cloze.data.prepared.blocks import Blocks
from cloze.data.prepared.packing import Packed
from cloze.errors import DataError
from cloze.utils.atomic_files import sha256, write_json
from cloze.utils.foreign.json_yaml import read_json
from cloze.utils.foreign.paths import check_regular, printable

FORMAT_VERSION = 1
BATCH_ROWS = 65_536
NOT_IN_CHECKSUM = ("checksum", "cloze_version", "text_report", "tokenizer_files")


def block_schema(block_size: int, pieces: bool) -> Any:
    """Return the Arrow schema of a shard, with the metadata that `datasets` needs.

    input_ids: [block_size] int32; `pieces`: also the number of tokens of each piece of a document in the block.
    """
    features: dict[str, Any] = {"input_ids": {"feature": _int32(), "length": block_size, "_type": "List"}}
    fields = [pyarrow.field("input_ids", pyarrow.list_(pyarrow.int32(), block_size))]
    if pieces:
        features["piece_lengths"] = {"feature": _int32(), "_type": "List"}
        fields.append(pyarrow.field("piece_lengths", pyarrow.list_(pyarrow.int32())))
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pyarrow.schema(fields, metadata)


def _int32() -> dict[str, str]:
    return {"dtype": "int32", "_type": "Value"}


class ShardWriter:
    """Writes the blocks of one shard in record batches of BATCH_ROWS; the file is created with the first block."""

    def __init__(self, path: Path, block_size: int, pieces: bool = False):
        self._path, self._block_size, self._pieces = path, block_size, pieces
        self._schema = block_schema(block_size, pieces)
        self._waiting: list[Packed] = []
        self._num_waiting = 0
        self._writer: Any = None
        self.num_blocks = 0

    def add(self, packed: Packed) -> None:
        """Append blocks."""
        at, piece = 0, 0
        while at < len(packed.blocks):
            end = min(len(packed.blocks), at + BATCH_ROWS - self._num_waiting)
            counts = packed.counts[at:end]
            pieces = int(counts.sum())
            self._waiting.append(Packed(packed.blocks[at:end], counts, packed.lengths[piece : piece + pieces]))
            self._num_waiting += end - at
            at, piece = end, piece + pieces
            if self._num_waiting == BATCH_ROWS:
                self._write_batch()

    def _write_batch(self) -> None:
        if self._writer is None:
            self._sink = pyarrow.OSFile(str(self._path), "wb")
            self._writer = pyarrow.ipc.new_stream(self._sink, self._schema)
        rows = np.concatenate([packed.blocks for packed in self._waiting])
        columns = [pyarrow.FixedSizeListArray.from_arrays(_as_arrow(rows), self._block_size)]
        if self._pieces:
            counts = np.concatenate([packed.counts for packed in self._waiting])
            lengths = np.concatenate([packed.lengths for packed in self._waiting]).astype(np.int32)
            offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            columns.append(pyarrow.ListArray.from_arrays(_as_arrow(offsets), _as_arrow(lengths)))
        self._writer.write_batch(pyarrow.record_batch(columns, schema=self._schema))
        self.num_blocks += len(rows)
        self._waiting, self._num_waiting = [], 0

    def close(self) -> dict[str, Any] | None:
        """Finish the file and return its blocks, bytes and sha256; None if there was no block."""
        if self._num_waiting:
            self._write_batch()
        if self._writer is None:
            return None
        self._writer.close()
        self._sink.close()
        return {"blocks": self.num_blocks, "bytes": self._path.stat().st_size, "sha256": sha256(self._path)}


def _as_arrow(values: NDArray[np.int32]) -> Any:
    """Return an Arrow array that shares memory with `values` (`pyarrow.array` would import pandas first)."""
    return pyarrow.Array.from_buffers(pyarrow.int32(), values.size, [None, pyarrow.py_buffer(values)])


def shard_name(number: int, count: int) -> str:
    """Return the name of a shard, as `datasets` forms it."""
    return f"data-{number:05d}-of-{count:05d}.arrow"


def describe_split(folder: Path, shards: list[dict[str, Any]], block_size: int, pieces: bool) -> None:
    """Write dataset_info.json and state.json beside the shards of a split, for `datasets.load_from_disk`."""
    metadata = json.loads(block_schema(block_size, pieces).metadata[b"huggingface"])
    write_json(
        folder / "dataset_info.json",
        {"citation": "", "description": "", "homepage": "", "license": "", **metadata["info"]},
    )
    contents = "".join(shard["sha256"] for shard in shards)
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard["file"]} for shard in shards],
        "_fingerprint": hashlib.sha256(contents.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    write_json(folder / "state.json", state)


def write_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Complete a prepared folder: dataset_dict.json and, last, manifest.json with a checksum over all it says."""
    write_json(folder / "dataset_dict.json", {"splits": list(facts["splits"])})
    manifest = {"format_version": FORMAT_VERSION, "cloze_version": __version__, **facts}
    manifest["checksum"] = manifest_checksum(manifest)
    write_json(folder / MANIFEST, manifest)
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's canonical JSON, without what does not make two folders different: the version
    of Cloze that wrote it, what was found in the text, and checksums that older versions did not have."""
    facts = {key: value for key, value in manifest.items() if key not in NOT_IN_CHECKSUM}
    if "source" in facts:
        facts["source"] = _without(facts["source"], "content")
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _without(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, name) for key, inner in value.items() if key != name}
    return [_without(inner, name) for inner in value] if isinstance(value, list) else value


class _Facts(dict[str, Any]):
    """A mapping of a manifest that reports a missing key in one line."""

    def __missing__(self, name: str) -> Any:
        raise DataError(f"damaged: it has no {printable(str(name))}", where=MANIFEST, hint="prepare the corpus again")


@dataclass(frozen=True, repr=False)
class Prepared:
    """An opened prepared folder, accepted wherever its path is."""

    folder: Path
    manifest: dict[str, Any]

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        splits = ", ".join(f"{name} {facts['blocks']:,}" for name, facts in self.manifest["splits"].items())
        return f"Prepared({str(self.folder)!r}: blocks of {self.block_size} tokens: {splits})"

    @property
    def block_size(self) -> int:
        """Return the number of tokens per block."""
        return int(self.manifest["block_size"])

    @property
    def packing(self) -> str:
        """Return the packing: `concat` or `best_fit`."""
        return str(self.manifest.get("packing", "concat"))

    @property
    def tokenizer_dir(self) -> Path:
        """Return the path of the tokenizer's folder."""
        return self.folder / TOKENIZER

    @property
    def splits(self) -> list[str]:
        """Return the names of the splits."""
        return list(self.manifest["splits"])

    def blocks(self, split: str) -> Blocks:
        """Return the blocks of a split. Raises DataError if the split is missing."""
        if split not in self.manifest["splits"]:
            raise DataError(f"no split {split!r}", where=self.folder, hint=f"the splits are: {', '.join(self.splits)}")
        shards = self.manifest["splits"][split]["shards"]
        files = [(self.folder / split / shard["file"], int(shard["blocks"])) for shard in shards]
        return Blocks(files, self.block_size, self.packing == "best_fit")


def open_prepared(folder: str | Path) -> Prepared:
    """Open a prepared folder without reading its blocks. Raises DataError if it is not one or is damaged."""
    folder = Path(folder)
    file = folder / MANIFEST
    if not file.exists() and not file.is_symlink():
        what = "not a prepared folder" if folder.exists() else "no such folder"
        raise DataError(what, where=folder, hint="make it with `cloze prepare --output`")
    try:
        manifest = read_json(file, max_bytes=MAX_MANIFEST_BYTES)
    except DataError as error:
        raise DataError(f"damaged: {error.what}", where=file, hint="prepare the corpus again") from None
    checksum, version = manifest.get("checksum"), manifest.get("format_version")
    if version != FORMAT_VERSION:
        what = f"format {printable(str(version))} is not known here"
        raise DataError(what, where=folder, hint="prepare again, or use a newer Cloze")
    if checksum != manifest_checksum(manifest):
        raise DataError("changed by hand or damaged", where=folder / MANIFEST, hint="prepare the corpus again")
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise DataError(f"damaged: {error}", where=folder / MANIFEST, hint="prepare the corpus again") from None
    if (folder / TOKENIZER).is_symlink():
        hint = "replace the link with its target folder"
        raise DataError("is a symbolic link", where=folder / TOKENIZER, hint=hint)
    for file, shard in shard_files(folder, manifest):
        if file.exists() or file.is_symlink():
            check_regular(file, folder=folder)
        if not file.is_file() or file.stat().st_size != shard["bytes"]:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise DataError(
                f"{found}, {shard['bytes']} bytes were written", where=file, hint="prepare the corpus again"
            )
    return Prepared(
        folder, _Facts({key: _Facts(one) if isinstance(one, dict) else one for key, one in manifest.items()})
    )


def shard_files(folder: Path, manifest: Any, splits: list[str] | None = None) -> list[tuple[Path, dict[str, Any]]]:
    """Return the path and the facts of each shard of the splits; None: of all."""
    return [
        (folder / split / shard["file"], shard)
        for split, facts in manifest["splits"].items()
        if splits is None or split in splits
        for shard in facts["shards"]
    ]
