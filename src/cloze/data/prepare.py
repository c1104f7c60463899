"""From a corpus to a prepared folder, in bounded memory.

documents -> token ids with special tokens -> blocks -> shards        one stream for train, one for validation

prepare(PrepareConfig(dataset_name="corpus.jsonl", tokenizer_name="roberta-base", output="prepared/corpus"))
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from cloze.config import PrepareConfig
from cloze.console import progress, warn
from cloze.data.packing import Packer
from cloze.data.shards import ShardWriter, write_manifest
from cloze.data.sources import Document, Source, open_source
from cloze.data.tokenize import Encoder, describe, load_tokenizer
from cloze.errors import ConfigError, DataError
from cloze.files import staged_folder

BATCH_DOCUMENTS = 1000
MIN_BLOCK_SIZE = 8


@dataclass
class SplitStream:
    """What becomes of the documents of one split."""

    packer: Packer
    writer: ShardWriter
    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    waiting: list[str] = field(default_factory=list)

    def add(self, document: Document, encode: Encoder) -> None:
        """Take one document; encode when a batch is full."""
        self.documents += 1
        if not document.text.strip():
            self.empty_documents += 1
            return
        self.waiting.append(document.text)
        if len(self.waiting) == BATCH_DOCUMENTS:
            self.flush(encode)

    def flush(self, encode: Encoder) -> None:
        """Encode and pack what is waiting."""
        if self.waiting:
            tokens, _ = encode(self.waiting)
            self.waiting = []
            self.tokens += len(tokens)
            self.writer.add(self.packer.add(tokens))

    def close(self) -> dict[str, Any]:
        """Finish the shards and describe the split for the manifest."""
        return {
            "documents": self.documents,
            "empty_documents": self.empty_documents,
            "tokens": self.tokens,
            "blocks": self.writer.num_blocks,
            "dropped_tokens": self.packer.left_over,
            "shards": self.writer.close(),
        }


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make the prepared folder `config.output` and return its manifest.

    Raises ConfigError, DataError, ModelError or DiskError, in one line each; the folder is whole or not there.
    """
    output = Path(config.output)
    check_values(config, output)
    tokenizer = load_tokenizer(config.tokenizer_name, config.trust_remote_code, config.token)
    if config.block_size > tokenizer.model_max_length:
        warn(f"blocks of {config.block_size} tokens, but the tokenizer is for models of {tokenizer.model_max_length}")
    train = open_source(config, config.split)
    validation = open_source(config, config.validation_split) if config.validation_split else None
    with staged_folder(output) as staged:
        tokenizer.save_pretrained(staged / "tokenizer")
        split_facts = _write_blocks(config, Encoder(tokenizer), train, validation, staged)
        return write_manifest(
            staged,
            {
                "block_size": config.block_size,
                "tokenizer": describe(tokenizer, config.tokenizer_name),
                "source": train.description,
                "split_rule": _split_rule(config, validation),
                "splits": split_facts,
            },
        )


def check_values(config: PrepareConfig, output: Path) -> None:
    """Raise ConfigError for values that cannot be used, before anything is read."""
    if output.exists():
        raise ConfigError("exists already", where=output, hint="choose another --output, or delete it")
    if config.block_size < MIN_BLOCK_SIZE:
        raise ConfigError(f"must be at least {MIN_BLOCK_SIZE}, not {config.block_size}", where="--block_size")
    if not 0 <= config.validation_split_percentage < 100:
        raise ConfigError(
            f"must be at least 0 and below 100, not {config.validation_split_percentage}",
            where="--validation_split_percentage",
        )


def is_validation(document_id: str, percentage: float) -> bool:
    """Whether a document is kept for validation: a hash of its id, the same in any order and on any machine."""
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < percentage / 100 * 2**64


def _write_blocks(
    config: PrepareConfig, encode: Encoder, train: Source, validation: Source | None, staged: Path
) -> dict[str, Any]:
    """Stream all documents into the shards of their splits; return what the manifest says of each."""
    streams = {
        name: SplitStream(Packer(config.block_size), ShardWriter(staged / name, config.block_size))
        for name in ("train", "validation")
    }
    percentage = 0.0 if validation else config.validation_split_percentage
    sides: Iterator[tuple[str, Document]] = (
        ("validation" if is_validation(document.id, percentage) else "train", document)
        for document in train.documents()
    )
    if validation is not None:
        sides = chain(sides, (("validation", document) for document in validation.documents()))
    begin = time.monotonic()
    with progress("prepare", total=None, unit="documents") as advance:
        while batch := list(islice(sides, BATCH_DOCUMENTS)):
            for side, document in batch:
                streams[side].add(document, encode)
            tokens = sum(stream.tokens for stream in streams.values())
            advance(len(batch), note=f"{tokens / max(time.monotonic() - begin, 1e-9):,.0f} tokens/s")
    for stream in streams.values():
        stream.flush(encode)
    _check_streams(config, streams)
    if streams["validation"].writer.num_blocks == 0:
        streams.pop("validation").writer.discard()
    return {name: stream.close() for name, stream in streams.items()}


def _check_streams(config: PrepareConfig, streams: dict[str, SplitStream]) -> None:
    """Raise DataError where a split has nothing to train or validate on."""
    documents = sum(stream.documents for stream in streams.values())
    if documents == 0:
        raise DataError("no documents", where=config.dataset_name, hint=f"is split {config.split!r} empty?")
    if documents == sum(stream.empty_documents for stream in streams.values()):
        raise DataError(f"all {documents} documents are empty", where=config.dataset_name, hint="check --text_field")
    for name, wanted in (("train", True), ("validation", config.validation_split is not None)):
        stream = streams[name]
        if stream.writer.num_blocks:
            continue
        tokens = f"{stream.tokens} tokens in {stream.documents} documents are less than a block of {config.block_size}"
        if wanted:
            raise DataError(
                f"{name}: {tokens}", where=config.dataset_name, hint="use more text or a smaller --block_size"
            )
        if stream.documents:
            warn(f"no validation blocks: {tokens}")


def _split_rule(config: PrepareConfig, validation: Source | None) -> dict[str, Any]:
    if validation is not None:
        return {"kind": "named", "validation": validation.description}
    return {"kind": "hash of the document's id", "validation_percentage": config.validation_split_percentage}
