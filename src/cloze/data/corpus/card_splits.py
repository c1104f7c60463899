"""The splits that the README.md of a dataset's folder names, as in a clone of a repository of the Hub.

    card_splits(Path("clone"), None)    # {"train": ["data/a-*.parquet"], "test": ["data/b.parquet"]}

`configs` at its top (https://huggingface.co/docs/hub/datasets-manual-configuration) comes before the names of files,
as in `datasets`: files that it does not name are no data.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from cloze.errors import DataError
from cloze.utils.foreign.json_yaml import parse_yaml
from cloze.utils.foreign.paths import read_bytes

_MAX_CARD_BYTES = 16 * 2**20


def card_splits(folder: Path, config_name: str | None) -> dict[str, list[str]] | None:
    """Return the glob patterns of each split, relative to the folder; None if README.md names no files.

    Raises DataError if it has no such configuration, or several and none is named, or cannot be understood.
    """
    card = folder / "README.md"
    configs = _configs(card)
    by_name = {str(one.get("config_name", "default")): one for one in configs}
    if not any("data_files" in one or "data_dir" in one for one in configs):
        return None
    names = ", ".join(by_name)
    if config_name is not None and config_name not in by_name:
        raise DataError(f"no configuration {config_name!r}", where=card, hint=f"the configurations are: {names}")
    default = next((name for name, one in by_name.items() if one.get("default") is True), "default")
    chosen = config_name or (default if default in by_name else next(iter(by_name)))
    if config_name is None and len(by_name) > 1 and chosen != default:
        raise DataError(
            f"{len(by_name)} configurations: {names}", where=card, hint="choose one with --dataset_config_name"
        )
    config = by_name[chosen]
    if "data_files" not in config:
        hint = f"give the name of its folder, {config.get('data_dir')}" if "data_dir" in config else "correct it"
        raise DataError(f"the configuration {chosen!r} names no data_files", where=card, hint=hint)
    return _patterns(config["data_files"], str(config.get("data_dir") or ""), card)


def _configs(card: Path) -> list[dict[str, Any]]:
    if not os.path.isfile(card):
        return []
    lines = read_bytes(card, _MAX_CARD_BYTES).decode("utf-8-sig", "replace").split("\n")
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), 0)
    if lines[0].rstrip() != "---" or not any(line.startswith("configs") for line in lines[:end]):
        return []
    configs = parse_yaml("\n".join(lines[1:end]), card).get("configs")
    if isinstance(configs, list) and all(isinstance(one, dict) for one in configs):
        return configs
    raise DataError("its `configs` are no list of configurations", where=card, hint="correct it")


def _patterns(data_files: Any, data_dir: str, card: Path) -> dict[str, list[str]]:
    """Return the patterns of each split. Without a split, files are training data."""
    if isinstance(data_files, dict):
        pairs = list(data_files.items())
    elif isinstance(data_files, list) and all(isinstance(one, dict) for one in data_files):
        pairs = [(one.get("split", "train"), one.get("path")) for one in data_files]
    else:
        pairs = [("train", data_files)]
    found: dict[str, list[str]] = {}
    for split, paths in pairs:
        for path in paths if isinstance(paths, list) else [paths]:
            whole = PurePosixPath(data_dir, path) if isinstance(path, str) and path else None
            if whole is None or "://" in path or not _is_inside(whole):
                what = f"names {path!r} as a file of {split}"
                raise DataError(what, where=card, hint="it may name files in its folder only; correct it")
            found.setdefault(str(split), []).append(str(whole))
    return found


def _is_inside(path: PurePosixPath) -> bool:
    return ".." not in path.parts and not path.is_absolute() and "\\" not in str(path)
