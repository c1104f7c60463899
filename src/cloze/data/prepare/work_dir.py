"""The folder of unfinished work, OUTPUT.parts, and the check that resumed work has the same settings.

OUTPUT.parts/
  plan.json        corpus and settings, which must be equal if the work is resumed
  tokenizer/
  units/           see cloze.data.prepare.unit
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cloze.data.prepare.unit import process_name
from cloze.errors import ConfigError, DataError
from cloze.utils.atomic_files import disk_errors, remove_tree, sync_tree, write_json
from cloze.utils.foreign.json_yaml import read_json

_NOT_COMPARED = (
    "cloze_version",
    "format_version",
    "checksum",
    "splits",
    "bad_records",
    "bad_record_examples",
    "text_report",
    "tokenizer_files",
)


def read_plan(parts: Path) -> dict[str, Any] | None:
    """Return the plan of a folder of parts; None without a plan. Raises DataError."""
    if not (parts / "plan.json").exists():
        return None
    try:
        return dict(read_json(parts / "plan.json"))
    except DataError:
        raise DataError("damaged", where=parts / "plan.json", hint=f"delete {parts} and begin again") from None


def open_parts(parts: Path, facts: dict[str, Any], tokenizer: Any) -> None:
    """Begin or resume the work. Raises ConfigError if it was begun with another corpus or other settings."""
    begun = read_plan(parts)
    if begun is not None:
        refuse_differences(parts, begun, facts)
        _remove_leftovers(parts)
    with disk_errors(parts):
        (parts / "units").mkdir(parents=True, exist_ok=True)
        if begun is None:
            _write_plan(parts, facts)
        if not (parts / "tokenizer").is_dir():
            staged = parts / f"tokenizer-{process_name()}"
            tokenizer.save_pretrained(staged)
            sync_tree(staged)
            try:
                os.rename(staged, parts / "tokenizer")
            except OSError:  # another shard was quicker
                remove_tree(staged, quietly=True)
                if not (parts / "tokenizer").is_dir():
                    raise


def _write_plan(parts: Path, facts: dict[str, Any]) -> None:
    """Write plan.json unless another process was quicker; then its plan must be the same."""
    staged = parts / f"plan-{process_name()}.json"
    write_json(staged, facts)
    try:
        os.link(staged, parts / "plan.json")
    except FileExistsError:
        refuse_differences(parts, read_plan(parts) or {}, facts)
    except OSError:  # no hard links here
        os.rename(staged, parts / "plan.json")
    staged.unlink(missing_ok=True)


def _remove_leftovers(parts: Path) -> None:
    """Remove temporary files of killed processes of this machine."""
    for folder in [*parts.glob("units/tmp-*"), *parts.glob("joined-*"), *parts.glob("tokenizer-*")]:
        words = folder.name.split("-")
        host, pid = "-".join(words[1:-3] if words[0] == "tmp" else words[1:-1]), words[-3 if words[0] == "tmp" else -1]
        if host == process_name().rsplit("-", 1)[0] and pid.isdigit() and not _is_alive(int(pid)):
            remove_tree(folder, quietly=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def refuse_differences(folder: Path, before: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise ConfigError naming the differences between a folder's corpus and settings and the requested ones."""
    old, new = dict(_flat(before)), dict(_flat(facts))
    old.pop("tokenizer.name", None), new.pop("tokenizer.name", None)
    differences = [
        f"{key} {_short(old.get(key))} -> {_short(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not (key.endswith(".content") and key not in old)  # of an older version
    ]
    if differences:
        raise ConfigError(
            f"was made from something else ({'; '.join(differences)})",
            where=folder,
            hint="choose another --output, or delete it",
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a manifest by their dotted names: `{"a": {"b": 1}}` -> ("a.b", 1)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if name or key not in _NOT_COMPARED:
                yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        seen: dict[object, int] = {}
        for number, inner in enumerate(value):
            own = inner.get("name", number)
            seen[own] = seen.get(own, 0) + 1  # files of two folders may share a name
            yield from _flat(inner, f"{name}.{own}" + (f" ({seen[own]})" if seen[own] > 1 else ""))
    else:
        yield name, value


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:24]}..."
