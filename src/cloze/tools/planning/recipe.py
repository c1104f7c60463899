"""Read the recipe to plan, with its data and its model's configuration.

    recipe = read_recipe(PlanConfig(recipe="launch/recipes/distilroberta-eli5.yaml"))
    recipe.model_config, recipe.block_size, recipe.tokens

Nothing is asked of the network: a model on the Hub must have its configuration in the cache. Blocks that were not
prepared yet are taken from RECIPE.prepare.yaml beside the recipe.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import AutoConfig, PretrainedConfig

from cloze.config import PlanConfig, TrainConfig
from cloze.config.machines import prepare_recipe
from cloze.config.parser import parse
from cloze.data.batches.layout import Layout
from cloze.data.batches.make_batch import fixed_capacity
from cloze.data.manifest import MANIFEST
from cloze.data.prepared.shards import open_prepared
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.token_ids import vocabulary_size
from cloze.errors import ClozeError, ConfigError, ModelError
from cloze.model.archs import check_block_size, check_model_type
from cloze.model.load import check_fits, read_config, usable_length
from cloze.model.overrides import parse_overrides
from cloze.training.run_schedule import split_batch, warmup_of
from cloze.utils.foreign.json_yaml import read_yaml
from cloze.utils.foreign.pretrained import from_pretrained

_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
_PLACES = {"pad_token_id": 1, "mask_token_id": 3}


@dataclass(frozen=True)
class Recipe:
    """`tokens`: that the run reads, None if unknown; `notes`: what was assumed, in words."""

    train: TrainConfig
    model_config: PretrainedConfig
    block_size: int
    num_blocks: int | None
    tokens: float | None
    notes: list[str]

    def layout(self, world_size: int) -> Layout:
        """Return the recipe's batch on `world_size` ranks. Raises ConfigError if it has fewer blocks than ranks."""
        train = self.train
        wanted = train.per_device_train_batch_size, train.gradient_accumulation_steps
        layout = Layout(*wanted, 0, world_size, None, *warmup_of(train))
        if train.global_batch_size is None:
            return layout
        if train.global_batch_size < world_size:
            raise ConfigError(
                f"a step has {train.global_batch_size} blocks, too few for {world_size} GPUs",
                where="--global_batch_size",
                hint="plan for fewer GPUs, or a larger batch",
            )
        return split_batch(layout, train.global_batch_size, wanted[0])

    def rows(self, blocks: int, on_gpu: bool) -> int:
        """Return the number of positions that the head predicts in a micro-batch: see `head_capacity` of
        cloze.training.prepare_model."""
        rate = max(self.train.mlm_probability, self.train.mlm_probability_end or 0.0)
        if on_gpu:
            return fixed_capacity(blocks * self.block_size, rate, self.train.mask_unit)
        return max(1, round(blocks * self.block_size * rate))


def read_recipe(config: PlanConfig) -> Recipe:
    """Read a recipe. Raises ConfigError, DataError or ModelError if a part cannot be read."""
    constants.HF_HUB_OFFLINE = True
    if not Path(config.recipe).is_file():
        raise ConfigError("no such recipe", where=config.recipe, hint="give a YAML file of `cloze train`")
    train: TrainConfig = parse(["train", "--config", config.recipe, *shlex.split(config.train_flags)])[1]
    notes: list[str] = []
    folder = Path(str(train.dataset_name))
    prepared = open_prepared(folder) if (folder / MANIFEST).is_file() else None
    beside = prepare_recipe(config.recipe)
    wanted = parse(["prepare", "--config", str(beside)])[1] if prepared is None and beside.is_file() else None
    tokenizer, block_size, num_blocks = None, config.block_size, None
    if prepared is not None:
        tokenizer = load_tokenizer(str(prepared.tokenizer_dir), train.trust_remote_code)
        block_size = block_size or int(prepared.manifest["block_size"])
        num_blocks = len(prepared.blocks("train")) if block_size == int(prepared.manifest["block_size"]) else None
    elif wanted is not None:
        block_size = block_size or wanted.block_size
        notes.append(f"{folder} is not there yet: blocks of {block_size} tokens, as {beside.name} makes them")
        tokenizer = _cached_tokenizer(wanted.tokenizer_name, train.trust_remote_code)
    elif train.tokenizer_name:
        tokenizer = _cached_tokenizer(train.tokenizer_name, train.trust_remote_code)
    if block_size is None and "block_size" in _keys(config.recipe, config.train_flags):
        block_size = train.block_size
    own = own_config(train)
    if block_size is None:
        block_size = usable_length(own)
        if block_size is None:
            raise ConfigError("how long are the blocks?", where=config.recipe, hint="give --block_size")
        notes.append(
            f"the length of the blocks is not known: {block_size} tokens are assumed, the most the model takes"
        )
    model_config = _fitted(train, own, tokenizer, config.vocab_size, block_size, notes)
    return Recipe(train, model_config, block_size, num_blocks, _tokens(config, train, num_blocks, block_size), notes)


