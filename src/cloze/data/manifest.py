"""What manifest.json of a prepared folder must hold, and what must agree in it.

    check_manifest(manifest)        # ValueError names the place

Its checksum shows that it is as it was written, not who wrote it: so a stranger's manifest is checked like any file.
"""

from __future__ import annotations

from typing import Any

from cloze.utils.foreign.schema import COUNT, FILE, SHA256, TEXT, Each, check, optional

MAX_BLOCK_SIZE = 1 << 26
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
MAX_MANIFEST_BYTES = 1 << 30


def _AT_LEAST_1(value: Any) -> bool:
    return COUNT(value) and value > 0


SHAPE = {
    "block_size": lambda value: COUNT(value) and 0 < value <= MAX_BLOCK_SIZE,
    "?packing": lambda value: value in ("concat", "best_fit"),
    "?tokenizer": {
        "?name": str,
        "?class": TEXT,
        "?fingerprint": TEXT,
        "?vocab_size": lambda value: COUNT(value) and value < 1 << 31,
        "?mask_token_id": COUNT,
        "?pad_token_id": optional(COUNT),
        "?special_token_ids": [COUNT],
        "?missing_token_ids": [COUNT],
        "?backend": TEXT,
    },
    "?source": {"?dataset_name": str, "?files": [{"name": str}]},
    "?split_rule": {"?kind": TEXT},
    "?tokenizer_files": Each(SHA256),
    "?bad_records": Each(COUNT),
    "?bad_record_examples": [str],
    "splits": Each(
        {
            "?documents": COUNT,
            "?tokens": COUNT,
            "?blocks": COUNT,
            "shards": [{"file": FILE, "blocks": _AT_LEAST_1, "bytes": COUNT, "sha256": SHA256}],
        },
        FILE,
    ),
}


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError if a value is missing or of the wrong kind, a split has no blocks, lists a shard twice or has
    another number of blocks than its shards, or a token id is outside of the vocabulary."""
    check(manifest, SHAPE)
    for name, split in manifest["splits"].items():
        shards = split["shards"]
        if not shards:
            raise ValueError(f"splits.{name} has no blocks")
        if len({shard["file"] for shard in shards}) < len(shards):
            raise ValueError(f"splits.{name} lists a shard twice")
        total = sum(shard["blocks"] for shard in shards)
        if split.get("blocks", total) != total:
            raise ValueError(f"splits.{name} has {split['blocks']:,} blocks, but its shards have {total:,}")
    tokenizer = manifest.get("tokenizer", {})
    ids = [tokenizer.get("mask_token_id"), tokenizer.get("pad_token_id")]
    ids += [*tokenizer.get("special_token_ids", []), *tokenizer.get("missing_token_ids", [])]
    largest = max((one for one in ids if one is not None), default=0)
    if largest >= tokenizer.get("vocab_size", largest + 1):
        raise ValueError(f"token id {largest} is outside of its vocabulary of {tokenizer['vocab_size']}")
