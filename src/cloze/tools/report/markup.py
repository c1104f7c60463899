"""Pieces of HTML. Whatever is not an `Html` already is a text, and is escaped.

table(["run", "loss"], [["a<b", 1.25]])     # an Html
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

PALETTE = 8  # colours of style.css


class Html(str):
    """A text that is HTML already."""

    __slots__ = ()


def text(value: Any) -> Html:
    """Return a value as HTML: escaped unless it is HTML."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def element(name: str, content: Any, **attributes: str) -> Html:
    """Return `<name class="...">content</name>`; `class_` sets `class`."""
    rendered = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{rendered}>{text(content)}</{name}>")


def joined(parts: Iterable[Any]) -> Html:
    """Return the pieces joined."""
    return Html("".join(text(one) for one in parts))


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]], numbers: Iterable[int] = (), class_: str = "") -> Html:
    """Return a table that scrolls in its own box if it is too wide. The first cell of a row names it; `numbers`:
    columns that are set to the right. No head: facts by name."""
    right = set(numbers)

    def cell(at: int, value: Any, is_head: bool) -> Html:
        shown = Html("") if value is None else text(value)
        scope = ' scope="col"' if is_head else ' scope="row"' if at == 0 else ""
        name = "th" if is_head or at == 0 else "td"
        return Html(f"<{name}{scope}{' class=number' if at in right else ''}>{shown}</{name}>")

    top = element("tr", joined(cell(at, one, True) for at, one in enumerate(head))) if head else Html("")
    body = joined(element("tr", joined(cell(at, one, False) for at, one in enumerate(row))) for row in rows)
    inner = joined([element("thead", top) if head else "", element("tbody", body)])
    whole = element("table", inner, **({"class_": class_} if class_ else {}))
    return Html(f'<div class="scroll" tabindex="0" role="region" aria-label="table">{whole}</div>')


def facts(values: dict[str, Any]) -> Html:
    """Return a table of the facts that are known; empty if nothing is known."""
    rows = [[name, value] for name, value in values.items() if value is not None]
    return table([], rows, class_="facts") if rows else Html("")


def section(title: str, *parts: Any) -> Html:
    """Return a section with its heading; empty without content."""
    shown = [one for one in parts if one]
    return element("section", joined([element("h2", title), *shown])) if shown else Html("")


def note(words: Any) -> Html:
    """Return a remark below a heading or a table."""
    return element("p", words, class_="note")


def colour(run: int) -> str:
    """Return the class of style.css for the colour of a run."""
    return f"r{run % PALETTE}"


def key(run: int, name: str, several: bool) -> Html:
    """Return a run's name, with a dot in its colour if there are several."""
    if not several:
        return text(name)
    return element("span", joined([Html(f'<i class="key {colour(run)}"></i>'), name]), class_="name")


def number(value: float | None, digits: int = 4) -> str | None:
    """Return a number with `digits` significant digits and thousands separators: `1,234`, `4.052`, `2e-05`."""
    if value is None:
        return None
    if isinstance(value, int) or (abs(value) >= 10 ** (digits - 1) and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}" if abs(value) >= 1e-3 else f"{value:.{digits}g}"


def size(num_bytes: float) -> str:
    """Return a number of bytes in words: `12.4 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def short(value: float | None) -> str | None:
    """Return a count for a headline: `953`, `12.4k`, `2.46M`."""
    if value is None:
        return None
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= factor:
            return f"{value / (1e3 if unit == 'k' else factor):.3g}{unit}"
    return f"{value:,.0f}"
