"""`cloze fill`: show what a model puts in place of the mask."""

from __future__ import annotations

from cloze.config import FillConfig
from cloze.evaluation.fill_mask import answers
from cloze.utils.terminal.console import show


def run(config: FillConfig) -> None:
    """Print the answers for each mask, the most likely first."""
    masks = answers(config)
    for number, candidates in enumerate(masks, 1):
        if len(masks) > 1:
            show(f"mask {number}:")
        for score, token, text in candidates:
            show(f"{score:7.2%}  {token:<16}  {text if len(masks) == 1 else ''}".rstrip())
