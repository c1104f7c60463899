"""Compute the head of a masked language model at masked positions only, 15 % of its rows, for every architecture.

The head computes scores for the whole vocabulary at each position, the largest matrix product of a small model, but
the loss uses masked positions only. A forward hook on the backbone (`model.base_model_prefix`) replaces all hidden
states by the masked rows, [B, S, H] -> [1, K, H], on which the model's own forward runs its own head. No architecture
needs code of its own, and DDP, DeepSpeed and torch.compile wrap the model as usual.

    head = MaskedHead(model)                       # before anything wraps the model
    check_head(head, engine.model, ids, "bf16")    # once: unless the logits are the dense ones, dense is used
    logits = head.masked_logits(engine.model, batch, device)           # [K, V]

A head that mixes rows, or reads the backbone's other outputs, fails the check and is computed densely: the whole [B,
S, V], of which the rows are taken afterwards.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from cloze.distributed.collectives import gather
from cloze.model.archs import FIXED_BLOCK_SIZE, LONG_BLOCKS_ONLY, decoder_start
from cloze.model.compiled import eagerly
from cloze.model.packed import DocumentAttention, model_inputs
from cloze.utils.closeness import relative_difference, within
from cloze.utils.terminal.console import warn

_CHECKED_ROWS = 32
_MOST_SCORES, _LEAST_LENGTH = 1 << 25, 128  # 128 MiB in fp32; Nystromformer has 64 landmarks
# Of the largest logit: other matrix shapes round otherwise, and in fp8 other rows make another scale.
TOLERANCE = {"no": 1e-4, "fp16": 2e-2, "bf16": 5e-2, "fp8": 1.5e-1}


class MaskedHead:
    """Scores of a model at masked positions: builds its inputs, and passes masked rows to its head by a hook.

    `sparse`: whether the hook is used; False if the model has no backbone to hook. `documents`: how attention stays
    inside documents, None without packed documents.
    """

    def __init__(self, model: Any, sparse: bool = True, documents: DocumentAttention | None = None):
        backbone = getattr(model, model.base_model_prefix, model)
        self.sparse = sparse and backbone is not model
        self._expected: tuple[torch.Tensor | None, tuple[int, ...]] = (None, ())
        self._config, self.documents = model.config, documents
        if self.sparse:
            backbone.register_forward_hook(self._gather)

    def use_dtype_of(self, model: torch.nn.Module) -> None:
        """Give additive attention masks the type of the model's weights, which an engine may have changed."""
        self.documents = None if self.documents is None else self.documents.in_dtype_of(model)

    def shortened(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the first columns of ids [B, S], few enough for `checked_length`."""
        return ids[:, : checked_length(self._config, *ids.shape)]

    def _gather(self, module: Any, arguments: Any, output: Any) -> Any:
        positions, rows = self._expected
        if positions is None:
            return None
        hidden = output[0]
        if tuple(hidden.shape[:2]) != rows:
            raise ValueError(f"the backbone gives {tuple(hidden.shape[:2])} rows for {rows} tokens")
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions).unsqueeze(0)
        if isinstance(output, tuple):
            return (picked, *output[1:])
        first = next(name for name, value in output.items() if value is not None)
        return type(output)(**{**output, first: picked})

    def expect(self, positions: torch.Tensor | None, rows: tuple[int, ...] = ()) -> None:
        """Set the flat positions [K] that the next forward, of `rows` [B, S], is to predict; None: all."""
        self._expected = positions, rows

    @cached_property
    def decoder_start(self) -> int | None:
        """Return the token before the first one that the decoder predicts; None for an encoder."""
        return decoder_start(self._config)

    def masked_logits(self, model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Return scores [K, V] at the `positions` [K] of a batch of `make_batch`, on `device`."""
        inputs = model_inputs(batch, device, self.documents, self.decoder_start)
        return self.logits(model, inputs, batch["positions"].to(device))

    def logits(self, model: Any, inputs: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
        """Return scores [K, V] at the flat positions [K] of `inputs` (input_ids [B, S]), on the same device."""
        if self.sparse:
            self.expect(positions, tuple(inputs.get("decoder_input_ids", inputs["input_ids"]).shape))
        try:
            logits = model(**inputs).logits
        finally:
            self.expect(None)
        flat = logits.reshape(-1, logits.shape[-1])
        return flat if self.sparse else flat.index_select(0, positions)


def checked_length(config: Any, blocks: int, block_size: int) -> int:
    """Return how many tokens of each block `check_head` uses: those for which the dense way makes at most _MOST_SCORES
    scores, but at least _LEAST_LENGTH; all of them for an architecture that treats a short block in another way."""
    if config.model_type in FIXED_BLOCK_SIZE | LONG_BLOCKS_ONLY:
        return block_size
    length = _MOST_SCORES // max(1, blocks * int(config.get_text_config().vocab_size))
    return min(block_size, max(_LEAST_LENGTH, 1 << max(length, 1).bit_length() - 1))


def check_head(head: MaskedHead, model: Any, inputs: dict[str, Any], precision: str) -> None:
    """Compare sparse with dense logits by two forwards; if they differ on any rank, all ranks use the dense head and
    report it. Every rank calls it. `precision`: "no", "fp16", "bf16" or "fp8"."""
    if not head.sparse:
        return
    with eagerly():
        found = _problem(head, model, inputs, precision)
    problem = next((one for one in gather(found) if one is not None), None)
    if problem is not None:
        head.sparse = False
        warn(f"{problem}; all positions go through the head, not only masked ones: the same result, slower")


@torch.no_grad()
def _problem(head: MaskedHead, model: Any, inputs: dict[str, Any], precision: str) -> str | None:
    ids = inputs["input_ids"]
    ids = head.shortened(ids)
    inputs = {**inputs, "input_ids": ids}
    positions = torch.linspace(0, ids.numel() - 1, _CHECKED_ROWS, device=ids.device).long()
    was_training = model.training
    model.eval()
    try:
        sparse = head.logits(model, inputs, positions).float()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        logits = model(**inputs).logits
        model.train(was_training)
    dense = logits.reshape(-1, logits.shape[-1]).index_select(0, positions).float()
    if sparse.shape != dense.shape:
        return f"logits of shape {tuple(sparse.shape)} for {tuple(dense.shape)}"
    difference = relative_difference(sparse, dense)
    return None if within(difference, TOLERANCE[precision]) else f"logits differ by {difference:.1e} of the largest"
