"""What a run trains on: a prepared folder, a corpus that is prepared first, or a corpus that is streamed.

data = open_data(config)                    # no process group exists yet
build = data.step_builder(masking, layout, total_samples, position=None)
build(global_step)                          # StepBatches
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloze.config import TrainConfig
from cloze.data.batches.layout import Layout
from cloze.data.batches.loader import BlockOrder, StepBatches, step_batches
from cloze.data.batches.make_batch import count_masked, make_batch
from cloze.data.batches.maskable import check_maskable, maskable_share
from cloze.data.batches.masking import MASK_UNITS, Masking
from cloze.data.batches.word_boundaries import LONG_WORD, Words, mean_word_length, words_of
from cloze.data.corpus.content import default_cache
from cloze.data.corpus.find_files import MAGIC
from cloze.data.corpus.formats import format_of
from cloze.data.corpus.local_files import NoFiles, is_local, local_splits
from cloze.data.corpus.sources import Task
from cloze.data.prepare.cache import is_prepared, open_or_prepare
from cloze.data.prepare.pipeline import make_recipe, open_inputs, sample_texts
from cloze.data.prepare.streaming import BlockStream
from cloze.data.prepare.text_sketch import sampled_report
from cloze.data.prepare.unit import Recipe
from cloze.data.prepared.blocks import Blocks
from cloze.data.prepared.shards import Prepared, open_prepared
from cloze.data.prepared.text_report import warnings_of
from cloze.data.prepared.verified import verify_for_use
from cloze.data.tokenizers.encoders import backend_version
from cloze.data.tokenizers.load import load_tokenizer
from cloze.errors import ConfigError, DataError, error_phase
from cloze.utils.terminal.console import say, warn

PROBE_BLOCKS, SAMPLE = 2, 16


@dataclass(frozen=True)
class StreamedCorpus:
    """A corpus that is made into blocks during training."""

    tasks: list[Task]
    recipe: Recipe
    unit_bytes: int

    def open(self, seed: int, rank: int, world_size: int, position: dict[str, int] | None = None) -> BlockStream:
        """Return one rank's blocks from a position on."""
        return BlockStream(self.tasks, self.recipe, seed, rank, world_size, self.unit_bytes, position)


@dataclass(frozen=True)
class TrainData:
    """Blocks to train and evaluate on: either `blocks` or `streamed` is set. `manifest` describes them; `folder`: the
    prepared folder, None if streamed."""

    manifest: dict[str, Any]
    tokenizer: str
    blocks: Blocks | None
    validation: Blocks | None
    streamed: StreamedCorpus | None = None
    folder: Path | None = None

    @property
    def block_size(self) -> int:
        """Return the number of tokens per block."""
        return int(self.manifest["block_size"])

    @property
    def num_blocks(self) -> int | None:
        """Return the number of blocks in an epoch; None if unknown."""
        return None if self.blocks is None else len(self.blocks)

    @property
    def has_documents(self) -> bool:
        """Return whether attention is limited to documents."""
        return self.manifest.get("packing") == "best_fit"

    @property
    def filled(self) -> float:
        """Return the share of block positions that hold tokens; 1 if unknown."""
        train = self.manifest.get("splits", {}).get("train", {})
        places = train.get("blocks", 0) * self.block_size
        return min(1.0, (train["tokens"] - train.get("dropped_tokens", 0)) / places) if places else 1.0

    def check_maskable(self) -> None:
        """Raise DataError if no token can be masked; of a stream, the first blocks are checked."""
        name = Path(self.tokenizer).parent if self.blocks is not None else "--streaming_train"
        if self.blocks is not None:
            check_maskable(self.blocks, self.manifest, f"{name}: train")
        elif maskable_share(self.first_blocks(0, SAMPLE), self.manifest) == 0.0:
            raise DataError(
                "no token of its first blocks can be masked: all are special or unknown to the tokenizer",
                where=name,
                hint="use a tokenizer that knows the script of the corpus",
            )
        if self.validation is not None and len(self.validation):
            check_maskable(self.validation, self.manifest, f"{name}: validation")

    def first_blocks(self, seed: int, count: int = PROBE_BLOCKS) -> NDArray[np.int32]:
        """Return up to `count` blocks [n, block_size] to test a model on, the same on every rank."""
        if self.blocks is not None:
            return self.blocks.read(np.arange(min(count, len(self.blocks))))
        assert self.streamed is not None
        return self.streamed.open(seed, 0, 1).take(count)[0]

    def step_builder(
        self,
        masking: Masking,
        layout: Layout,
        total_samples: int,
        position: dict[str, int] | None,
        capacity: int = 0,
    ) -> Callable[[int], StepBatches]:
        """Return a function from global step to this rank's batches; a stream needs consecutive steps from `position`
        on.

        `capacity`: predicted positions per micro-batch (see `make_batch`).
        """
        if self.blocks is not None:
            order = BlockOrder(layout, len(self.blocks), masking.seed)
            return partial(step_batches, self.blocks, masking, layout, total_samples, order=order, capacity=capacity)
        assert self.streamed is not None
        stream = self.streamed.open(masking.seed, layout.rank, layout.world_size, position)
        return partial(streamed_step, stream, masking, layout, total_samples, capacity)


