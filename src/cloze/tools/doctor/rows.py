"""A row of the doctor's table, and what all judgements share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Findings = dict[str, Any]
State = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Row:
    """One line of the table: check, state, finding and remedy."""

    check: str
    state: State
    found: str
    todo: str = ""


def hosts_of(findings: Findings) -> dict[str, list[dict[str, Any]]]:
    """Return host -> facts of its ranks, in order of rank."""
    found: dict[str, list[dict[str, Any]]] = {}
    for facts in findings["ranks"]:
        found.setdefault(facts["host"], []).append(facts)
    return found


def naming(hosts: Sequence[str], most: int = 4) -> str:
    """Return names in words: `node1, node2 and 14 more`"""
    names = list(dict.fromkeys(hosts))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def count(number: int, thing: str) -> str:
    """Return a number with its noun: `1 rank`, `2 ranks`"""
    return f"{number} {thing}{'s' * (number != 1)}"


def by_value(findings: Findings, value: Callable[[dict[str, Any]], Any]) -> dict[Any, list[str]]:
    """Return each value that occurs -> the hosts that have it, the most frequent value first."""
    found: dict[Any, list[str]] = {}
    for facts in findings["ranks"]:
        found.setdefault(value(facts), []).append(facts["host"])
    return dict(sorted(found.items(), key=lambda one: -len(one[1])))
