"""One unit of work: a part of the corpus becomes a folder of blocks, published by one rename.

    units/000007-000002/            task 7, chunk 2 of it (a task of pieces has one chunk)
      train.arrow  validation.arrow the full blocks of its documents
      train.tail   validation.tail  leftover tokens (int32), to be joined with those of the other units
      train.hashes, .sample.json    of its documents, see `cloze.data.prepare.text_sketch`; also of validation
      unit.json                     counts, checksums, bad records

Unit contents do not depend on which worker builds them. Imports nothing slow, because worker processes start with it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cloze.data.corpus.fields import BadRecord, Document, Fields
from cloze.data.corpus.formats import Raw
from cloze.data.corpus.sources import Task, bad_record_error, document_of, items_of, stream_place
from cloze.data.prepare.text_sketch import TextSketch
from cloze.data.prepared.packing import LEFT_BLOCKS, BestFit, Concat
from cloze.data.prepared.shards import ShardWriter
from cloze.data.tokenizers.encoders import Encoder, EncoderSpec
from cloze.errors import ClozeError
from cloze.utils.atomic_files import disk_errors, remove_tree, sync, sync_tree
from cloze.utils.foreign.json_yaml import dump_json, read_json

SIDES = ("train", "validation")
UNIT = "unit.json"
BATCH_DOCUMENTS = 1000
BATCH_CHARACTERS = 4 * 2**20
FLUSH_TOKENS = 2**23  # best_fit packs this many tokens at a time
MAX_EXAMPLES = 20


@dataclass(frozen=True)
class Recipe:
    """What determines the bytes of a unit, apart from its documents."""

    encoder: EncoderSpec
    fields: Fields
    block_size: int
    packing: str
    pad_token_id: int | None
    validation_percentage: float
    skip_bad_records: bool
    unk_token_id: int | None = None


@dataclass
class SplitStream:
    """Packs and writes the documents of one split of a unit."""

    packer: Concat | BestFit
    writer: ShardWriter
    unknown: int | None = None
    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    text_tokens: int = 0
    sketch: TextSketch = field(default_factory=TextSketch)
    waiting: list[str] = field(default_factory=list)
    characters: int = 0

    def add(self, document: Document, encode: Encoder) -> None:
        """Add one document; encode if a batch is full."""
        self.documents += 1
        text = document.text
        if not text or text.isspace():
            self.empty_documents += 1
            return
        self.sketch.add(text)
        self.waiting.append(text)
        self.characters += len(text)
        if len(self.waiting) == BATCH_DOCUMENTS or self.characters >= BATCH_CHARACTERS:
            self.flush(encode)

    def flush(self, encode: Encoder) -> None:
        """Encode and pack the waiting documents."""
        if not self.waiting:
            return
        tokens, lengths = encode(self.waiting)
        self.waiting, self.characters = [], 0
        self.tokens += len(tokens)
        around = [*encode.spec.prefix, *encode.spec.suffix]
        self.text_tokens += len(tokens) - len(lengths) * len(around)
        if self.unknown is not None:  # in some tokenizers it is also the token at the end
            here = int(np.count_nonzero(tokens == self.unknown))
            self.unknown_tokens += here - len(lengths) * around.count(self.unknown)
        if isinstance(self.packer, Concat):
            self.writer.add(self.packer.add(tokens, lengths))
        else:
            self.packer.add(tokens, lengths)
            if self.packer.left_over >= FLUSH_TOKENS:
                self.writer.add(self.packer.flush(keep=LEFT_BLOCKS))

    def close(self, folder: Path, side: str) -> dict[str, Any]:
        """Finish the shard, write the tail and the text's findings, and return their description."""
        if isinstance(self.packer, BestFit):
            self.writer.add(self.packer.flush(keep=LEFT_BLOCKS))
        tokens, lengths = self.packer.close()
        if len(tokens):
            tokens.astype("<i4").tofile(folder / f"{side}.tail")
        if len(hashes := self.sketch.hashes):
            hashes.astype("<u8").tofile(folder / f"{side}.hashes")
            (folder / f"{side}.sample.json").write_text(dump_json(self.sketch.sample), encoding="utf-8")
        return {
            "documents": self.documents,
            "empty_documents": self.empty_documents,
            "cut_documents": self.packer.cut_documents,
            "tokens": self.tokens,
            "text_tokens": self.text_tokens,
            "unknown_tokens": self.unknown_tokens,
            "tail": lengths.tolist(),
            "shard": self.writer.close(),
        }


def make_packer(recipe: Recipe) -> Concat | BestFit:
    """Return the packer of a recipe."""
    if recipe.packing == "concat":
        return Concat(recipe.block_size)
    assert recipe.pad_token_id is not None
    return BestFit(recipe.block_size, recipe.pad_token_id)


def is_validation(document_id: str, percentage: float) -> bool:
    """Return whether a document is used for validation, by a hash of its id: independent of order and machine."""
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < percentage / 100 * 2**64


