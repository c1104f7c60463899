"""The models that training is measured with, and blocks to feed them: made up, so that nothing has to be downloaded.

    prepared = make_data(folder / "data", SIZES["tiny-32"], packing="concat")      # a folder as `cloze prepare` makes

Lengths of documents follow ELI5 (RoBERTa's tokenizer, 2,375 threads: a median of 186 tokens, 1.06 the standard
deviation of their logarithm), tokens follow Zipf's law; what they are makes no difference to the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedTokenizerFast

from cloze.config import BenchConfig
from cloze.data.prepared.packing import BestFit, Concat
from cloze.data.prepared.shards import (
    Prepared,
    ShardWriter,
    describe_split,
    open_prepared,
    shard_name,
    write_manifest,
)
from cloze.data.tokenizers.load import describe
from cloze.errors import ConfigError
from cloze.model.overrides import apply_overrides, parse_overrides

_BASE = "max_position_embeddings=514"
_LARGE = "hidden_size=1024,num_hidden_layers=24,num_attention_heads=16,intermediate_size=4096"
_TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
_MEDIAN_TOKENS, _SPREAD = 186, 1.06
_NUM_TOKENS = 2**21
_BOS, _PAD, _EOS, _UNK = range(4)  # RoBERTa's; the mask token comes last


@dataclass(frozen=True)
class Size:
    """A model, its vocabulary, and a length of block."""

    model_type: str
    config_overrides: str
    vocab_size: int
    block_size: int

    def model_config(self) -> PretrainedConfig:
        """Return the configuration of the model."""
        config = AutoConfig.for_model(self.model_type, vocab_size=self.vocab_size)
        apply_overrides(config, parse_overrides(self.config_overrides))
        return config

    def empty_model(self) -> Any:
        """Return the model without weights."""
        with torch.device("meta"):
            return AutoModelForMaskedLM.from_config(self.model_config())


SIZES = {
    "distilroberta-128": Size("roberta", f"{_BASE},num_hidden_layers=6", 50265, 128),
    "distilroberta-512": Size("roberta", f"{_BASE},num_hidden_layers=6", 50265, 512),
    "roberta-base-512": Size("roberta", _BASE, 50265, 512),
    "roberta-large-512": Size("roberta", f"{_BASE},{_LARGE}", 50265, 512),
    "modernbert-base-1024": Size("modernbert", "num_hidden_layers=22", 50368, 1024),
    "tiny-32": Size("roberta", _TINY, 600, 32),
}


def chosen_sizes(config: BenchConfig, default: list[str]) -> dict[str, Size]:
    """Return the sizes of `--sizes`, by name. Raises ConfigError for one that is not known."""
    names = [name.strip() for name in config.sizes.split(",")] if config.sizes else default
    for name in names:
        if name not in SIZES:
            raise ConfigError(f"no size {name}", where="--sizes", hint=f"the sizes are: {', '.join(SIZES)}")
    return {name: SIZES[name] for name in names}


def make_data(folder: Path, size: Size, packing: str = "concat", num_tokens: int = _NUM_TOKENS) -> Prepared:
    """Write a prepared folder of about `num_tokens`. `packing`: concat, or best_fit."""
    (folder / "train").mkdir(parents=True)
    tokenizer = make_tokenizer(folder / "tokenizer", size.vocab_size, size.block_size)
    tokens, lengths = make_documents(num_tokens, size.vocab_size)
    pieces = packing == "best_fit"
    if pieces:
        packer = BestFit(size.block_size, _PAD)
        packer.add(tokens, lengths)
        packed = packer.flush()
    else:
        packed = Concat(size.block_size).add(tokens, lengths)
    name = shard_name(0, 1)
    writer = ShardWriter(folder / "train" / name, size.block_size, pieces)
    writer.add(packed)
    shards = [{"file": name, **(writer.close() or {})}]
    describe_split(folder / "train", shards, size.block_size, pieces)
    facts = {"block_size": size.block_size, "packing": packing, "tokenizer": describe(tokenizer, "made up")}
    write_manifest(folder, facts | {"splits": {"train": {"shards": shards}}})
    return open_prepared(folder)


def make_tokenizer(folder: Path, vocab_size: int, block_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `vocab_size` tokens, made-up words and RoBERTa's special tokens, saved in `folder`."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(4, vocab_size - 1)), "<mask>"]
    model = WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    names = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model),
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=block_size,
        **names,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_documents(num_tokens: int, vocab_size: int) -> tuple[Any, Any]:
    """Return documents with at least `num_tokens` tokens in all: tokens [n] int32, and the length of each, int64."""
    rng = np.random.default_rng(0)
    lengths = np.empty(0, np.int64)
    while lengths.sum() < num_tokens:
        more = np.exp(rng.normal(np.log(_MEDIAN_TOKENS), _SPREAD, 1024))
        lengths = np.concatenate([lengths, np.maximum(more.astype(np.int64), 3)])
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), num_tokens)) + 1]
    words = vocab_size - 5  # without the special ones
    ranks = np.exp(rng.random(int(lengths.sum())) * np.log(words)).astype(np.int32)  # 1 .. words, p ~ 1 / rank
    tokens = 3 + np.minimum(ranks, words)
    ends = np.cumsum(lengths)
    tokens[ends - lengths], tokens[ends - 1] = _BOS, _EOS
    return tokens.astype(np.int32), lengths


@dataclass(frozen=True)
class Shares:
    """Of all places in the blocks: what is no padding (`real`), and what can be masked (`maskable`)."""

    real: float
    maskable: float


def shares_of(prepared: Prepared) -> Shares:
    """Count them."""
    blocks = prepared.blocks("train")
    ids = blocks.read(np.arange(len(blocks)))
    special = np.isin(ids, prepared.manifest["tokenizer"]["special_token_ids"])
    return Shares(float((ids != _PAD).mean()), float((~special).mean()))
