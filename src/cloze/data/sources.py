"""Documents of a corpus, one at a time: from local files or from the Hub.

    source = open_source(config, "train_asks[:5000]")
    for document in source.documents():
        document.id, document.text

A split may be a slice, as in `datasets`: `train[:5000]`, `train[100:]`, `train[10%:20%]`. Fields may be nested and
lists are joined with a space, as the Hugging Face tutorial does with `answers.text`.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cloze.config import SourceConfig
from cloze.data.readers import COMPRESSIONS, READERS, Record, format_of, read_records
from cloze.errors import ConfigError, DataError
from cloze.files import sha256

_SLICE = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\])?")
_SPLIT_WORDS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Document:
    """One text of the corpus and the name that decides on which side of the split it falls."""

    id: str
    text: str


@dataclass(frozen=True)
class Source:
    """A split of a corpus. `records` starts a new pass; `description` goes into the manifest."""

    name: str
    records: Callable[[], Iterator[Record]]
    description: dict[str, Any]
    text_field: str | None
    id_field: str | None

    def documents(self) -> Iterator[Document]:
        """Every document, also empty ones. Raises DataError where a field is missing."""
        for number, record in enumerate(self.records(), 1):
            where = f"{self.name}, record {number}"
            text = text_of(record, self.text_field or _default_text_field(record, where), where)
            yield Document(_id_of(record, self.id_field, text, where), text)


def open_source(config: SourceConfig, split: str) -> Source:
    """The documents of one split, nothing read yet. Raises DataError where there is no such corpus or split."""
    match = _SLICE.fullmatch(split.strip())
    if match is None:
        raise ConfigError(
            f"cannot read {split!r}", where="--split", hint="write train, train[:5000] or train[10%:20%]"
        )
    name, first, last = match["name"], match["first"], match["last"]
    if is_local(config.dataset_name):
        records, count, description = _open_local(config.dataset_name, name)
    else:
        from cloze.data.hub_source import open_hub

        records, count, description = open_hub(config, name)
    description |= {"split": split.strip(), "text_field": config.text_field}
    if first is not None or last is not None:
        whole = records

        def records() -> Iterator[Record]:
            return islice(whole(), *_bounds(first, last, count))

    return Source(config.dataset_name, records, description, config.text_field, config.id_field)


def is_local(name: str) -> bool:
    """Whether a dataset name is a path: what exists here, or looks like a file or folder, never goes to the Hub."""
    path = Path(name)
    looks_like_path = name.startswith((".", "/", "~")) or format_of(path) is not None or any(c in name for c in "*?")
    return path.exists() or looks_like_path or path.suffix.lower() in COMPRESSIONS


def _bounds(first: str | None, last: str | None, count: Callable[[], int]) -> tuple[int, int | None]:
    """Slice ends as numbers; percentages and negative ends need the number of records."""

    def number(text: str) -> int:
        if text.endswith("%"):
            return round(count() * int(text[:-1]) / 100)
        return int(text) if int(text) >= 0 else count() + int(text)

    return number(first) if first is not None else 0, number(last) if last is not None else None


def _open_local(name: str, split: str) -> tuple[Callable[[], Iterator[Record]], Callable[[], int], dict[str, Any]]:
    by_split = local_splits(name)
    if split not in by_split:
        raise DataError(f"no split {split!r}", where=name, hint=f"the splits are: {', '.join(by_split)}")
    files = by_split[split]

    def records() -> Iterator[Record]:
        for file in files:
            yield from read_records(file)

    facts = [{"name": f.name, "bytes": f.stat().st_size, "sha256": sha256(f)} for f in files]
    description = {"dataset_name": Path(name).name, "files": facts}
    return records, lambda: sum(1 for _ in records()), description


def local_splits(name: str) -> dict[str, list[Path]]:
    """The files of each split of a local file, folder or glob. Raises DataError where there are none."""
    path = Path(name).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and format_of(f) is not None and not _is_metadata(f))
    else:
        files = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not files:
        what = "no files that Cloze reads" if path.is_dir() else "no such file or folder"
        raise DataError(
            what, where=name, hint=f"give {', '.join(READERS)} files (also .gz, .zst), or a Hub dataset's name"
        )
    if len(files) == 1:
        return {"train": files} if not path.is_dir() else {_split_of(files[0], path) or "train": files}
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, path) or "train", []).append(file)
    return by_split


def _is_metadata(file: Path) -> bool:
    return file.name in ("dataset_info.json", "state.json", "dataset_dict.json") or file.name.startswith(".")


def _split_of(file: Path, root: Path) -> str | None:
    """The split that a file's folder or name speaks of: `train/part-1.json`, `eli5-validation-2.json.gz`."""
    parts = file.relative_to(root).parts if root.is_dir() else (file.name,)
    for part in parts:
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def text_of(record: Record, fields: str, where: str) -> str:
    """The text of a record. `fields`: dotted names separated by commas. Raises DataError for one that is missing."""
    texts = (_join(_get(record, field.strip(), where)) for field in fields.split(","))
    return " ".join(text for text in texts if text.strip())


def _get(record: Record, field: str, where: str) -> Any:
    values: Any = record
    for key in field.split("."):
        if isinstance(values, list):  # a list of records, as `output[].answer` of KILT
            values = [value[key] for value in values if isinstance(value, dict) and key in value]
        elif isinstance(values, dict) and key in values:
            values = values[key]
        else:
            known = ", ".join(field_names(record))
            raise DataError(f"no field {field!r}", where=where, hint=f"the fields are: {known}; set --text_field")
    return values


def _join(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(text for text in map(_join, value) if text)
    if isinstance(value, dict):
        return ""
    return "" if value is None else str(value)


def field_names(record: Record, prefix: str = "") -> list[str]:
    """All fields of a record, nested ones with dots."""
    names = []
    for key, value in record.items():
        inner = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        names += field_names(inner, f"{prefix}{key}.") if isinstance(inner, dict) else [f"{prefix}{key}"]
    return names


def _default_text_field(record: Record, where: str) -> str:
    if "text" in record:
        return "text"
    known = ", ".join(field_names(record))
    raise DataError("which field holds the text?", where=where, hint=f"the fields are: {known}; set --text_field")


def _id_of(record: Record, id_field: str | None, text: str, where: str) -> str:
    if id_field is not None:
        return _join(_get(record, id_field, where))
    for name in ("q_id", "id"):
        if record.get(name) not in (None, ""):
            return str(record[name])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
