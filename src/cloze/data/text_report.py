"""What was found in the text of a corpus, as manifest.json says it under `text_report`, in words.

report_lines(report)                # {"train": "1 file, 0.0 % unknown tokens, ..."}
warnings_of(report)                 # ["train: 12.0 % of the tokens are unknown to the tokenizer; ..."]

The values are measured by `cloze.data.text_sketch`. A folder of an older version has none. Imports nothing.
"""

from __future__ import annotations

from typing import Any

# A warning is given above these shares, and above this mean length of a word in characters (the lower one for text
# that is written without spaces between words).
LIMITS = {
    "unknown_tokens": 0.02,
    "lost_characters": 0.02,
    "empty_documents": 0.1,
    "repeated_documents": 0.1,
    "validation_in_train": 0.01,
}
MAX_WORD_CHARACTERS, MAX_WORD_CHARACTERS_UNSPACED = 20.0, 6.0
_WORDS = {
    "unknown_tokens": "of the tokens are unknown to the tokenizer",
    "lost_characters": "of the characters are lost in the tokenizer",
    "empty_documents": "of the documents are empty",
    "repeated_documents": "of the documents repeat another one",
    "validation_in_train": "of the validation documents are training documents, too",
}
_HINTS = {
    "unknown_tokens": "another tokenizer fits this text better",
    "lost_characters": "another tokenizer keeps them, or one without lower case and stripped accents",
    "empty_documents": "check --text_field",
    "repeated_documents": "was a file copied, or a corpus joined with itself?",
    "validation_in_train": "perplexity will look better than it is: remove repeated documents",
}


def report_lines(report: dict[str, Any]) -> dict[str, str]:
    """Return a line for each split of a report: `0.1 % unknown tokens, ...`."""
    lines = {}
    for side, found in report.items():
        if not isinstance(found, dict):
            continue
        files = found.get("files")
        shares = [f"{files:,} {'file' if files == 1 else 'files'}"] if isinstance(files, int) else []
        shares += [
            f"{_percent(found.get(name))} {name.replace('_', ' ')}"
            for name in _WORDS
            if isinstance(found.get(name), int | float)
        ]
        if isinstance(word := found.get("word"), dict):
            shares.append(f"a word is {word.get('tokens')} tokens, {word.get('characters')} characters")
        lines[side] = ", ".join(shares)
    if isinstance(report.get("validation_in_train"), int | float):
        lines["validation"] = f"{lines.get('validation', '')}, {_percent(report['validation_in_train'])} in train, too"
    return lines


def warnings_of(report: dict[str, Any]) -> list[str]:
    """Return a sentence for every value above its limit."""
    lines = []
    for side, found in report.items():
        values = found if isinstance(found, dict) else {side: found}
        for name, limit in LIMITS.items():
            if isinstance(values.get(name), int | float) and values[name] > limit:
                front = f"{side}: " if isinstance(found, dict) else ""
                lines.append(f"{front}{_percent(values[name])} {_WORDS[name]}; {_HINTS[name]}")
        word = values.get("word")
        length = word.get("characters") if isinstance(word, dict) else None
        spaced = word.get("has_spaces", True) if isinstance(word, dict) else True
        limit = MAX_WORD_CHARACTERS if spaced else MAX_WORD_CHARACTERS_UNSPACED
        if isinstance(length, int | float) and length > limit:
            what = f"{side}: what the tokenizer takes for a word has {length:g} characters"
            lines.append(f"{what}; --mask_unit word and span would mask whole sentences")
    return lines


def _percent(share: Any) -> str:
    value = 100 * float(share)
    return f"{value:.1f} %" if value >= 0.05 or value == 0 else "below 0.1 %"
