"""Verify prepared blocks: every shard is compared with its SHA-256 in the manifest before it is used.

    verify_for_use(prepared, ["train", "validation"], config)       # DataError names the first damaged shard

The bytes are read once: what was found right is kept in the cache folder under the path, the size, the inode, the
times of the last change (ctime) and modification (mtime), and the checksum of a shard. The processes of a host, and
hosts that share files and cache, wait for the first of them. Each core hashes 1 to 2 GB/s if the disk delivers that:
the first start on a terabyte takes minutes, later ones a few system calls per shard. Without a cache folder, every
process of every start reads all bytes. No process group is needed, so nothing can time out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from cloze.data.corpus.content import PART_BYTES, SETTLED_SECONDS, default_cache, signature
from cloze.data.prepared.blocks import open_shard
from cloze.data.prepared.shards import Prepared, open_prepared, shard_files
from cloze.data.tokenizers.load import load_tokenizer
from cloze.errors import DataError, DiskError
from cloze.utils.atomic_files import sha256, write_text
from cloze.utils.file_locks import locked
from cloze.utils.terminal.console import progress, say

ANNOUNCED_BYTES = 10 * 10**9
_MEGABYTE = 10**6


class TrustOptions(Protocol):
    """The option that allows code of a tokenizer's folder to run."""

    trust_remote_code: bool


def verify_for_use(prepared: Prepared, splits: list[str], config: TrustOptions) -> None:
    """Check the tokenizer and the shards of the splits before they are used. Raises DataError or ModelError."""
    load_tokenizer(str(prepared.tokenizer_dir), config.trust_remote_code)
    verify_shards(prepared, splits)


def verify_prepared(folder: str | Path) -> None:
    """Read every shard again, without the cache. Raises DataError naming the first damaged one."""
    prepared = open_prepared(folder)
    _read(prepared, shard_files(prepared.folder, prepared.manifest))


def verify_shards(prepared: Prepared, splits: list[str]) -> None:
    """Compare the shards of the splits with their checksums, unless the cache says that this was done.

    Raises DataError naming the first damaged one. Shards of up to 64 MiB together are read every time.
    """
    shards = shard_files(prepared.folder, prepared.manifest, splits)
    if sum(shard["bytes"] for _, shard in shards) <= PART_BYTES:
        return _read(prepared, shards)
    place = default_cache() / "verified"
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    whole = hashlib.sha256("".join(_key(file, shard) for file, shard in shards).encode()).hexdigest()
    waiting = f"waiting for another process that verifies {prepared.folder}"
    with locked(place / f"{whole[:32]}.lock", lambda: say("verify", waiting)):
        left = [(file, shard) for file, shard in shards if not (place / _key(file, shard)).is_file()]
        _read(prepared, left, place)


def _key(file: Path, shard: dict[str, Any]) -> str:
    facts = json.dumps([os.path.realpath(file), signature(file), shard["sha256"]])
    return hashlib.sha256(facts.encode()).hexdigest()


def _read(prepared: Prepared, shards: list[tuple[Path, dict[str, Any]]], place: Path | None = None) -> None:
    """Compare shards with their checksums, and their token ids with the size of the vocabulary, on all cores; note in
    the folder `place` which are right."""
    total = sum(shard["bytes"] for _, shard in shards)
    if total > ANNOUNCED_BYTES:
        say("verify", f"reading {total / 1e9:,.0f} GB in {len(shards):,} shards to compare their checksums, once")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with (
        progress("verify", total=total // _MEGABYTE, unit="MB") as advance,
        ThreadPoolExecutor(max(1, min(threads, len(shards)))) as pool,
    ):
        try:
            for (_, shard), _ in zip(
                shards, pool.map(lambda one: _compare(prepared, one[0], one[1], place), shards), strict=True
            ):
                advance(shard["bytes"] // _MEGABYTE)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compare(prepared: Prepared, file: Path, shard: dict[str, Any], place: Path | None) -> None:
    key, begin = _key(file, shard), time.time()
    try:
        is_right = sha256(file) == shard["sha256"]
        changed = file.stat().st_ctime
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=file, hint="prepare the corpus again") from None
    if not is_right:
        raise DataError("damaged: the checksum differs", where=file, hint="prepare the corpus again")
    vocab_size = prepared.manifest.get("tokenizer", {}).get("vocab_size")
    if vocab_size is not None and shard["blocks"]:
        pieces = prepared.packing == "best_fit"
        parts = [batch.ids for batch in open_shard(file, shard["blocks"], prepared.block_size, pieces)]
        if min(ids.min() for ids in parts) < 0 or max(ids.max() for ids in parts) >= vocab_size:
            what = f"damaged: it holds token ids outside of the vocabulary of {vocab_size:,}"
            raise DataError(what, where=file, hint="prepare the corpus again")
    if place is not None and begin - changed > SETTLED_SECONDS and _key(file, shard) == key:
        with contextlib.suppress(OSError, DiskError):
            write_text(place / key, "")
