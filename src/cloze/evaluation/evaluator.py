"""Score a model on prepared blocks or on sentences, for `cloze evaluate` and `cloze compare`.

subject = open_subject("runs/mine", prepared, "validation", accelerator)
scores = subject.score_split("validation", settings)            # cloze.evaluation.perplexity.Scores
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from cloze.checkpoint.lineage import Lineage
from cloze.checkpoint.model_path import resolve_model_path
from cloze.checkpoint.open_model import load_model, open_tokenizer
from cloze.config import MeasureConfig
from cloze.data.batches.maskable import check_maskable
from cloze.data.batches.masking import Masking
from cloze.data.batches.word_boundaries import words_of
from cloze.data.prepared.shards import Prepared
from cloze.data.tokenizers.load import fingerprint
from cloze.data.tokenizers.token_ids import vocabulary_size
from cloze.distributed.collectives import gather
from cloze.errors import ConfigError, ModelError
from cloze.evaluation.perplexity import Scores, score_blocks
from cloze.evaluation.pll import Sentence, SentenceScore, read_sentences, score_sentences
from cloze.evaluation.vocabulary import token_facts
from cloze.model.archs import FIXED_BLOCK_SIZE
from cloze.model.load import check_finite, check_fits, usable_length
from cloze.model.packed import document_attention
from cloze.model.sparse_head import MaskedHead, check_head
from cloze.utils.foreign.pretrained import forward_errors
from cloze.utils.terminal.console import progress


@dataclass(frozen=True)
class Masks:
    """How blocks are masked: share of tokens, seed, masks per block, blocks per forward pass."""

    mlm_probability: float
    seed: int
    draws: int
    per_device: int


def masks_of(config: MeasureConfig) -> Masks:
    """Return the masks that the flags select."""
    return Masks(config.mlm_probability, config.seed, config.draws, config.per_device_eval_batch_size)


@dataclass(frozen=True)
class EvalModel:
    """A model to be measured, on its device, with its tokenizer. `run_dir`: its run, and `lineage`: the weights that
    it is made of, each None if unknown."""

    name: str
    model: Any
    tokenizer: Any
    head: MaskedHead
    accelerator: Accelerator
    run_dir: Path | None
    lineage: Lineage | None

    def score_split(self, prepared: Prepared, split: str, masks: Masks) -> Scores:
        """Score the blocks of a split with their fixed masks. Every rank calls it."""
        blocks, device = prepared.blocks(split), self.accelerator.device
        check_maskable(blocks, prepared.manifest, f"{prepared.folder}: {split}")
        masking = Masking.from_manifest(prepared.manifest, masks.seed, masks.mlm_probability).for_evaluation()

        def logits_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            with forward_errors(self.name):
                return self.head.masked_logits(self.model, batch, device)

        scores = score_blocks(
            logits_of,
            blocks,
            masking,
            masks.per_device,
            self.accelerator,
            facts=token_facts(self.tokenizer, blocks, device),
            draws=masks.draws,
        )
        if not scores.masked_tokens:
            raise ConfigError(
                f"no token of {scores.blocks:,} blocks is masked with it",
                where=f"--mlm_probability {masks.mlm_probability:g}",
                hint="give a larger share, or more --draws",
            )
        check_finite(scores.loss, self.name)
        return scores

    def score_sentences(self, sentences: Sequence[Sentence], batch_size: int, word_l2r: bool) -> list[SentenceScore]:
        """Return pseudo-log-likelihoods, computed by all ranks together; every rank gets all of them."""
        rank, world, device = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device
        if self.head.decoder_start is not None:
            raise ConfigError("pseudo-log-likelihood is for encoders", where=self.name, hint="measure perplexity")
        mine = list(sentences[rank::world])

        def logits_of(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            with forward_errors(self.name):
                return self.head.logits(self.model, {"input_ids": ids.to(device)}, positions.to(device))

        total = sum(int(sentence.scored.sum()) for sentence in mine)
        with progress("evaluate", total=total, unit="tokens") as advance:
            mask = self.tokenizer.mask_token_id
            scored = score_sentences(logits_of, mine, mask, batch_size, word_l2r, advance)
        parts = gather([dataclasses.astuple(score) for score in scored])
        found = [SentenceScore(*parts[number % world][number // world]) for number in range(len(sentences))]
        check_finite(math.fsum(score.pll for score in found), self.name)
        return found

    def read_sentences(self, lines: Sequence[str]) -> list[Sentence]:
        """Return texts as the model reads them. Raises ConfigError for one that is too long or empty."""
        return read_sentences(lines, self.tokenizer, usable_length(self.model.config))


def open_subject(
    name: str, prepared: Prepared | None, split: str, accelerator: Accelerator, trust_remote_code: bool = False
) -> EvalModel:
    """Open a model and put it on the device. `prepared`: the blocks of which it scores `split`; None for sentences.
    Raises ModelError if it does not suit them, DataError for a missing split."""
    blocks = None if prepared is None else prepared.blocks(split)
    found = resolve_model_path(name)
    tokenizer = open_tokenizer(found, trust_remote_code)
    model = load_model(found.folder, tokenizer, trust_remote_code)
    documents = None
    if prepared is not None:
        if fingerprint(tokenizer) != prepared.manifest["tokenizer"]["fingerprint"]:
            raise ModelError(
                "the model's tokenizer is not the one the data was prepared with",
                where=name,
                hint=f"prepare the corpus with --tokenizer_name {found.tokenizer}; between tokenizers compare bits "
                "per byte, which `cloze evaluate` gives for each",
            )
        check_fits(model.config, vocabulary_size(tokenizer), prepared.block_size)
        if prepared.packing == "best_fit":
            documents = document_attention(model, prepared.block_size, model.config.get_text_config().vocab_size)
    elif model.config.model_type in FIXED_BLOCK_SIZE:
        raise ModelError("reads blocks of one size only, not sentences", where=name, hint="give --data")
    model.to(accelerator.device)
    head = MaskedHead(model, documents=documents)
    ids = torch.full((2, min(16, usable_length(model.config) or 16)), tokenizer.mask_token_id)
    if blocks is not None:
        ids = torch.from_numpy(blocks.read(np.zeros(1, np.int64)).astype(np.int64))
    with forward_errors(name):
        check_head(head, model, {"input_ids": ids.to(accelerator.device)}, "no")
    return EvalModel(found.folder, model, tokenizer, head, accelerator, found.run_dir, found.lineage)


def split_sentences(prepared: Prepared, split: str, tokenizer: Any) -> list[Sentence]:
    """Return the blocks of a split as sentences: all tokens but special ones are scored."""
    blocks = prepared.blocks(split)
    ids = blocks.read(np.arange(len(blocks)))
    words = np.cumsum(words_of(tokenizer).starts(ids), axis=1)
    special = np.isin(ids, np.array(prepared.manifest["tokenizer"]["special_token_ids"], np.int32))
    check_maskable(blocks, prepared.manifest, f"{prepared.folder}: {split}")
    return [
        Sentence(row.astype(np.int64), ~skipped, word)
        for row, skipped, word in zip(ids, special, words, strict=True)
        if not skipped.all()
    ]
