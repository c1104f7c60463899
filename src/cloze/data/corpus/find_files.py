"""List the data files below a folder, or those that a glob pattern matches.

    listing = files_below(Path("corpus"))
    listing.files                   # [DataFile(path, split), ...], sorted by path
    listing.repeated                # [(path, the same file under its first name), ...], each file is listed once

Skipped: hidden files and folders, `__pycache__` and the like, metadata of `datasets` and of the Hub, caches that
`datasets` writes next to a saved dataset, and folders made by `cloze prepare`. state.json names the files of a dataset
saved by `save_to_disk`.

Links are followed, because the Hub's cache consists of them. Each folder is visited once, so cycles of links end.
Links to a folder above the given one are not followed.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloze.data.corpus.formats import ONLY_ALONE, format_of
from cloze.data.corpus.unpack import COMPRESSIONS
from cloze.errors import DataError
from cloze.utils.foreign.json_yaml import read_mapping
from cloze.utils.foreign.paths import is_plain_name, real_path

MAX_ENTRIES = 1_000_000
# The files that `datasets` ignores, and those that `save_to_disk` writes beside the data.
METADATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_CACHE = re.compile(r"cache-.*\.arrow")
# Packed files and archives that are not read; also `.gz` and `.zst` of files that are not data by name.
_PACKED = re.compile(r".*\.(gz|zst|bz2|xz|lzma|lz4|br|sz|snappy|gzip|zstd|zip|tar|tgz|tbz|txz|7z|rar)", re.IGNORECASE)
_SHARD = re.compile(r"(?P<before>.*?)(?P<number>\d{4,6})(?P<of>[-_]of[-_])(?P<count>\d{4,6})(?P<after>\D.*|)")
MAGIC = re.compile(r"[*?\[]")
_Id = tuple[int, int]


@dataclass(frozen=True)
class DataFile:
    """One file. `split`: its split in a saved dataset; None if unknown."""

    path: Path
    split: str | None = None


@dataclass
class Listing:
    """The files found, each once; other names of the same files; and files that are not read: packed ones, and others
    beside the data."""

    files: list[DataFile] = field(default_factory=list)
    repeated: list[tuple[Path, Path]] = field(default_factory=list)
    packed: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    folders: int = 0  # that a pattern matches


class _Walk:
    """The state of one search: visited folders, and the number of entries examined."""

    def __init__(self, name: Path):
        self.name = name
        self.visited: set[Any] = set()
        self.found: list[DataFile] = []
        self.packed: list[Path] = []
        self.notes: list[Path] = []  # Markdown: data if there are no others
        self.others: list[Path] = []
        self.folders = 0
        self._entries = 0

    def entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """Return the entries of a folder by name. Raises DataError if it cannot be listed, or has too many."""
        try:
            with os.scandir(folder) as scan:
                found = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"cannot be listed ({error.strerror})", where=folder, hint="check its permissions"
            ) from None
        self._entries += len(found)
        if self._entries > MAX_ENTRIES:
            what = f"more than {MAX_ENTRIES:,} files and folders"
            raise DataError(what, where=self.name, hint="give the name of a folder that holds the corpus only")
        return found

    def listing(self) -> Listing:
        """Return the files found, each once, under its first name; a file's own name precedes links to it."""
        listing = Listing(packed=sorted(self.packed), others=sorted([*self.notes, *self.others]), folders=self.folders)
        first: dict[_Id, Path] = {}
        for file in sorted(self.found, key=lambda one: (one.path.is_symlink(), one.path)):
            here = _id(file.path)
            if here in first:
                listing.repeated.append((file.path, first[here]))
            else:
                first[here] = file.path
                listing.files.append(file)
        listing.files.sort(key=lambda one: one.path)
        return listing


def files_below(folder: Path) -> Listing:
    """Return the data files below a folder. Raises DataError if a folder in it cannot be listed, a file of a saved
    dataset is missing, or a link to data leads nowhere."""
    walk = _Walk(folder)
    above = {_id(parent) for parent in real_path(folder).parents}
    waiting: list[tuple[Path, str | None]] = [(folder, None)]
    links: list[Path] = []  # folders that are reached by links come last
    while waiting or links:
        here, split = waiting.pop() if waiting else (links.pop(0), None)
        if _id(here) in walk.visited or _id(here) in above:
            continue
        walk.visited.add(_id(here))
        if here != folder and _is_ours(here):
            continue
        entries = walk.entries(here)
        saved = _saved_files(here, split)
        split_names = _saved_splits(here)
        for entry in entries:
            if entry.name.startswith((".", "__")):
                continue
            path = here / entry.name
            if path.is_dir():
                if entry.is_symlink():
                    links.append(path)
                else:
                    waiting.append((path, entry.name if entry.name in split_names else None))
            elif saved is None and is_data(path):
                _check_regular(path)
                if format_of(path) in ONLY_ALONE:
                    walk.notes.append(path)
                else:
                    walk.found.append(DataFile(path, split))
            elif saved is None and _PACKED.fullmatch(entry.name) and path.is_file():
                walk.packed.append(path)
            elif saved is None and entry.name not in METADATA and not _CACHE.fullmatch(entry.name):
                walk.others.append(path)
        walk.found += saved or []
    if not walk.found:
        walk.found, walk.notes = [DataFile(path) for path in walk.notes], []
    listing = walk.listing()
    check_shards(listing.files)
    return listing


def files_matching(pattern: str) -> Listing:
    """Return the files that a glob pattern matches; `**` stands for any number of folders that are not hidden."""
    parts = Path(pattern).parts
    first = next((number for number, part in enumerate(parts) if MAGIC.search(part)), len(parts))
    if first == len(parts):
        return Listing()
    listing = files_inside(Path(*parts[:first]), Path(*parts[first:]))
    check_shards(listing.files, parts[-1])
    return listing


