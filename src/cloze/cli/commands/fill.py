"""`cloze fill`: show what a model puts in place of the mask."""

from __future__ import annotations

import re

from cloze.config import FillConfig
from cloze.evaluation.fill_mask import MASK_SPELLINGS, fill
from cloze.evaluation.results import Answer
from cloze.utils.terminal.console import show


def run(config: FillConfig) -> None:
    """Print the answers for each mask, the most likely first."""
    masks = answers(config)
    for number, candidates in enumerate(masks, 1):
        if len(masks) > 1:
            show(f"mask {number}:")
        for score, token, text in candidates:
            show(f"{score:7.2%}  {token:<16}  {text if len(masks) == 1 else ''}".rstrip())


def answers(config: FillConfig) -> list[list[Answer]]:
    """For each mask in the text the answers, the most likely first."""
    found = fill(config.model, config.text, config.top_k, config.trust_remote_code)
    return [
        [Answer(score, token, _put(token, number, config.text)) for token, score in candidates]
        for number, candidates in enumerate(found)
    ]


def _put(token: str, number: int, text: str) -> str:
    """The text with a token in place of its mask `number`, counted from 0; as it is where the mask is spelled in a
    way of the tokenizer's own."""
    masks = list(re.finditer("|".join(map(re.escape, MASK_SPELLINGS)), text))
    if number >= len(masks):
        return text
    return text[: masks[number].start()] + token + text[masks[number].end() :]
