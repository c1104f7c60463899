"""JSON and YAML: the one place that parses them, and that makes JSON.

    read_json(folder / "config.json")              # a dict; DataError in one line for anything else
    parse_json(line, where="pipe", kind=list)
    read_yaml("recipe.yaml", typed=True)           # no aliases, no tags
    read_mapping(run / "eval.json")                # {} if it is missing or not readable
    dump_json({"loss": float("nan")})              # '{"loss": null}'

PyYAML's events are checked before objects are made: an alias can multiply (a file of 1 kB stands for 10^9 values), and
a tag can name a class. PyYAML reads YAML 1.1, in which `010` is 8, `1:30` is 90 and `no` is false: in what the user
wrote for Cloze such spellings are refused. PyYAML is imported in the functions that need it, so that help starts fast.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloze.errors import ClozeError, DataError
from cloze.utils.foreign.lenient_read import is_number
from cloze.utils.foreign.paths import printable, read_bytes, read_text

MAX_JSON_BYTES = 64 << 20
MAX_YAML_BYTES = 1 << 18
MAX_JSON_DEPTH = 64
MAX_YAML_DEPTH = 20
on_left_out: list[Callable[[str], None]] = []  # called by `left_out`; see cloze.utils.terminal.console
_reported: set[str] = set()
# Plain words that YAML 1.1 and YAML 1.2 read as different values.
UNCLEAR = re.compile(
    r"[-+]?(0[0-9_]+|0o[0-7_]+|0b[01_]+|0x[0-9a-f]*_[0-9a-f_]*|(?=[0-9._]*_)\.?[0-9][0-9._]*(e[-+]?[0-9]+)?"
    r"|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)|yes|no|on|off",
    re.IGNORECASE,
)
_KINDS = {dict: "a JSON object", list: "a JSON array", object: "JSON"}


def read_json(
    path: Path | str,
    *,
    kind: type = dict,
    max_bytes: int = MAX_JSON_BYTES,
    max_depth: int = MAX_JSON_DEPTH,
    folder: Path | str | None = None,
    typed: bool = False,
    error: type[ClozeError] = DataError,
) -> Any:
    """Return the value of a JSON file, an instance of `kind`. Raises `error` if it cannot be read or is not one.

    `folder`, `typed`: see `paths.open_regular` and `parse_json`.
    """
    content = read_bytes(path, max_bytes, folder=folder, typed=typed, error=error)
    return parse_json(content, os.fspath(path), kind=kind, max_depth=max_depth, typed=typed, error=error)


def parse_json(
    content: bytes | str,
    where: object,
    *,
    kind: type = dict,
    max_depth: int = MAX_JSON_DEPTH,
    typed: bool = False,
    error: type[ClozeError] = DataError,
) -> Any:
    """Return the value of a JSON text; NaN and Infinity, which JSON does not have, as None. Raises `error`.

    `typed`: a user wrote it, so that a name given twice is an error, and NaN and Infinity are kept to be refused.
    """
    where = printable(str(where))
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        if typed:
            value = json.loads(text, object_pairs_hook=_unique)
        else:
            value = json.loads(text, parse_constant=lambda _: None)
    except RecursionError:
        raise error(f"is nested more than {max_depth} deep", where=where, hint="give the right file") from None
    except ValueError as problem:  # of JSON, UTF-8, and numbers of more than 4,300 digits
        raise error(f"not JSON ({printable(str(problem))})", where=where, hint="give the right file") from None
    if text.count("[") + text.count("{") > max_depth and is_deeper(value, max_depth):
        raise error(f"is nested more than {max_depth} deep", where=where, hint="give the right file")
    if not isinstance(value, kind):
        raise error(f"not {_KINDS.get(kind, 'the JSON expected')}", where=where, hint="give the right file")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise ValueError(f"it gives {twice} twice")
    return dict(pairs)


def is_deeper(value: Any, limit: int) -> bool:
    """Return whether lists and mappings are nested more than `limit` deep in a value."""
    level = [value]
    for _ in range(limit + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        level = [one for box in level for one in (box.values() if isinstance(box, dict) else box)]
    return bool(level)


def read_json_lines(
    path: Path | str, number: str, max_bytes: int = 16 << 30, error: type[ClozeError] = DataError
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the JSON objects of a file of lines, and the line numbers, from 1, of those that are damaged: no objects
    with a number named `number`. They are reported. A last line without its end is being written, and is left out.
    Raises `error` if the file cannot be read."""
    lines: list[dict[str, Any]] = []
    damaged: list[int] = []
    for place, text in enumerate(read_bytes(path, max_bytes, error=error).split(b"\n")[:-1], 1):
        if not text.strip():
            continue
        try:
            line = parse_json(text, path)
        except DataError:
            line = {}
        if is_number(line.get(number)):
            lines.append(line)
        else:
            damaged.append(place)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + ", ..." * (len(damaged) > 5)
        which = f"line {shown} is" if len(damaged) == 1 else f"lines {shown} are"
        left_out(f"{printable(os.fspath(path))}: {which} damaged and left out")
    return lines, damaged