def files_inside(folder: Path, pattern: Path) -> Listing:
    """Return the files that a glob pattern relative to a folder matches."""
    walk = _Walk(folder / pattern)
    _expand(walk, folder, pattern.parts)
    return walk.listing()


def check_shards(files: list[DataFile], pattern: str = "*") -> None:
    """Raise DataError if a shard `NAME-00001-of-00003.EXT` is missing and its name matches a pattern.

    The text after the numbers may differ between files: `push_to_hub` wrote checksums there.
    """
    shards = [(file.path, match) for file in files if (match := _SHARD.fullmatch(file.path.name))]
    there: dict[Path, dict[tuple[str, str], set[int]]] = {}  # by folder: the numbers of each set of shards
    for folder in {path.parent for path, _ in shards}:
        numbers = there.setdefault(folder, {})
        for name in os.listdir(folder):
            if (match := _SHARD.fullmatch(name)) and is_data(folder / name):
                numbers.setdefault((match["before"], match["count"]), set()).add(int(match["number"]))
    for path, match in shards:
        count = match["count"]
        numbers_here = there[path.parent].pop((match["before"], count), set())
        first = int(0 not in numbers_here and int(count) in numbers_here)
        is_whole = not numbers_here or max(numbers_here) > int(count)  # seen before, or numbers of something else
        for number in [] if is_whole else sorted(set(range(first, first + int(count))) - numbers_here):
            name = f"{match['before']}{number:0{len(count)}d}{match['of']}{count}{match['after']}"
            if fnmatch.fnmatchcase(name, pattern):
                hint = "get the file again, or name the others by a pattern that does not match it: x-0000[02]*"
                raise DataError(f"{name} is missing beside {path.name}", where=path.parent, hint=hint)


def is_data(path: Path) -> bool:
    """Return whether a file in a folder is data by its name."""
    packed = path.suffix.lower() in COMPRESSIONS
    name = path.name.removesuffix(path.suffix) if packed else path.name
    return format_of(path) is not None and name not in METADATA and not _CACHE.fullmatch(path.name)


def _expand(walk: _Walk, folder: Path, parts: tuple[str, ...]) -> None:
    """Add the files below `folder` that match the remaining parts of a pattern. Each pair of folder and remaining
    parts is visited once, so cycles of links end."""
    if not folder.is_dir() or (_id(folder), parts) in walk.visited:
        return
    walk.visited.add((_id(folder), parts))
    part, rest = parts[0], parts[1:]
    if not MAGIC.search(part):
        _take(walk, folder / part, rest)
        return
    if part == "**" and rest:
        _expand(walk, folder, rest)
    for entry in walk.entries(folder):
        hidden = entry.name.startswith((".", "__"))
        if part == "**":
            if hidden:
                continue
            if (folder / entry.name).is_dir():
                _expand(walk, folder / entry.name, parts)
            elif not rest:
                _take(walk, folder / entry.name, rest)
        elif fnmatch.fnmatchcase(entry.name, part) and (not hidden or part[0] == entry.name[0]):
            _take(walk, folder / entry.name, rest)


def _take(walk: _Walk, path: Path, rest: tuple[str, ...]) -> None:
    if rest:
        _expand(walk, path, rest)
    elif path.is_dir():
        walk.folders += 1
    elif os.path.lexists(path) and path.name not in METADATA and not _CACHE.fullmatch(path.name):
        _check_regular(path)
        walk.found.append(DataFile(path))


def _is_ours(folder: Path) -> bool:
    """Return whether `cloze prepare` made the folder, or is making it."""
    names = ("manifest.json", "plan.json")
    return (folder / "tokenizer").is_dir() and any((folder / name).is_file() for name in names)


def _check_regular(path: Path) -> None:
    """Raise DataError unless a path is a regular file or a link to one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        what = "a link that leads nowhere" if path.is_symlink() else f"cannot be read ({error.strerror})"
        raise DataError(what, where=path, hint="put the file back, or delete the link") from None
    if not stat.S_ISREG(mode):
        raise DataError(
            "is no regular file",
            where=path,
            hint="remove it, or name the data files by a pattern that does not match it",
        )


def _saved_files(folder: Path, split: str | None) -> list[DataFile] | None:
    """Return the files that state.json of `save_to_disk` lists; None if the folder is no saved dataset."""
    state = read_mapping(folder / "state.json")
    listed = state.get("_data_files")
    if not isinstance(listed, list):
        return None
    if state.get("_indices_data_files"):
        hint = "open it with the version of `datasets` that wrote it, call flatten_indices(), and save it again"
        raise DataError("saved with a separate list of row numbers", where=folder / "state.json", hint=hint)
    found = []
    for item in listed:
        name = item.get("filename") if isinstance(item, dict) else None
        if not is_plain_name(name):
            raise DataError("lists something that is no file name", where=folder / "state.json", hint="save it again")
        if not (folder / str(name)).is_file():
            raise DataError(f"lists {name}, which is missing", where=folder / "state.json", hint="get the file again")
        found.append(DataFile(folder / str(name), split or _name_or_none(state.get("_split"))))
    return found


def _saved_splits(folder: Path) -> list[str]:
    """Return the splits that dataset_dict.json of `save_to_disk` names, each a folder."""
    names = read_mapping(folder / "dataset_dict.json").get("splits")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _name_or_none(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _id(path: Path) -> _Id:
    """Return the identity of a file or folder, independent of links. Raises DataError if it is gone."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror})", where=path, hint="check the path and its permissions"
        ) from None
    return status.st_dev, status.st_ino
