"""Attention that stays inside documents, for blocks in which several were packed (`cloze prepare --packing best_fit`).

    rule = document_attention(model, block_size=128, vocab_size=50265)
    logits = model(**model_inputs(batch, device, rule)).logits

Every document of a block is to be read as if it stood alone: positions begin anew with each, and the attention mask is
block-diagonal. Architectures take such masks in different forms or not at all, so the forms are tried: the first that
gives the same logits as the documents one by one is used, and where none does the run is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from cloze.data.masking import IGNORE_INDEX
from cloze.errors import ModelError

TOLERANCE = 1e-4  # of the largest logit, fp32
_MAX_CHECKED = 1024
_MASKS = ("boolean", "additive", "square")


@dataclass(frozen=True)
class DocumentAttention:
    """`mask`: boolean [B, 1, S, S], additive [B, 1, S, S], or square [B, S, S] of 0 and 1. `first_position`: the
    position of a document's first token; None: the model is given no positions. `window`: how far layers of local
    attention see to either side; None where there are none."""

    mask: str
    first_position: int | None
    window: int | None = None

    def inputs(self, segments: torch.Tensor) -> dict[str, Any]:
        """segments [B, S]: which document of its block each token belongs to -> the model's further inputs."""
        same = segments[:, :, None] == segments[:, None, :]
        found: dict[str, Any] = {"attention_mask": self._shaped(same)}
        if self.window is not None:
            places = torch.arange(segments.shape[1], device=segments.device)
            near = (places[:, None] - places[None, :]).abs() <= self.window
            found["attention_mask"] = {
                "full_attention": found["attention_mask"],
                "sliding_attention": self._shaped(same & near),
            }
        if self.first_position is not None:
            found["position_ids"] = positions_in_documents(segments) + self.first_position
        return found

    def _shaped(self, allowed: torch.Tensor) -> torch.Tensor:
        if self.mask == "boolean":
            return allowed[:, None]
        if self.mask == "square":
            return allowed.long()
        lowest = torch.finfo(torch.float32).min
        return torch.zeros_like(allowed, dtype=torch.float32).masked_fill(~allowed, lowest)[:, None]


def positions_in_documents(segments: torch.Tensor) -> torch.Tensor:
    """segments [B, S] -> [B, S] int64: how many tokens of the same document stand before each token."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values


def model_inputs(
    batch: dict[str, torch.Tensor],
    device: torch.device,
    rule: DocumentAttention | None,
    decoder_start: int | None = None,
) -> dict[str, torch.Tensor]:
    """What the model's forward gets of a batch: input_ids, and with a rule the mask and positions of its documents.

    `decoder_start`: of an encoder-decoder, the token before the first one its decoder predicts; the decoder reads the
    original text, moved by one.
    """
    inputs = {"input_ids": batch["input_ids"].to(device, non_blocking=True)}
    if rule is not None and "segments" in batch:
        inputs |= rule.inputs(batch["segments"].to(device, non_blocking=True))
    if decoder_start is not None:
        originals = torch.where(batch["labels"] == IGNORE_INDEX, batch["input_ids"], batch["labels"])
        before = torch.nn.functional.pad(originals, (1, -1), value=decoder_start)
        inputs["decoder_input_ids"] = before.to(device, non_blocking=True)
    return inputs


@torch.no_grad()
def document_attention(model: Any, block_size: int, vocab_size: int) -> DocumentAttention:
    """The form of mask and positions with which a block of documents gives the logits of each alone.

    Raises ModelError where there is none. The model is on the CPU, in fp32.
    """
    size = min(block_size, _MAX_CHECKED)
    # The second document is longer than the windows of local attention, which a wrong mask would widen.
    lengths = [size // 8, size - size // 8 - size // 16, size // 16]
    used = {token for token in (model.config.pad_token_id,) if token is not None}
    ids = torch.randint(0, vocab_size, (1, size), generator=torch.Generator().manual_seed(0))
    for token in used:
        ids[ids == token] = (token + 1) % vocab_size
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    was_training = model.training
    model.eval()
    try:
        alone = torch.cat([model(input_ids=part).logits for part in ids.split(lengths, dim=1)], dim=1)
        for rule in _candidates(model):
            if _agrees(model, rule, ids, segments, alone):
                return rule
    finally:
        model.train(was_training)
    raise ModelError(
        "cannot keep attention inside documents",
        where=f"{type(model).__name__} with {model.config._attn_implementation} attention",
        hint="try --attn_implementation eager or sdpa, or prepare the corpus with --packing concat",
    )


def _candidates(model: Any) -> list[DocumentAttention]:
    after_padding = (model.config.pad_token_id or 0) + 1
    firsts = [0, after_padding, None]
    masks = _MASKS if model.config._attn_implementation != "eager" else ("additive", "square", "boolean")
    window = getattr(model.config, "sliding_window", None)
    windows = [window, None] if isinstance(window, int) else [None]
    return [DocumentAttention(mask, first, window) for window, mask, first in product(windows, masks, firsts)]


def _agrees(
    model: Any, rule: DocumentAttention, ids: torch.Tensor, segments: torch.Tensor, alone: torch.Tensor
) -> bool:
    try:
        together = model(input_ids=ids, **rule.inputs(segments)).logits
    except Exception:  # an architecture that does not take this form says so in its own way
        return False
    if together.shape != alone.shape or not torch.isfinite(together).all():
        return False
    return bool((together - alone).abs().max() <= TOLERANCE * alone.abs().max())
