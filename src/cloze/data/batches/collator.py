"""Masks for a batch, as `cloze train` draws them, for transformers' Trainer or a loop of one's own.

    collator = MaskingCollator(tokenizer, mask_unit="word", seed=7)
    collator([dataset[3], dataset[5]])          # input_ids, labels: both [2, S] int64

In place of `transformers.DataCollatorForLanguageModeling`. A sample's mask is a pure function of (seed, sample), see
`cloze.data.batches.masking`: the same for any order, batch size, number of processes and data loader workers, and
after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from cloze.data.batches.make_batch import document_offsets
from cloze.data.batches.masking import IGNORE_INDEX, MASK_UNITS, Masking
from cloze.data.batches.word_boundaries import words_of
from cloze.data.tokenizers.token_ids import missing_ids, special_ids, vocabulary_size
from cloze.errors import ConfigError, DataError


class Documents(Protocol):
    """How a model keeps packed documents apart: see `cloze.model.packed.DocumentAttention`."""

    def inputs(self, segments: torch.Tensor, offsets: torch.Tensor) -> dict[str, Any]: ...


class MaskingCollator:
    """Turns examples with `input_ids` into a batch: input_ids, labels [B, S] int64 (-100 at positions without a
    prediction).

    `mask_unit`: tokens, whole words (BERT's whole word masking) or spans of words (SpanBERT; Joshi et al., 2020), each
    token with probability `mlm_probability` exactly. Examples have a number, `sample`, as those of `PackedDataset`;
    without it one is drawn from torch's random state, as transformers' collator draws its masks. Shorter examples are
    padded, and the batch has an attention_mask then. `documents`: how a model keeps packed documents apart, from
    `documents_apart`; it adds attention_mask and position_ids to the batch.

    Raises ConfigError for values that cannot be used, DataError for packed documents without `documents`.
    """

    def __init__(
        self,
        tokenizer: Any,
        mlm_probability: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        mask_unit: str = "token",
        seed: int = 42,
        documents: Documents | None = None,
    ):
        if mask_unit not in MASK_UNITS:
            raise ConfigError(f"must be one of {', '.join(MASK_UNITS)}, not {mask_unit!r}", where="mask_unit")
        if not 0 < mlm_probability <= 1:
            raise ConfigError("must be above 0 and at most 1", where="mlm_probability")
        if not 0 <= mask_replace_prob <= 1 or not 0 <= random_replace_prob <= 1 - mask_replace_prob + 1e-9:
            raise ConfigError("must be at least 0, and at most 1 together", where="mask_/random_replace_prob")
        if tokenizer.mask_token_id is None:
            hint = "take the tokenizer of an encoder (BERT, RoBERTa, ...)"
            raise ConfigError("the tokenizer has no mask token", where=type(tokenizer).__name__, hint=hint)
        self.masking = Masking(
            mask_token_id=tokenizer.mask_token_id,
            vocab_size=vocabulary_size(tokenizer),
            special_token_ids=tuple(special_ids(tokenizer)),
            seed=seed,
            mlm_probability=mlm_probability,
            mask_replace_prob=mask_replace_prob,
            random_replace_prob=random_replace_prob,
            words=words_of(tokenizer) if MASK_UNITS[mask_unit].needs_words else None,
            missing_token_ids=tuple(missing_ids(tokenizer)),
            **dict(MASK_UNITS[mask_unit].fields),
        )
        self._pad, self._documents = tokenizer.pad_token_id, documents

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [np.asarray(example["input_ids"], np.int32) for example in examples]
        longest = max(map(len, rows))
        lengths = np.array([len(row) for row in rows])
        if (lengths < longest).any() and self._pad is None:
            what = "examples of different lengths, but the tokenizer has no padding token"
            raise DataError(what, where="MaskingCollator", hint="give examples of one length")
        blocks = np.full((len(rows), longest), self._pad or 0, np.int32)
        for place, row in enumerate(rows):
            blocks[place, : len(row)] = row
        samples = self._samples(examples)
        input_ids, labels = blocks.astype(np.int64), np.full(blocks.shape, IGNORE_INDEX, np.int64)
        for length in np.unique(lengths):  # a mask depends on the row it is drawn for, not on the longest of the batch
            same = np.flatnonzero(lengths == length)
            input_ids[same, :length], labels[same, :length] = self.masking.apply(blocks[same, :length], samples[same])
        batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if "segments" in examples[0]:
            return batch | self._apart(examples)
        if (lengths < longest).any():
            batch["attention_mask"] = torch.from_numpy((np.arange(longest) < lengths[:, None]).astype(np.int64))
        return batch

    def _samples(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        """Return the number of each example: [B] int64."""
        if all("sample" in example for example in examples):
            return np.array([example["sample"] for example in examples], np.int64)
        return torch.randint(2**62, (len(examples),)).numpy()

    def _apart(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self._documents is None:
            hint = "give documents=cloze.documents_apart(model, dataset), or prepare with packing='concat'"
            what = "several documents are packed into a block, and would see each other"
            raise DataError(what, where="MaskingCollator", hint=hint)
        segments = np.stack([np.asarray(example["segments"], np.int32) for example in examples])
        return self._documents.inputs(torch.from_numpy(segments), torch.from_numpy(document_offsets(segments)))
