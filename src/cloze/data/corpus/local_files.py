"""Find the local files that a dataset name means, and the split of each.

local = find_local("corpus/")
local.splits                        # {"train": [Path("corpus/train.jsonl")], "validation": [...]}
local.notes                         # notes for the user, one sentence each

Splits follow the names that `datasets` knows (https://huggingface.co/docs/datasets/repository_structure): a keyword in
the name of a folder or file, between separators, or `data/SPLIT-00000-of-00003.EXT`. Unlike there, upper case counts
as lower case, a name with two keywords is never training data, and files without a keyword are training data if no
other file is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from cloze.data.corpus.card_splits import card_splits
from cloze.data.corpus.find_files import (
    MAGIC,
    DataFile,
    Listing,
    check_shards,
    files_below,
    files_inside,
    files_matching,
    is_data,
)
from cloze.data.corpus.formats import FORMATS, format_of
from cloze.data.corpus.unpack import COMPRESSIONS
from cloze.errors import DataError

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_KEYWORD = {word: split for split, words in KEYWORDS.items() for word in words}
_SEPARATORS = re.compile(r"[-._ 0-9]+")
_SHARDED = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\..*")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")
# What may stand beside a keyword without a separator: `valset`, `mydev`.
_FILLERS = {"set", "data", "file", "files", "split", "corpus", "text", "texts", "docs", "my", "our", "the"}
_SHOWN_NAMES = 3


class NoFiles(DataError):
    """There is no file that Cloze reads under a name."""


@dataclass
class LocalFiles:
    """The files of each split, and notes about them for the user."""

    splits: dict[str, list[Path]]
    notes: list[str] = field(default_factory=list)


def is_local(name: str) -> bool:
    """Return whether a dataset name is a path: what exists here, or looks like a file or folder, is never looked for
    on the Hub."""
    path = Path(name)
    looks_like_path = name.startswith((".", "/", "~")) or format_of(path) is not None or any(c in name for c in "*?")
    return path.exists() or looks_like_path or path.suffix.lower() in COMPRESSIONS


def local_splits(name: str, config_name: str | None = None) -> dict[str, list[Path]]:
    """Return the files of each split as `find_local` does."""
    return find_local(name, config_name).splits


def find_local(name: str, config_name: str | None = None) -> LocalFiles:
    """Return the files of each split of a local file, folder or glob. Raises DataError if no file is found.

    `config_name`: one of several configurations that README.md of a folder names.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return LocalFiles({"train": [path]}, _as_named([path]))
    if path.is_dir() and (named := card_splits(path, config_name)) is not None:
        return _of_card(path, named)
    listing = files_below(path) if path.is_dir() else files_matching(str(path))
    if not listing.files:
        what = "no files that Cloze reads" if path.is_dir() else "no such file or folder"
        hint = f"give {', '.join(FORMATS)} files (also .gz, .zst), or a Hub dataset's name"
        if listing.packed:
            hint = f"unpack {_names(listing.packed)}"
        elif listing.folders:
            what, hint = "matches folders only", f"match their files: {name.rstrip('/')}/*"
        elif "{" in name:
            hint = "braces are not expanded: write * or [ab], or put the files into a folder"
        raise NoFiles(what, where=name, hint=hint)
    notes = [f"{again} is the same file as {first}; it is read once" for again, first in listing.repeated]
    if listing.packed:
        notes.append(f"not read: {_names(listing.packed)}; unpack what belongs to the corpus")
    if listing.others:
        notes.append(f"not read: {_names(listing.others)}; give them by name if they belong to the corpus")
    if not path.is_dir():
        return _of_glob(listing, path, notes)
    return _of_folder(listing, path, notes)


def _of_card(folder: Path, named: dict[str, list[str]]) -> LocalFiles:
    splits = {}
    for split, patterns in named.items():
        files: dict[Path, None] = {}
        for pattern in patterns:
            found = files_inside(folder, Path(pattern)).files
            found = [file for file in found if is_data(file.path)] or found
            if not found:
                what = f"names {pattern} as files of {split}, which are missing"
                raise DataError(
                    what, where=folder / "README.md", hint="get the whole dataset, or give the files by name"
                )
            check_shards(found)
            files |= dict.fromkeys(file.path for file in found)
        splits[split] = sorted(files)
    return LocalFiles(splits, [])


def _of_glob(listing: Listing, pattern: Path, notes: list[str]) -> LocalFiles:
    """Return the files of each split; the parts of a path that the user has written out name none."""
    files = [file.path for file in listing.files]
    if len(files) == 1:
        return LocalFiles({"train": files}, notes + _as_named(files))
    first = next(number for number, part in enumerate(pattern.parts) if MAGIC.search(part))
    written = set(pattern.parts[first:])
    parts = [[part for part in file.path.parts[first:-1] if part not in written] for file in listing.files]
    named = [(file, (*found, file.path.name)) for file, found in zip(listing.files, parts, strict=True)]
    splits, more = _by_split(named)
    return LocalFiles(splits, notes + more)


