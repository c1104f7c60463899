"""A corpus as work that can be done in any order: tasks that depend on the source alone, not on who does them.

    corpus = open_corpus(config, unit_bytes=32 * 2**20)
    for task in corpus.tasks:
        task.pieces            # parts of local files, read by the worker of the task
        task.stream            # or records that must be read from their beginning (a large .gz, a slice, the Hub)

A split may be a slice, as in `datasets`: `train[:5000]`, `train[100:]`, `train[10%:20%]`. Without a slice, local files
that can be entered anywhere are cut into pieces of about `unit_bytes`, and small files are put together.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from cloze.config import SourceConfig
from cloze.data.corpus.content import describe_contents
from cloze.data.corpus.fields import BadRecord, Document, Fields, joined_texts
from cloze.data.corpus.formats import Item, Piece, Raw
from cloze.data.corpus.jsonl import parse_line
from cloze.data.corpus.local_files import LocalFiles, describe_files, find_local, is_local
from cloze.data.corpus.presets import with_preset
from cloze.data.corpus.readers import check_shapes, pieces_of, place_of, read_piece
from cloze.data.corpus.unpack import Meter
from cloze.errors import ConfigError, DataError
from cloze.utils.terminal.console import say, warn

_SLICE = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Task:
    """A part of the corpus. `side` is the split its documents belong to; None: decided for each by its id.

    `stream` starts a new pass; `size` is in bytes, None if unknown, and `meter` tells how many of a stream's
    have been read.
    """

    number: int
    side: str | None
    name: str
    pieces: tuple[Piece, ...] = ()
    stream: Callable[[], Iterator[Item]] | None = None
    size: int | None = None
    meter: Meter | None = None


@dataclass(frozen=True)
class Corpus:
    """The documents of a run of `cloze prepare`. `description` goes into the manifest; `splits`: the names of all
    splits of the dataset, as far as they are known."""

    tasks: list[Task]
    fields: Fields
    description: dict[str, Any]
    splits: list[str]

    def documents(self) -> Iterator[Document]:
        """Yield every document in order, empty ones included. Raises DataError naming the first bad record."""
        for task in self.tasks:
            for place, raw in items_of(task, self.fields):
                try:
                    yield document_of(raw, self.fields)
                except BadRecord as error:
                    raise bad_record_error(error, place()) from None


def items_of(task: Task, fields: Fields) -> Iterator[tuple[Callable[[], str], Raw]]:
    """Yield the records of a task, each with a function that describes its place."""
    if task.stream is not None:
        for position, raw in task.stream():
            yield partial(stream_place, task, position), raw
    for piece in task.pieces:
        for position, raw in read_piece(piece, fields):
            yield partial(place_of, piece, position), raw


def stream_place(task: Task, position: int) -> str:
    """Return the description of a place in a stream."""
    return f"{task.name}, record {position}"


def document_of(raw: Raw, fields: Fields) -> Document:
    """Return the document of a record. Raises BadRecord if it has no text, or the text holds NUL characters,
    which come from binary data, and from UTF-16 that was read as something else."""
    if isinstance(raw, bytes):
        raw = parse_line(raw)
    if isinstance(raw, BadRecord):
        raise raw
    document = raw if isinstance(raw, Document) else fields.document(raw)
    if "\0" in document.text:
        raise BadRecord("NUL characters in the text")
    return document


def bad_record_error(error: BadRecord, place: str) -> DataError:
    """Return the error for a refused record."""
    return DataError(
        str(error), where=place, hint=f"{error.hint}, or leave such records out with --on_bad_record skip"
    )


def open_corpus(
    config: SourceConfig, validation_split: str | None = None, unit_bytes: int = 32 * 2**20, identify: bool = False
) -> Corpus:
    """Return the tasks of a corpus. With `identify`, its description has checksums of all bytes (see
    `cloze.data.corpus.content`).

    Raises ConfigError or DataError if the corpus or split is missing, or its first record lacks a field.
    """
    config = with_preset(config)
    if config.dataset_name is None:
        raise ConfigError(
            "no corpus", where="--dataset_name", hint="name a file, a folder or a dataset, or a --preset"
        )
    fields = Fields.parse(config.text_field, config.id_field)
    sides = [("train" if validation_split is not None else None, "--split", config.split)]
    if validation_split is not None:
        sides.append(("validation", "--validation_split", validation_split))
    local = (
        find_local(str(config.dataset_name), config.dataset_config_name)
        if is_local(str(config.dataset_name))
        else None
    )
    for note in local.notes if local is not None else []:
        warn(note)
    tasks: list[Task] = []
    descriptions = []
    for side, flag, split in sides:
        found, description, splits = _open_split(config, local, fields, split, flag, unit_bytes, identify)
        _check_first_record(found, fields, may_join=config.preset is not None)
        tasks += [
            dataclasses.replace(task, number=len(tasks) + number, side=side) for number, task in enumerate(found)
        ]
        descriptions.append(description | {"split": split.strip()})
    facts = {"text_field": config.text_field or "text", "id_field": config.id_field}
    description = descriptions[0] | facts
    return Corpus(tasks, fields, description | ({"validation": descriptions[1]} if validation_split else {}), splits)


def _open_split(
    config: SourceConfig,
    local: LocalFiles | None,
    fields: Fields,
    split: str,
    flag: str,
    unit_bytes: int,
    identify: bool,
) -> tuple[list[Task], dict[str, Any], list[str]]:
    """Return the tasks and the description of the split that the option `flag` names, and the names of all splits."""
    match = _SLICE.fullmatch(split.strip())
    if match is None:
        raise ConfigError(f"cannot read {split!r}", where=flag, hint="write train, train[:5000] or train[10%:20%]")
    name, first, last = match["name"], match["first"], match["last"]
    if any(end and end.endswith("%") and abs(int(end[:-1])) > 100 for end in (first, last)):
        raise ConfigError(f"{split!r} is more than 100 %", where=flag, hint="write train[:100%] or less")
    if local is not None:
        splits = list(local.splits)
        if name not in splits:
            hint = f"the splits are: {', '.join(sorted(splits))}; choose one with {flag}, or name a file"
            raise DataError(f"no split {name!r}", where=config.dataset_name, hint=hint)
        tasks, description = _open_local(str(config.dataset_name), local, name, unit_bytes, fields, identify)
    else:
        from cloze.data.corpus.hub import open_hub

        streams, description, splits = open_hub(config, name)
        tasks = [Task(0, None, label, stream=stream) for label, stream in streams]
        say("corpus", f"{name}: {len(tasks):,} {'file' if len(tasks) == 1 else 'files'} of {config.dataset_name}")
    if first is None and last is None:
        return tasks, description, splits
    size = sum(task.size for task in tasks if task.size) or None

    def sliced() -> Iterator[Item]:
        count = lambda: sum(1 for task in tasks for _ in items_of(task, fields))  # noqa: E731
        start, stop = _bounds(first, last, count)
        whole = (raw for task in tasks for _, raw in items_of(task, fields))
        return enumerate(islice(whole, start, stop), start + 1)

    return [Task(0, None, f"{config.dataset_name} ({name})", stream=sliced, size=size)], description, splits


def _bounds(first: str | None, last: str | None, count: Callable[[], int]) -> tuple[int, int | None]:
    """Return slice ends as numbers; percentages and negative ends need the number of records."""
    total = count() if any(text and (text[-1] == "%" or text[0] == "-") for text in (first, last)) else 0

    def number(text: str) -> int:
        value = round(total * int(text[:-1]) / 100) if text.endswith("%") else int(text)
        return min(value, sys.maxsize) if value >= 0 else max(0, total + value)

    return number(first) if first is not None else 0, number(last) if last is not None else None


def _open_local(
    name: str, local: LocalFiles, split: str, unit_bytes: int, fields: Fields, identify: bool
) -> tuple[list[Task], dict[str, Any]]:
    files = local.splits[split]
    others = [f"{other}: {describe_files(those)}" for other, those in sorted(local.splits.items()) if other != split]
    say("corpus", f"{split}: {describe_files(files)}" + (f"; also there: {'; '.join(others)}" if others else ""))
    check_shapes(files, fields)
    tasks: list[Task] = []
    waiting: list[Piece] = []

    def flush() -> None:
        if waiting:
            size = sum(piece.size for piece in waiting)
            tasks.append(Task(len(tasks), None, waiting[0].path, tuple(waiting), size=size))
            waiting.clear()

    for file in files:
        for piece in pieces_of(file, unit_bytes):
            if piece.stop is None and piece.size > unit_bytes // 4:  # too large to be done in one go
                flush()
                meter = Meter()
                stream = partial(read_piece, piece, fields, meter)
                tasks.append(Task(len(tasks), None, piece.path, stream=stream, size=piece.size, meter=meter))
                continue
            if sum(held.size for held in waiting) + piece.size > unit_bytes:
                flush()
            waiting.append(piece)
    flush()
    return tasks, {"dataset_name": Path(name).name, "files": describe_contents(files, identify)}


def _check_first_record(tasks: list[Task], fields: Fields, may_join: bool) -> None:
    """Check the first record before any work is done: a field that it lacks was named wrongly.

    Unless `may_join`, a text that is put together from a list of records is named: each may be a document of its own.
    In the only record of a split, a list of texts is refused.
    """
    items = (item for task in tasks for item in items_of(task, fields))
    for place, raw in items:
        try:
            record = parse_line(raw) if isinstance(raw, bytes) else raw
        except BadRecord:
            return
        if isinstance(record, dict):
            fields.check(record, place())
            if not may_join:
                _check_lists(record, fields, place(), is_only=next(items, None) is None)
        return


def _check_lists(record: dict[str, Any], fields: Fields, place: str, is_only: bool) -> None:
    for found in (joined for path in fields.text if (joined := joined_texts(record, path))):
        text = f"its field {found.field!r} is a list of {found.texts:,} texts"
        to_records = found.query + ("" if found.of_records else f" | {{{json.dumps(found.field)}: .}}")
        jq = f"write one record a line: jq -c '{to_records}' OLD > NEW.jsonl"
        if is_only and found.texts > 1:
            raise DataError(f"the only record, and {text}, which would be one document", where=place, hint=jq)
        if found.of_records:
            warn(f"{place}: {text}, which become one document, here and in other records; if each is one, {jq}")
