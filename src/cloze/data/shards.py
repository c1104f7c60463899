"""A prepared folder: blocks on disk, written once, mapped ever after.

prepared/eli5/
  manifest.json            tokenizer, block size, source, split rule, counts, checksum of each shard
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

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
from numpy.typing import NDArray

from cloze import __version__
from cloze.errors import DataError
from cloze.files import sha256, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_BYTES = 256 * 2**20
BATCH_ROWS = 65_536


class ShardWriter:
    """Writes the blocks of one split; `close` gives what the manifest says of them."""

    def __init__(self, folder: Path, block_size: int):
        self._folder, self._block_size = folder, block_size
        self._features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=block_size)})
        self._schema = self._features.arrow_schema
        self._rows_per_shard = max(1, SHARD_BYTES // (4 * block_size))
        self._waiting: list[NDArray[np.int32]] = []
        self._num_waiting = 0
        self._shards: list[int] = []
        self._writer: Any = None
        folder.mkdir()

    def add(self, blocks: NDArray[np.int32]) -> None:
        """Append blocks [n, block_size]."""
        while len(blocks):
            written = self._shards[-1] if self._writer is not None else 0
            room = min(BATCH_ROWS, self._rows_per_shard - written) - self._num_waiting
            self._waiting.append(blocks[:room])
            self._num_waiting += len(blocks[:room])
            blocks = blocks[room:]
            if self._num_waiting == min(BATCH_ROWS, self._rows_per_shard - written):
                self._write_batch()

    def _write_batch(self) -> None:
        if self._writer is None:
            self._sink = pyarrow.OSFile(str(self._part(len(self._shards))), "wb")
            self._writer = pyarrow.ipc.new_stream(self._sink, self._schema)
            self._shards.append(0)
        rows = np.concatenate(self._waiting)
        values = pyarrow.array(rows.reshape(-1), pyarrow.int32())
        column = pyarrow.FixedSizeListArray.from_arrays(values, self._block_size)
        self._writer.write_batch(pyarrow.record_batch([column], schema=self._schema))
        self._shards[-1] += len(rows)
        self._waiting, self._num_waiting = [], 0
        if self._shards[-1] >= self._rows_per_shard:
            self._finish_shard()

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.arrow"

    def _finish_shard(self) -> None:
        self._writer.close()
        self._sink.close()
        self._writer = None

    @property
    def num_blocks(self) -> int:
        """Blocks added so far."""
        return sum(self._shards) + self._num_waiting

    def discard(self) -> None:
        """Remove a split that got no blocks."""
        self._folder.rmdir()

    def close(self) -> list[dict[str, Any]]:
        """Finish the files, name them as `datasets` does, and describe each: file, blocks, bytes, sha256."""
        if self._num_waiting:
            self._write_batch()
        if self._writer is not None:
            self._finish_shard()
        shards = []
        for number, blocks in enumerate(self._shards):
            path = self._folder / f"data-{number:05d}-of-{len(self._shards):05d}.arrow"
            self._part(number).rename(path)
            shards.append({"file": path.name, "blocks": blocks, "bytes": path.stat().st_size, "sha256": sha256(path)})
        self._describe_for_datasets(shards)
        return shards

    def _describe_for_datasets(self, shards: list[dict[str, Any]]) -> None:
        info = datasets.DatasetInfo(features=self._features)
        info.write_to_directory(str(self._folder))
        contents = "".join(shard["sha256"] for shard in shards)
        state: dict[str, Any] = {
            "_data_files": [{"filename": shard["file"]} for shard in shards],
            "_fingerprint": hashlib.sha256(contents.encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": self._folder.name,
        }
        write_json(self._folder / "state.json", state)


def write_manifest(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Complete a prepared folder: dataset_dict.json and, last, manifest.json with a checksum over all it says."""
    write_json(folder / "dataset_dict.json", {"splits": list(facts["splits"])})
    manifest = {"format_version": FORMAT_VERSION, "cloze_version": __version__, **facts}
    manifest["checksum"] = manifest_checksum(manifest)
    write_json(folder / MANIFEST, manifest)
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest's canonical JSON, without `checksum` and the version of Cloze that wrote it."""
    facts = {key: value for key, value in manifest.items() if key not in ("checksum", "cloze_version")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Blocks:
    """The blocks of one split, memory-mapped: `read` copies only the rows that are asked for."""

    def __init__(self, files: list[Path], block_size: int):
        self.block_size = block_size
        self._batches: list[NDArray[np.int32]] = []
        for file in files:
            reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
            for batch in reader:
                values = batch.column(0).flatten().to_numpy(zero_copy_only=True)
                self._batches.append(values.reshape(-1, block_size))
        self._ends = np.cumsum([len(batch) for batch in self._batches])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.int32]:
        """indices: [n] in any order -> blocks [n, block_size]. IndexError if one is out of range."""
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"blocks are numbered 0 .. {len(self) - 1}")
        out = np.empty((len(indices), self.block_size), np.int32)
        batch_of = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(batch_of):
            here = batch_of == number
            first = int(self._ends[number - 1]) if number else 0
            out[here] = self._batches[number][indices[here] - first]
        return out


@dataclass(frozen=True)
class Prepared:
    """An opened prepared folder."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return int(self.manifest["block_size"])

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer's folder."""
        return self.folder / "tokenizer"

    @property
    def splits(self) -> list[str]:
        """The splits there are."""
        return list(self.manifest["splits"])

    def blocks(self, split: str) -> Blocks:
        """The blocks of a split. Raises DataError where there is no such split."""
        if split not in self.manifest["splits"]:
            raise DataError(f"no split {split!r}", where=self.folder, hint=f"the splits are: {', '.join(self.splits)}")
        shards = self.manifest["splits"][split]["shards"]
        return Blocks([self.folder / split / shard["file"] for shard in shards], self.block_size)


def open_prepared(folder: str | Path) -> Prepared:
    """Open a prepared folder without reading its blocks. Raises DataError where it is not one, or not whole."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksum, version = manifest["checksum"], manifest["format_version"]
    except (FileNotFoundError, NotADirectoryError):
        what = "not a prepared folder" if folder.exists() else "no such folder"
        raise DataError(what, where=folder, hint="make it with `cloze prepare --output`") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError("damaged", where=folder / MANIFEST, hint="prepare the corpus again") from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"format {version} is not known here", where=folder, hint="prepare again, or use a newer Cloze"
        )
    if checksum != manifest_checksum(manifest):
        raise DataError("changed by hand or damaged", where=folder / MANIFEST, hint="prepare the corpus again")
    for file, shard in _shard_files(folder, manifest):
        if not file.is_file() or file.stat().st_size != shard["bytes"]:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise DataError(
                f"{found}, {shard['bytes']} bytes were written", where=file, hint="prepare the corpus again"
            )
    return Prepared(folder, manifest)


def verify_prepared(folder: str | Path) -> None:
    """Check every shard's bytes. Raises DataError naming the first damaged one."""
    prepared = open_prepared(folder)
    for file, shard in _shard_files(prepared.folder, prepared.manifest):
        if sha256(file) != shard["sha256"]:
            raise DataError("damaged: the checksum differs", where=file, hint="prepare the corpus again")


def _shard_files(folder: Path, manifest: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    return [
        (folder / split / shard["file"], shard)
        for split, facts in manifest["splits"].items()
        for shard in facts["shards"]
    ]
