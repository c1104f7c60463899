"""Attention that stays inside documents, for blocks in which several were packed (`cloze prepare --packing best_fit`).

    rule = settle_attention(model, ["sdpa", "eager"], block_size=128, packed=True)
    logits = model(**model_inputs(batch, device, rule)).logits

Every document of a block is read as if alone: positions restart at each document, and attention is block-diagonal. The
inputs depend on the attention implementation (`cloze.model.attention`): a dense mask, a BlockMask for flex attention,
document offsets for flash attention. Architectures accept different forms or none, so the forms are tried. The first
that gives the same logits as the documents one by one is used. Without such a way the run is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from cloze.data.batches.make_batch import document_offsets
from cloze.data.batches.masking import IGNORE_INDEX
from cloze.errors import ModelError
from cloze.model.attention import as_usual, computed_plainly, is_flash, is_flex
from cloze.utils.closeness import relative_difference, within
from cloze.utils.terminal.console import say, warn

TOLERANCE = 1e-4  # of the largest logit, fp32
_MAX_CHECKED = 1024
_MASKS = ("boolean", "additive", "square")


@dataclass(frozen=True)
class DocumentAttention:
    """`form`: a dense mask, boolean [B, 1, S, S], additive [B, 1, S, S], or square [B, S, S] of 0 and 1; `flex`: a
    BlockMask; `varlen`: offsets of the documents. `first_position`: the position of a document's first token; None:
    the model is given no positions. `window`: how many tokens layers of local attention see to either side; None if
    the model has no such layers, or (varlen) applies the window itself. `dtype`: the type of additive masks."""

    form: str
    first_position: int | None
    window: int | None = None
    dtype: torch.dtype = torch.float32

    def in_dtype_of(self, model: torch.nn.Module) -> DocumentAttention:
        """Return a copy whose additive masks have the type of the model's weights. Without autocast the scores have it
        too, and eager attention cannot multiply probabilities and values of different types."""
        return replace(self, dtype=next(model.parameters()).dtype)

    def inputs(self, segments: torch.Tensor, offsets: torch.Tensor) -> dict[str, Any]:
        """Return further inputs of the model from segments [B, S], the document of its block that each token belongs
        to, and offsets [D] int32 (see `cloze.data.batches.make_batch.document_offsets`)."""
        found: dict[str, Any] = {}
        if self.form == "varlen":
            longest = segments.shape[1]  # a constant, so that torch.compile sees one value
            found |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
            found |= {"max_length_q": longest, "max_length_k": longest}
        elif self.window is None:
            found["attention_mask"] = self._mask(segments, None)
        else:
            found["attention_mask"] = {
                "full_attention": self._mask(segments, None),
                "sliding_attention": self._mask(segments, self.window),
            }
        if self.first_position is not None:
            found["position_ids"] = positions_in_documents(segments) + self.first_position
        return found

    def _mask(self, segments: torch.Tensor, window: int | None) -> Any:
        if self.form == "flex":
            return document_block_mask(segments, window)
        allowed = segments[:, :, None] == segments[:, None, :]
        if window is not None:
            places = torch.arange(segments.shape[1], device=segments.device)
            allowed = allowed & ((places[:, None] - places[None, :]).abs() <= window)
        if self.form == "boolean":
            return allowed[:, None]
        if self.form == "square":
            return allowed.long()
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill(~allowed, lowest)[:, None]


def document_block_mask(segments: torch.Tensor, window: int | None = None) -> BlockMask:
    """Return the BlockMask [B, 1, S, S] for segments [B, S]: a token sees its own document, at most `window` tokens
    away. On a GPU it is made tile by tile, without the dense mask."""
    batch, length = segments.shape

    def same_document(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return segments[b, q] == segments[b, k]

    def near_in_document(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return same_document(b, h, q, k) & ((q - k).abs() <= (window or 0))

    chosen = same_document if window is None else near_in_document
    make = _tile_by_tile() if segments.device.type == "cuda" else create_block_mask
    return make(chosen, batch, None, length, length, device=segments.device)


@cache
def _tile_by_tile() -> Any:
    return torch.compile(create_block_mask)


def positions_in_documents(segments: torch.Tensor) -> torch.Tensor:
    """Return [B, S] int64 for segments [B, S]: the number of earlier tokens of the same document."""
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
    """Return the inputs of the model's forward: input_ids, and with a rule the mask and positions of the documents.

    `decoder_start`: of an encoder-decoder, the token before the first one its decoder predicts; the decoder reads the
    original text, shifted by one.
    """
    inputs = {"input_ids": batch["input_ids"].to(device, non_blocking=True)}
    if rule is not None and "segments" in batch:
        here = (batch[name].to(device, non_blocking=True) for name in ("segments", "document_offsets"))
        inputs |= rule.inputs(*here)
    if decoder_start is not None:
        originals = torch.where(batch["labels"] == IGNORE_INDEX, batch["input_ids"], batch["labels"])
        before = torch.nn.functional.pad(originals, (1, -1), value=decoder_start)
        inputs["decoder_input_ids"] = before.to(device, non_blocking=True)
    return inputs


def settle_attention(model: Any, names: Sequence[str], block_size: int, packed: bool) -> DocumentAttention | None:
    """Select the first attention of `names` that works here and, for `packed` blocks, keeps documents apart; report
    it, and return how documents are kept apart. Raises ModelError if none does."""
    for name in names:
        try:
            if name != model.config._attn_implementation:
                model.set_attn_implementation(name)
            rule = document_attention(model, block_size, model.config.get_text_config().vocab_size) if packed else None
        except (ModelError, ImportError, ValueError, RuntimeError) as error:
            if name == names[-1]:
                raise
            warn(f"{name} attention is not used: {str(error).splitlines()[0]}")
            continue
        say("model", f"{name} attention" + ("" if rule is None else f" inside documents ({rule.form})"))
        return rule
    raise ValueError("no attention to choose from")


@torch.no_grad()
def document_attention(model: Any, block_size: int, vocab_size: int) -> DocumentAttention:
    """Return the form of mask and positions with which a block of documents gives the logits of each alone.

    Raises ModelError if no way passes the test. The model is on the CPU, in fp32; flex and flash attention are
    emulated there.
    """
    size = min(block_size, _MAX_CHECKED)
    # The second document is longer than the windows of local attention, which a wrong mask would widen.
    first, last = max(1, size // 8), max(1, size // 16)
    lengths = [first, size - first - last, last]
    ids = torch.randint(0, vocab_size, (1, size), generator=torch.Generator().manual_seed(0))
    pad = _pad_token(model)
    if pad is not None:
        ids[ids == pad] = (pad + 1) % vocab_size
    segments = np.repeat(np.arange(3, dtype=np.int32), lengths)[None]
    given = torch.from_numpy(segments), torch.from_numpy(document_offsets(segments))
    name = model.config._attn_implementation
    was_training = model.training
    model.eval()
    try:
        with as_usual(model):
            alone = _one_by_one(model, ids, lengths)
        with computed_plainly(model) if is_flash(name) or is_flex(name) else nullcontext():
            for rule in _candidates(model, name):
                if _agrees(model, ids, alone, rule.inputs(*given)):
                    return rule
    finally:
        model.train(was_training)
    raise ModelError(
        "cannot keep attention inside documents",
        where=f"{type(model).__name__} with {name} attention",
        hint="try --attn_implementation eager or sdpa, or prepare the corpus with --packing concat",
    )


def _one_by_one(model: Any, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor | None:
    """Return the logits of each document alone; None for an architecture that reads whole blocks only."""
    try:
        return torch.cat([model(input_ids=part).logits for part in ids.split(lengths, dim=1)], dim=1)
    except Exception:  # architectures raise different errors
        return None


def _pad_token(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "pad_token_id", None)


def _candidates(model: Any, name: str) -> list[DocumentAttention]:
    after_padding = (_pad_token(model) or 0) + 1
    firsts = [0, after_padding, None]
    if is_flash(name):
        return [DocumentAttention("varlen", first) for first in firsts]
    if is_flex(name):
        forms: tuple[str, ...] = ("flex",)
    else:
        forms = _MASKS if name != "eager" else ("additive", "square", "boolean")
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    windows = [window, None] if isinstance(window, int) else [None]
    return [DocumentAttention(form, first, window) for window, form, first in product(windows, forms, firsts)]


def _agrees(model: Any, ids: torch.Tensor, alone: torch.Tensor | None, inputs: dict[str, Any]) -> bool:
    try:
        together = model(input_ids=ids, **inputs).logits
    except Exception:  # architectures without this form raise different errors
        return False
    if alone is None:
        return False
    return within(relative_difference(together, alone), TOLERANCE)
