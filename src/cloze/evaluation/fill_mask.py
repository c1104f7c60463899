"""Fill the masks of a text.

    fill("runs/demo", "The Milky Way is a <mask> galaxy.", top_k=3)   # [[("spiral", 0.97), ...]]

For a run its newest weights are used (see cloze.checkpoint.model_path).
"""

from __future__ import annotations

import re
from typing import Any

import torch

from cloze.checkpoint.model_path import resolve_model_path
from cloze.checkpoint.open_model import load_model, open_tokenizer
from cloze.config import FillConfig
from cloze.errors import ConfigError
from cloze.evaluation.results import Answer
from cloze.model.load import check_finite, usable_length
from cloze.utils.foreign.pretrained import forward_errors

MASK_SPELLINGS = ("<mask>", "[MASK]")


def answers(config: FillConfig) -> list[list[Answer]]:
    """Return for each mask in the text the answers, the most likely first. Raises as `fill` does."""
    found = fill(config.model, config.text, config.top_k, config.trust_remote_code)
    return [
        [Answer(score, token, _put(token, number, config.text)) for token, score in candidates]
        for number, candidates in enumerate(found)
    ]


def _put(token: str, number: int, text: str) -> str:
    """Return the text with a token in place of its mask `number`, counted from 0; unchanged if the tokenizer spells
    masks in another way."""
    masks = list(re.finditer("|".join(map(re.escape, MASK_SPELLINGS)), text))
    if number >= len(masks):
        return text
    return text[: masks[number].start()] + token + text[masks[number].end() :]


def fill(name: str, text: str, top_k: int, trust_remote_code: bool = False) -> list[list[tuple[str, float]]]:
    """Return the `top_k` most likely words for each mask in `text`, with their probabilities.

    Raises ConfigError if `text` has no mask or is too long; ModelError or CheckpointError if loading fails.
    """
    found = resolve_model_path(name)
    tokenizer = open_tokenizer(found, trust_remote_code)
    inputs, rows = masked_inputs(tokenizer, text)
    return best_words(load_model(found.folder, tokenizer, trust_remote_code), tokenizer, inputs, rows, top_k)


def masked_inputs(tokenizer: Any, text: str) -> tuple[Any, torch.Tensor]:
    """Return a text as its model reads it, input_ids [1, T], and the places of its masks [M].

    Raises ConfigError if it has no mask or is too long.
    """
    for spelling in MASK_SPELLINGS:
        text = text.replace(spelling, tokenizer.mask_token)
    inputs = tokenizer(text, return_tensors="pt", verbose=False)
    rows = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().squeeze(1)
    if not len(rows):
        raise ConfigError("nothing to fill: the text has no mask", where=repr(text), hint="write <mask> in it")
    check_length(inputs, tokenizer.model_max_length)
    return inputs, rows


def check_length(inputs: Any, limit: float | None) -> None:
    """Raise ConfigError if a text has more tokens than `limit`; None if there is no limit."""
    length = inputs["input_ids"].shape[1]
    if limit is not None and length > limit:
        raise ConfigError(f"{length} tokens, but the model takes {limit}", where="text", hint="give a shorter text")


@torch.no_grad()
def best_words(
    model: Any, tokenizer: Any, inputs: Any, rows: torch.Tensor, top_k: int
) -> list[list[tuple[str, float]]]:
    """Return the `top_k` most likely words at each of `rows`, with their probabilities; see `masked_inputs`.

    Raises ConfigError if the text is longer than the model takes, whatever its tokenizer says.
    """
    check_length(inputs, usable_length(model.config))
    name = model.name_or_path or type(model).__name__
    with forward_errors(name):
        logits = model(**inputs).logits
    probabilities = logits[0, rows].float().softmax(-1)
    check_finite(float(probabilities.sum()), name)
    best = probabilities.topk(min(top_k, probabilities.shape[-1]))
    return [
        [(str(tokenizer.decode([int(token)])).strip(), float(p)) for token, p in zip(tokens, values, strict=True)]
        for tokens, values in zip(best.indices, best.values, strict=True)
    ]