def process_name() -> str:
    """Return a name for this process's unfinished files that is unique among processes, also across containers:
    `HOST.NAMESPACE-PID`."""
    try:
        namespace = re.sub(r"[^0-9]", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        namespace = "0"
    return f"{os.uname().nodename}.{namespace}-{os.getpid()}"


def unit_name(task: int, chunk: int) -> str:
    """Return a unit's name; names sort in the order of the corpus."""
    return f"{task:06d}-{chunk:06d}"


def read_unit(folder: Path) -> dict[str, Any] | None:
    """Return the facts of a finished unit; None if it is missing or damaged."""
    try:
        facts: dict[str, Any] = read_json(folder / UNIT)
        for side in SIDES:
            shard = facts["splits"][side]["shard"]
            if shard is not None and (folder / f"{side}.arrow").stat().st_size != shard["bytes"]:
                return None
            tail = sum(facts["splits"][side]["tail"])
            if tail and (folder / f"{side}.tail").stat().st_size != 4 * tail:
                return None
            texts = facts["splits"][side]["documents"] - facts["splits"][side]["empty_documents"]
            facts["splits"][side]["unknown_tokens"]  # units of older versions lack it, and are made again
            if texts and (folder / f"{side}.hashes").stat().st_size != 8 * texts:
                return None
        bool(facts["last"])
    except (ClozeError, OSError, KeyError, TypeError):
        return None
    return facts


def records_of_chunk(task: Task, chunk: list[tuple[int, Raw]]) -> Iterator[tuple[Callable[[], str], Raw]]:
    """Yield a chunk of a stream in the form in which `items_of` yields the records of pieces."""
    for position, raw in chunk:
        yield partial(stream_place, task, position), raw


def do_unit(
    recipe: Recipe,
    encode: Encoder,
    units: Path,
    task: Task,
    chunk: int,
    records: list[tuple[int, Raw]] | None,
    is_last: bool,
    advance: Callable[[int, int], None],
) -> None:
    """Make one unit's folder. `records`: a chunk of a stream; None: the task's own pieces are read.

    `advance(documents, tokens)` reports progress. Raises DataError for broken files, and for bad records unless they
    are skipped; DiskError if nothing can be written.
    """
    final = units / unit_name(task.number, chunk)
    staged = units / f"tmp-{process_name()}-{final.name}"
    with disk_errors(units):
        remove_tree(staged)
        staged.mkdir(parents=True)
        try:
            found = records_of_chunk(task, records) if records is not None else items_of(task, recipe.fields)
            facts = _fill_unit(recipe, encode, staged, task, found, advance)
            facts["last"] = is_last
            (staged / UNIT).write_text(dump_json(facts), encoding="utf-8")
            sync_tree(staged)
            if final.exists() and read_unit(final) is None:
                remove_tree(final)  # damaged
            try:
                os.rename(staged, final)
            except OSError:
                if read_unit(final) is None:  # else another process has made it, with the same bytes
                    raise
            sync(units)
        finally:
            remove_tree(staged, quietly=True)


def _fill_unit(
    recipe: Recipe,
    encode: Encoder,
    folder: Path,
    task: Task,
    records: Iterator[tuple[Callable[[], str], Raw]],
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    pieces = recipe.packing == "best_fit"
    train, validation = (
        SplitStream(
            make_packer(recipe), ShardWriter(folder / f"{side}.arrow", recipe.block_size, pieces), recipe.unk_token_id
        )
        for side in SIDES
    )
    bad: Counter[str] = Counter()
    examples: list[str] = []
    told_documents = told_tokens = 0
    percentage, side = recipe.validation_percentage, task.side
    for place, raw in records:
        try:
            document = document_of(raw, recipe.fields)
        except BadRecord as error:
            if not recipe.skip_bad_records:
                raise bad_record_error(error, place()) from None
            bad[str(error)] += 1
            if len(examples) < MAX_EXAMPLES:
                examples.append(f"{Path(place()).name}: {error}")  # no folder of this machine gets into the manifest
            continue
        held = side == "validation" or (side is None and percentage > 0 and is_validation(document.id, percentage))
        (validation if held else train).add(document, encode)
        if not train.waiting:
            documents, tokens = train.documents + validation.documents, train.tokens + validation.tokens
            advance(documents - told_documents, tokens - told_tokens)
            told_documents, told_tokens = documents, tokens
    for stream in (train, validation):
        stream.flush(encode)
    advance(train.documents + validation.documents - told_documents, train.tokens + validation.tokens - told_tokens)
    splits = {side: stream.close(folder, side) for side, stream in zip(SIDES, (train, validation), strict=True)}
    return {"splits": splits, "bad_records": dict(bad), "examples": examples}


def read_tail(folder: Path, side: str) -> Any:
    """Return the leftover tokens of a unit: [n] int32."""
    path = folder / f"{side}.tail"
    return np.fromfile(path, "<i4").astype(np.int32) if path.exists() else np.empty(0, np.int32)


def read_hashes(folder: Path, side: str) -> Any:
    """Return the hashes of a unit's documents: [n] uint64."""
    path = folder / f"{side}.hashes"
    return np.fromfile(path, "<u8").astype(np.uint64) if path.exists() else np.empty(0, np.uint64)


def read_sample(folder: Path, side: str) -> list[tuple[int, str]]:
    """Return the hash and text of a unit's sampled documents."""
    path = folder / f"{side}.sample.json"
    return list(read_json(path, kind=list)) if path.exists() else []
