"""Describe the findings in the text of a corpus, which manifest.json holds under `text_report`.

report_lines(report)                # {"train": "1 file, 0.0 % unknown tokens, ..."}
warnings_of(report)                 # ["train: 12.0 % of the tokens are unknown to the tokenizer; ..."]

The values are measured by `cloze.data.prepare.text_sketch`. A folder of an older version has no report. The checksum
of a folder does not cover the report, so its values may be anything: those that are not numbers are ignored.
"""

from __future__ import annotations

from typing import Any

from cloze.utils.foreign.lenient_read import is_number, part

# A warning is given above these shares, and above this mean length of a word in characters.
LIMITS = {
    "unknown_tokens": 0.02,
    "lost_characters": 0.02,
    "empty_documents": 0.1,
    "repeated_documents": 0.1,
    "validation_in_train": 0.01,
}
SPLITS = ("train", "validation")
MAX_WORD_CHARACTERS = 20.0
_WORDS = {
    "unknown_tokens": "of the tokens are unknown to the tokenizer",
    "lost_characters": "of the characters are lost in the tokenizer",
    "empty_documents": "of the documents are empty",
    "repeated_documents": "of the documents repeat another one",
    "validation_in_train": "of the validation documents are training documents, too",
}
_LONG_WORDS = (
    "words above max_input_chars_per_word are unknown to WordPiece, whatever their letters: use a tokenizer of "
    "another kind (bpe, unigram), or cut the words"
)
_HINTS = {
    "unknown_tokens": "another tokenizer fits this text better",
    "lost_characters": "another tokenizer keeps them, or one without lower case and stripped accents, or "
    "--split_special_tokens if the text spells special tokens",
    "empty_documents": "check --text_field",
    "repeated_documents": "was a file copied, or a corpus joined with itself?",
    "validation_in_train": "perplexity looks better than it is: remove repeated documents, and overlap of the splits",
}


def report_lines(report: Any) -> dict[str, str]:
    """Return a line for each split of a report: `0.1 % unknown tokens, ...`."""
    lines = {}
    for side, found in _sides(report):
        files = found.get("files")
        shares = [f"{files:,} {'file' if files == 1 else 'files'}"] if is_number(files) else []
        known = [name for name in _WORDS if is_number(found.get(name))]
        shares += [f"{_percent(found[name])} {name.replace('_', ' ')}" for name in known]
        word = part(found, "word")
        if is_number(word.get("tokens")) and is_number(word.get("characters")):
            shares.append(f"a word is {word['tokens']} tokens, {word['characters']} characters")
        if shares:
            lines[side] = ", ".join(shares)
    if is_number(share := _mapping(report).get("validation_in_train")):
        lines["validation"] = f"{lines.get('validation', '')}, {_percent(share)} in train, too"
    return lines


def warnings_of(report: Any) -> list[str]:
    """Return a sentence for every value above its limit."""
    lines = []
    for side, values in [*_sides(report), ("", _mapping(report))]:
        for name, limit in LIMITS.items():
            if is_number(values.get(name)) and values[name] > limit:
                front = f"{side}: " if side else ""
                long = name == "unknown_tokens" and is_number(values.get("long_words"))
                hint = _LONG_WORDS if long and values["long_words"] > values[name] / 2 else _HINTS[name]
                lines.append(f"{front}{_percent(values[name])} {_WORDS[name]}; {hint}")
        length = part(values, "word").get("characters") if side else None
        if is_number(length) and length > MAX_WORD_CHARACTERS:
            what = f"{side}: what the tokenizer takes for a word has {length:g} characters"
            lines.append(f"{what}; --mask_unit word and span would mask whole sentences")
    return lines


def _mapping(report: Any) -> dict[str, Any]:
    return report if isinstance(report, dict) else {}


def _sides(report: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the splits of a report that Cloze writes, with what is said of each."""
    return [(side, values) for side in SPLITS if (values := part(_mapping(report), side))]


def _percent(share: Any) -> str:
    value = 100 * float(share)
    return f"{value:.1f} %" if value >= 0.05 or value == 0 else "below 0.1 %"