def streamed_step(
    stream: BlockStream, masking: Masking, layout: Layout, total_samples: int, capacity: int, global_step: int
) -> StepBatches:
    """Take one rank's micro-batches of a step from its stream. Masks depend on the sample numbers."""
    micro_batches = []
    for micro_step in range(layout.micro_steps(global_step)):
        samples = layout.samples(global_step, micro_step)
        ids, segments = (_spread(part, samples >= 0) for part in stream.take(int((samples >= 0).sum())))
        assert ids is not None
        micro_batches.append(make_batch(ids, segments, masking, samples, total_samples, capacity))
    return StepBatches(global_step, micro_batches, count_masked(micro_batches), stream.position)


def _spread(rows: NDArray[np.int32] | None, places: NDArray[np.bool_]) -> NDArray[np.int32] | None:
    """Put rows [n, S] at the n positions [B] that hold a sample -> [B, S], zeros elsewhere."""
    if rows is None or places.all():
        return rows
    spread = np.zeros((len(places), rows.shape[1]), np.int32)
    spread[places] = rows
    return spread


@error_phase("data")
def words_for(config: TrainConfig, data: TrainData) -> Words | None:
    """Return the word tables for `mask_unit`. Raises ConfigError if the tokenizer has no notion of a word."""
    if not MASK_UNITS[config.mask_unit].needs_words:
        return None
    words = words_of(load_tokenizer(data.tokenizer, config.trust_remote_code, config.token))
    special = data.manifest["tokenizer"]["special_token_ids"]
    length = mean_word_length(words, data.first_blocks(config.seed, SAMPLE), special)
    say("data", f"--mask_unit {config.mask_unit}: the word of a token has {length:.1f} tokens on average")
    if length > LONG_WORD:
        warn(
            f"--mask_unit {config.mask_unit}: words of {length:.1f} tokens are few in a block, so the share that is "
            "masked differs much from block to block; use --mask_unit token, or a tokenizer that cuts this text into "
            "shorter words"
        )
    return words


def masking_rule(config: TrainConfig, manifest: dict[str, Any], total_samples: int, words: Words | None) -> Masking:
    """Return the masking rule of a run of `total_samples` samples on the data of a manifest."""
    return Masking.from_manifest(
        manifest,
        config.seed,
        config.mlm_probability,
        config.mask_replace_prob,
        config.random_replace_prob,
        mlm_probability_end=config.mlm_probability_end,
        total_samples=total_samples,
        words=words,
        **dict(MASK_UNITS[config.mask_unit].fields),
    )