def read_yaml(
    path: Path | str,
    *,
    kind: type = dict,
    max_bytes: int = MAX_YAML_BYTES,
    folder: Path | str | None = None,
    typed: bool = False,
    error: type[ClozeError] = DataError,
) -> Any:
    """Return the value of a YAML file without aliases and tags, an instance of `kind`. Raises `error`."""
    text = read_text(path, max_bytes, folder=folder, typed=typed, error=error)
    return parse_yaml(text, os.fspath(path), kind=kind, typed=typed, error=error)


def parse_yaml(
    text: str, where: object, *, kind: type = dict, typed: bool = False, error: type[ClozeError] = DataError
) -> Any:
    """Return the value of a YAML text without aliases and tags. Raises `error` if it is not a `kind`.

    `typed`: the user wrote it for Cloze, so that words that are UNCLEAR are refused.
    """
    import yaml

    try:
        check_events(text, where, error, typed)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as problem:
        raise error(f"not YAML ({yaml_problem(problem)})", where=printable(str(where)), hint="correct it") from None
    if not isinstance(value, kind):
        raise error("holds no names with values", where=printable(str(where)), hint="write `name: value` lines")
    return value


def yaml_names(text: str, where: object, error: type[ClozeError] = DataError) -> list[str]:
    """Return the names of a mapping in YAML that the user wrote, each given once. Raises `error`."""
    import yaml

    try:
        check_events(text, where, error, typed=True)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as problem:
        raise error(f"not YAML ({yaml_problem(problem)})", where=printable(str(where)), hint="correct it") from None
    if not isinstance(node, yaml.MappingNode):
        raise error("holds no names with values", where=printable(str(where)), hint="write `name: value` lines")
    names: list[str] = []
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise error("a name is not plain text", where=printable(str(where)), hint="write `name: value` lines")
        if key.value in names:
            raise error(f"gives {printable(key.value)} twice", where=printable(str(where)), hint="leave one out")
        names.append(key.value)
    return names


def check_events(text: str, where: object, error: type[ClozeError] = DataError, typed: bool = False) -> None:
    """Raise `error` for an alias, a tag, values nested too deeply, and if `typed` for words that are UNCLEAR;
    yaml.YAMLError if it is not YAML."""
    import yaml

    where, depth = printable(str(where)), 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise error(f"uses the alias *{printable(event.anchor)}", where=where, hint="write the value out")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise error(f"uses the tag {printable(tag)}", where=where, hint="leave it out")
        if typed and isinstance(event, yaml.ScalarEvent) and event.implicit[0] and UNCLEAR.fullmatch(event.value):
            what = f"{printable(event.value)} in line {event.start_mark.line + 1} differs between YAML 1.1 and 1.2"
            raise error(what, where=where, hint="write a plain decimal number, true or false, or put text in quotes")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise error(f"is nested more than {MAX_YAML_DEPTH} deep", where=where, hint="write plain values")


def yaml_problem(problem: Exception) -> str:
    """Return the error of a YAML parser in one line."""
    return printable(" ".join(str(problem).replace('in "<unicode string>", ', "at ").split()))


def read_mapping(path: Path | str) -> dict[str, Any]:
    """Return the mapping of a JSON or YAML file; empty if there is no such file, or, with a warning, if it cannot be
    read."""
    try:
        return dict(read_json(path) if str(path).endswith(".json") else read_yaml(path))
    except ClozeError as error:
        if os.path.lexists(path):
            left_out(f"{error.where}: {error.what}; it is left out")
        return {}


def left_out(line: str) -> None:
    """Report damaged content that a reader leaves out, once per process."""
    if line not in _reported:
        _reported.add(line)
        for report in on_left_out:
            report(line)


def dump_json(value: Any, **style: Any) -> str:
    """Return a value as JSON text (`style`: of json.dumps). Numbers that are not finite become null, which every
    reader of JSON takes."""
    style = {"ensure_ascii": False, **style}
    try:
        return json.dumps(value, allow_nan=False, **style)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **style)


def finite(value: Any) -> Any:
    """Return a value, also inside lists and mappings, with None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value
