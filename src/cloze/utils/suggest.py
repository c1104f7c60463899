"""Suggest a known name for an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 100  # characters of a word that are compared: it may be a whole file
_MOST_MISSING = 2  # letters at the end of a word that may be wrong: `adamm` for `adamw_torch`


def suggestion(word: str, names: Iterable[str]) -> str | None:
    """Return `did you mean NAME?` for the closest of `names`; None if no name is close."""
    word, known = word[:_LONGEST].lower(), list(names)
    close = difflib.get_close_matches(word, known, n=1)
    if not close:
        begin = word[: max(3, len(word) - _MOST_MISSING)]
        close = [name for name in known if len(word) >= 3 and name.startswith(begin)]
    return f"did you mean {close[0]}?" if close else None
