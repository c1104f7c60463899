"""README and the pages of docs: their text, commands, links and headings.

pages()                                  # README.md first, then docs/*.md in the order of README's table
commands(pages()[0])                     # [["cloze", "tokenizer", ...], ...]
links("See [data](docs/data.md#corpora).")           # ["docs/data.md#corpora"]
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from repository import ROOT


def pages() -> list[Path]:
    """Return README.md and the pages of docs in the order in which README links to them; a page that README does not
    name comes last."""
    readme = ROOT / "README.md"
    named = [ROOT / link.partition("#")[0] for link in links(readme.read_text(encoding="utf-8"))]
    docs = sorted((ROOT / "docs").glob("*.md"))
    order = {path: number for number, path in reversed(list(enumerate(named)))}
    table = readme.read_text(encoding="utf-8").partition("## Documentation")[2]
    order |= {ROOT / link: number for number, link in reversed(list(enumerate(links(table))))}
    return [readme, *sorted(docs, key=lambda path: order.get(path, len(order)))]


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: Path, language: str = "sh") -> list[list[str]]:
    """Return the words of each command in the shell blocks of a page, in order."""
    lines = "\n".join(blocks(page.read_text(encoding="utf-8"), language)).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


def without_blocks(text: str) -> str:
    """Return a text without its code blocks and its inline code."""
    return re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def links(text: str) -> list[str]:
    """Return the targets of the links and pictures of a page that are not addresses of the web."""
    found = re.findall(r"\]\(([^()\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
