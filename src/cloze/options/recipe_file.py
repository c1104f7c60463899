"""The YAML of a --config file, looked at before it is read: names and values, and nothing that could do more.

    check_recipe("recipe.yaml")     # ["seed", "output_dir"], the names in it; or ConfigError

The parser's events come first, which make no objects: so tags are never followed, aliases never multiplied (a file of
1 kB can stand for 10^9 values), and depth costs no stack. PyYAML is imported where it is needed: help does without.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from cloze.errors import ConfigError

MAX_BYTES = 1 << 18
MAX_DEPTH = 20


def check_recipe(path: str) -> list[str]:
    """The names that a file sets. Raises ConfigError where it cannot be read or is not a YAML mapping of names, each
    given once, to plain values."""
    import yaml

    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot be read ({why})", where=printable(path), hint="give a YAML file") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"is larger than {MAX_BYTES >> 10} KiB", where=printable(path), hint="give a YAML file")
    try:
        return check_yaml(content.decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 at byte {error.start}", where=printable(path), hint="save it as UTF-8") from None
    except yaml.YAMLError as error:
        line = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigError(f"not YAML ({line})", where=printable(path), hint="mend it there") from None


def check_yaml(text: str, where: str) -> list[str]:
    """The names of a mapping in YAML. Raises ConfigError, or yaml.YAMLError."""
    import yaml

    check_events(text, where)
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("holds no names with values", where=printable(where), hint="write `name: value` lines")
    names: list[str] = []
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError("a name is not plain text", where=printable(where), hint="write `name: value` lines")
        if key.value in names:
            raise ConfigError(f"gives {printable(key.value)} twice", where=printable(where), hint="leave one out")
        names.append(key.value)
    return names


def check_events(text: str, where: str) -> None:
    """Raises ConfigError for an alias, a tag, or values nested too deeply; yaml.YAMLError."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"uses the alias *{event.anchor}", where=printable(where), hint="write the value out")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ConfigError(f"uses the tag {printable(tag)}", where=printable(where), hint="leave it out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(
                f"is nested more than {MAX_DEPTH} deep", where=printable(where), hint="write plain values"
            )


def check_flow(text: str, where: str) -> None:
    """The same for a value of the command line, which need not be YAML. Raises ConfigError."""
    import yaml

    with contextlib.suppress(yaml.YAMLError):
        check_events(text, where)


def printable(text: str) -> str:
    """A path or name as it may stand in a line on a terminal: no control characters, and not for ever."""
    shown = text if text.isprintable() else text.encode("unicode_escape", "surrogatepass").decode("ascii")
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
