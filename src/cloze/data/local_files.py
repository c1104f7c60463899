"""Which local files a dataset name means, which split each belongs to, and what tells whether one has changed."""

from __future__ import annotations

import glob
import hashlib
import re
from pathlib import Path

from cloze.data.readers import COMPRESSIONS, FORMATS, format_of
from cloze.errors import DataError

WHOLE_DIGEST_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 2**18
_SPLIT_WORDS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}


def is_local(name: str) -> bool:
    """Whether a dataset name is a path: what exists here, or looks like a file or folder, never goes to the Hub."""
    path = Path(name)
    looks_like_path = name.startswith((".", "/", "~")) or format_of(path) is not None or any(c in name for c in "*?")
    return path.exists() or looks_like_path or path.suffix.lower() in COMPRESSIONS


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
            what, where=name, hint=f"give {', '.join(FORMATS)} files (also .gz, .zst), or a Hub dataset's name"
        )
    if len(files) == 1:
        return {"train": files} if not path.is_dir() else {_split_of(files[0], path) or "train": files}
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, path) or "train", []).append(file)
    return by_split


def digest(path: Path) -> str:
    """What tells two versions of a file apart: the SHA-256 of its bytes; above 64 MiB, of 64 samples of 256 KiB.

    The samples are spread evenly and include both ends, so that a corpus of a terabyte is named in a second.
    """
    size = path.stat().st_size
    found = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= WHOLE_DIGEST_BYTES:
            while block := file.read(2**20):
                found.update(block)
            return f"sha256:{found.hexdigest()}"
        for number in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            found.update(file.read(_SAMPLE_BYTES))
    return f"sampled-sha256:{found.hexdigest()}"


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
