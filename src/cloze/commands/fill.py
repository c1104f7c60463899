"""`cloze fill`: show what a model puts in place of the mask."""

from __future__ import annotations

from cloze.config import FillConfig
from cloze.fill import MASK_SPELLINGS, fill


def run(config: FillConfig) -> None:
    """Print the answers for each mask, the most likely first."""
    answers = fill(config.model, config.text, config.top_k, config.trust_remote_code)
    for number, candidates in enumerate(answers, 1):
        if len(answers) > 1:
            print(f"mask {number}:")
        for word, probability in candidates:
            sentence = config.text
            if len(answers) == 1:
                for spelling in MASK_SPELLINGS:
                    sentence = sentence.replace(spelling, word)
            print(f"{probability:7.2%}  {word:<16}  {sentence if len(answers) == 1 else ''}".rstrip())