def _of_folder(listing: Listing, folder: Path, notes: list[str]) -> LocalFiles:
    if all(file.path.parent == folder and file.split is not None for file in listing.files):
        # One saved dataset, which may be of any split: the user has named it.
        files = [file.path for file in listing.files]
        split = listing.files[0].split
        if split_of(str(split)) not in (None, "train"):
            notes.append(f"{folder} was saved from the split {split}; it is read as train, because it was named")
        return LocalFiles({"train": files}, notes)
    splits, more = _by_split([(file, file.path.relative_to(folder).parts) for file in listing.files])
    if list(splits) == ["train"]:
        more += _as_named([folder])
    return LocalFiles(splits, notes + more)


def _by_split(files: list[tuple[DataFile, tuple[str, ...]]]) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the files of each split, and notes. A file comes with the parts of its path that may name a split."""
    splits: dict[str, list[Path]] = {}
    unnamed, notes = [], []
    for file, parts in files:
        sharded = _SHARDED.fullmatch(parts[-1]) if parts[:-1] == ("data",) else None
        split = file.split or (sharded["split"] if sharded else None)
        if split is None:
            split, conflict = _split_of_parts(parts)
            if conflict:
                notes.append(f"{file.path} is named after several splits; it is taken as {split}")
        if split is None:
            unnamed.append(file.path)
        else:
            splits.setdefault(split, []).append(file.path)
    if unnamed and "train" in splits:
        notes.append(f"not used, because no split is in the name: {_names(unnamed)}")
    elif unnamed:
        splits = {"train": unnamed, **splits}
        notes += _unclear_names([(file.path, parts) for file, parts in files if file.path in unnamed])
    return splits, notes


def _unclear_names(files: list[tuple[Path, tuple[str, ...]]]) -> list[str]:
    """Return a note if training files are named after another split without a separator: `valset.jsonl`,
    `corpusVal.jsonl`, `xval.jsonl` beside `x.jsonl` or `xtrain.jsonl`."""
    words = [{word for part in parts for word in _SEPARATORS.split(part)} for _, parts in files]
    sides: dict[str, set[str]] = {}  # what is left of a word without its keyword -> the splits of the keywords
    for word in set().union(*words):
        for rest, split in [(word.lower(), ""), *_joined_keywords(word)]:
            sides.setdefault(rest, set()).add(split)
    unclear = [
        path
        for (path, _), found in zip(files, words, strict=True)
        for word in found
        if any(
            split != "train" and (rest in _FILLERS or len(sides[rest]) > 1) for rest, split in _joined_keywords(word)
        )
    ]
    if not unclear:
        return []
    names = _names(list(dict.fromkeys(unclear)))
    return [f"read as train: {names}; if it is another split, write its name with a separator, as in my-val.jsonl"]


def _joined_keywords(word: str) -> list[tuple[str, str]]:
    """Return the splits that a word begins or ends with, each with the rest of the word; `myVal` -> a filler."""
    humps, lower = _HUMP.split(word), word.lower()
    found = [("set", _SPLIT_OF_KEYWORD[hump.lower()]) for hump in humps if hump.lower() in _SPLIT_OF_KEYWORD]
    for keyword, split in _SPLIT_OF_KEYWORD.items():
        if lower != keyword and lower.startswith(keyword):
            found.append((lower.removeprefix(keyword), split))
        if lower != keyword and lower.endswith(keyword):
            found.append((lower.removesuffix(keyword), split))
    return found


def _split_of_parts(parts: tuple[str, ...]) -> tuple[str | None, bool]:
    """Return the split that a path names, and whether it names more than one: then it is not training data."""
    named = [split for part in parts for split in _splits_in(part)]
    held_out = [split for split in named if split != "train"]
    return next(iter(held_out or named), None), len(set(named)) > 1


def split_of(name: str) -> str | None:
    """Return the split that a name stands for: `val-2` -> "validation"; None if it names none."""
    return _split_of_parts((name,))[0]


def _splits_in(name: str) -> list[str]:
    words = _SEPARATORS.split(name.lower())
    return [_SPLIT_OF_KEYWORD[word] for word in words if word in _SPLIT_OF_KEYWORD]


def _as_named(paths: list[Path]) -> list[str]:
    """Return a note if what the user has named is called after another split than train."""
    names = ((path, split_of(path.name)) for path in paths)
    return [
        f"{path} is named after the split {split}; it is read as train, because it was named"
        for path, split in names
        if split not in (None, "train")
    ]


def describe_files(files: list[Path]) -> str:
    """Describe a list of files: `["a.jsonl", "b.jsonl"]` -> `2 files (a.jsonl, b.jsonl)`."""
    return f"{len(files):,} {'file' if len(files) == 1 else 'files'} ({_names(files)})"


def _names(files: list[Path]) -> str:
    shown = [path.name for path in files[:_SHOWN_NAMES]]
    more = len(files) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")