def _keys(recipe: str, flags: str) -> set[str]:
    """Return the settings that the user gave."""
    given = read_yaml(recipe, kind=object, typed=True, error=ConfigError) or {}
    return set(given) | {word.lstrip("-").split("=")[0] for word in shlex.split(flags) if word.startswith("--")}


def own_config(train: TrainConfig) -> PretrainedConfig:
    """Return the model's configuration as its maker left it, from a folder, the cache, or the architecture's
    defaults."""
    source = train.model_name_or_path or train.config_name
    try:
        if source is None and train.model_type is not None:
            check_model_type(train.model_type)
            return AutoConfig.for_model(train.model_type)
        if source is None:
            return read_config(train, _Words(0, PretrainedConfig(), {}), 0)  # type: ignore[arg-type]  # raises for missing options
        return from_pretrained(
            AutoConfig,
            source,
            revision=train.model_revision,
            cache_dir=train.cache_dir,
            trust_remote_code=train.trust_remote_code,
            local_files_only=True,
        )
    except ModelError as error:
        if not error.what.startswith("cannot load"):
            raise
        hint = (
            "a plan asks nothing of the network: give a folder with its config.json, --train_flags "
            "'--model_name_or_path FOLDER', or from scratch '--model_name_or_path null --config_name FOLDER'"
        )
        raise ConfigError("its configuration is not on this machine", where=source, hint=hint) from None


class _Words:
    """Stands for a tokenizer of which only the size is known; special tokens are the model's own. Where it names none
    for padding and masks, as ESM, whose forward compares with them, RoBERTa's place is as good as any."""

    def __init__(self, size: int, config: PretrainedConfig, overrides: dict[str, str]):
        self._size = size
        for name in _SPECIAL:
            value = getattr(config, name, None)
            if overrides.get(name, "").isdecimal():
                value = int(overrides[name])
            value = _PLACES.get(name) if value is None else value
            setattr(self, name, value if not isinstance(value, int) or value < size else None)

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self._size)}


def _fitted(
    train: TrainConfig, own: PretrainedConfig, tokenizer: Any, asked: int | None, block_size: int, notes: list[str]
) -> PretrainedConfig:
    """Return the configuration that `cloze train` will use: from scratch it follows tokenizer and blocks."""
    text = own.get_text_config()
    usual = parse_overrides(train.config_overrides).get("vocab_size", getattr(text, "vocab_size", 0))
    size = asked or (vocabulary_size(tokenizer) if tokenizer is not None else int(usual))
    if asked is not None or tokenizer is None:
        if asked is None and train.model_name_or_path is None:
            notes.append(
                f"the tokenizer is not here: the model's own vocabulary of {size:,} is assumed (or give --vocab_size)"
            )
        tokenizer = _Words(size, text, parse_overrides(train.config_overrides))
    fitted = read_config(train, tokenizer, block_size)
    check_fits(fitted, size if train.model_name_or_path is None else 0, block_size)
    check_block_size(fitted, block_size)
    return fitted


def _cached_tokenizer(name: str, trust_remote_code: bool) -> Any:
    """Return a tokenizer from a folder or the cache; None if it is missing."""
    try:
        return load_tokenizer(name, trust_remote_code)
    except ClozeError:
        return None


def _tokens(config: PlanConfig, train: TrainConfig, num_blocks: int | None, block_size: int) -> float | None:
    """Return tokens the run reads, but for those that follow from max_steps, which depend on the number of ranks."""
    if config.tokens is not None:
        return config.tokens
    if train.max_steps > 0 or num_blocks is None:
        return None
    return train.num_train_epochs * num_blocks * block_size
