"""The tokenizer inside a prepared folder: is it the one that its blocks were made with?

    written = read_written("prepared/eli5/tokenizer")       # None for a tokenizer elsewhere
    check_written(name, written, describe(tokenizer, name))

Its fingerprint decides. A newer version of `tokenizers` may describe the same file in other words, so a different
fingerprint is accepted if the files are, byte for byte, those that the manifest lists (older folders list none).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cloze.data.manifest import MANIFEST, MAX_MANIFEST_BYTES
from cloze.errors import DataError
from cloze.utils.atomic_files import sha256
from cloze.utils.foreign.json_yaml import read_json

IDS = ("vocab_size", "mask_token_id", "pad_token_id", "special_token_ids")


def read_written(name: str) -> dict[str, Any] | None:
    """Return the manifest of the prepared folder that a tokenizer is part of; None if it is part of none.

    Raises DataError if the folder has lost its tokenizer.
    """
    folder = Path(os.path.abspath(name))
    file = folder.parent / MANIFEST
    if folder.name != "tokenizer" or not file.is_file():
        return None
    manifest = read_json(file, max_bytes=MAX_MANIFEST_BYTES)
    tokenizer = manifest.get("tokenizer")
    if not isinstance(tokenizer, dict) or "fingerprint" not in tokenizer or "splits" not in manifest:
        return None
    if not folder.is_dir() or not any(folder.iterdir()):
        raise damaged(name, "the tokenizer is missing")
    lost = [one for one in manifest.get("tokenizer_files", {}) if not (folder / one).is_file()]
    if lost:
        raise damaged(name, f"{lost[0]} is missing")
    return manifest


def check_written(name: str, manifest: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise DataError if a loaded tokenizer, as `describe` describes it, is not the one of the manifest."""
    written = manifest["tokenizer"]
    if found["fingerprint"] != written["fingerprint"]:
        listed = manifest.get("tokenizer_files", {})
        if not listed or any(sha256(Path(name) / one) != digest for one, digest in listed.items()):
            raise damaged(name, "not the tokenizer that the blocks were made with")
    for key in IDS:
        if key in written and written[key] != found[key]:
            raise damaged(name, f"{key} is not the one in {MANIFEST}")
    if written.get("missing_token_ids", found.get("missing_token_ids")) != found.get("missing_token_ids"):
        raise damaged(name, f"missing_token_ids are not those in {MANIFEST}")


def tokenizer_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a tokenizer's folder."""
    return {path.name: sha256(path) for path in sorted(folder.glob("*")) if path.is_file()}


def damaged(name: str, what: str) -> DataError:
    """Return the error for a tokenizer of a prepared folder."""
    return DataError(f"damaged: {what}", where=name, hint="prepare the corpus again")