@error_phase("data")
def open_data(config: TrainConfig) -> TrainData:
    """Open, prepare or stream `dataset_name`. Raises ConfigError, DataError, ModelError."""
    name = config.dataset_name
    if name is not None and (is_prepared(name) or _should_be_prepared(name, config.dataset_config_name)):
        if config.streaming_train:
            raise ConfigError("is prepared already", where=name, hint="leave out --streaming_train")
        prepared = open_prepared(name)
        _check_blocks(config, prepared)
    elif config.streaming_train:
        return _open_stream(config)
    else:
        prepared = open_or_prepare(config, _tokenizer_name(config), _cache(config))
    validation = prepared.blocks("validation") if "validation" in prepared.splits else None
    train = prepared.blocks("train")
    verify_for_use(prepared, [name for name in ("train", "validation") if name in prepared.splits], config)
    return TrainData(prepared.manifest, str(prepared.tokenizer_dir), train, validation, folder=prepared.folder)


def _check_blocks(config: TrainConfig, prepared: Prepared) -> None:
    """Raise ConfigError if block options that are not at their default contradict the prepared folder."""
    for name in ("block_size", "packing"):
        given, found = getattr(config, name), getattr(prepared, name)
        if given not in (found, getattr(TrainConfig, name)):
            raise ConfigError(
                f"{config.dataset_name} was prepared with {found}",
                where=f"--{name} {given}",
                hint="leave the option out, or prepare the corpus again",
            )


def _open_stream(config: TrainConfig) -> TrainData:
    if config.max_steps < 1:
        raise ConfigError("a stream has no known length", where="--streaming_train", hint="give --max_steps")
    if "epoch" in (config.save_strategy, config.eval_strategy):
        raise ConfigError("a stream has no known epochs", where="--streaming_train", hint="save and evaluate by steps")
    tokenizer_name = _tokenizer_name(config)
    inputs = open_inputs(config, tokenizer_name)
    recipe = make_recipe(config, inputs, config.tokenizer_backend)
    facts = inputs.facts | {"streamed": True, "splits": {}}
    facts["tokenizer"]["backend"] = backend_version(recipe.encoder.backend)
    facts["checksum"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    facts["text_report"] = sampled_report(  # no part of the identity
        sample_texts(inputs.corpus), inputs.tokenizer, config.split_special_tokens
    )
    for line in warnings_of(facts["text_report"]):
        warn(line)
    validation = None
    if config.validation_split is not None:
        held_out = dataclasses.replace(
            config, split=config.validation_split, validation_split=None, validation_split_percentage=0.0
        )
        prepared = open_or_prepare(held_out, tokenizer_name, _cache(config))
        validation = prepared.blocks("train")
        verify_for_use(prepared, ["train"], config)
    elif config.validation_split_percentage:
        share = f"{config.validation_split_percentage:g} % of the documents are left out of the stream for validation"
        say("data", f"{share}; --validation_split_percentage 0 trains on all")
    streamed = StreamedCorpus(inputs.corpus.tasks, recipe, inputs.facts["unit_size"])
    return TrainData(facts, tokenizer_name, None, validation, streamed)


def _should_be_prepared(name: str, config_name: str | None) -> bool:
    """Return whether the name is bad as a prepared folder: it is missing, has no corpus, or lost its manifest. Raises
    NoFiles for the name of a missing corpus file, or a pattern without files."""
    if (Path(name) / "dataset_dict.json").is_file() and (Path(name) / "tokenizer").is_dir():
        return True
    try:
        return is_local(name) and not local_splits(name, config_name)
    except NoFiles:
        if format_of(Path(name)) is not None or MAGIC.search(name):
            raise
        return True


def _tokenizer_name(config: TrainConfig) -> str:
    name = config.tokenizer_name or config.model_name_or_path or config.config_name
    if name is None and config.dataset_name is not None and not Path(config.dataset_name).exists():
        hint = "make it with `cloze prepare --output`, or give --tokenizer_name if it is a corpus"
        raise DataError("no such folder", where=config.dataset_name, hint=hint)
    if name is None:
        raise ConfigError(
            "a corpus needs a tokenizer",
            where="--tokenizer_name",
            hint="name one, or give a folder made by `cloze prepare` as --dataset_name",
        )
    return name


def _cache(config: TrainConfig) -> Path:
    return Path(config.prepared_cache_dir) if config.prepared_cache_dir else default_cache()
