"""Escape foreign text for the Markdown of a card.

in_table("a|b <b>")                     # a\\|b &lt;b>
quoted('say "hi"')                      # "say \\"hi\\"", as Python writes it
fenced("echo", "sh")                    # a block of code that its text cannot end
"""

from __future__ import annotations

import re
from typing import Any

from cloze.utils.foreign.json_yaml import dump_json
from cloze.utils.foreign.paths import visible

_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")


def in_table(value: Any) -> str:
    """Return a value for a cell of a table: in one line, without HTML, links and control characters."""
    text = visible(" ".join(str(value).split()))
    return text.replace("|", r"\|").replace("<", "&lt;").replace("](", r"]\(")


def quoted(text: str) -> str:
    """Return a text as Python code of one line, in double quotes."""
    return dump_json(visible(text))


def fenced(text: str, language: str) -> str:
    """Return a block of code; its fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{visible(text)}\n{fence}"


def class_name(value: Any) -> str | None:
    """Return the name of a class or of an architecture, or the first of a list; None if it is not one."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, str) and _CLASS.fullmatch(first) else None


def sessions_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of sessions.json that are mappings."""
    found = values.get("sessions")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
