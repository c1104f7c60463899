"""A masked language model from a name, a folder, or a configuration, checked against the data it will see.

model, tokenizer = build_model(config, prepared.tokenizer_dir, block_size=128)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from cloze.config import ModelConfig
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.own_tokenizer import check_own_tokenizer
from cloze.data.tokenizers.token_ids import vocabulary_size
from cloze.errors import ConfigError, ModelError
from cloze.model.archs import (
    PADDING_ID,
    POSITIONS_AFTER_PADDING,
    adapt_config,
    check_block_size,
    check_model_type,
    check_padding,
)
from cloze.model.overrides import (
    apply_overrides,
    check_reads_both_ways,
    check_same_weights,
    check_token_ids,
    overrides_named,
    parse_overrides,
)
from cloze.model.weights import load_weights, refuse_adapter
from cloze.utils.foreign.pretrained import from_config, from_pretrained

transformers_logging.disable_progress_bar()  # a bar of its own for every model that is loaded


def build_model(
    config: ModelConfig, tokenizer_dir: Path | str, block_size: int, seed: int, stored: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model in fp32 on the CPU, with the same weights on every rank, and its tokenizer.

    `stored`: take the model's configuration from this folder, with any weights, since a checkpoint has them. Raises
    ModelError if it cannot be loaded, has too few positions for `block_size` or too few embeddings for the tokenizer;
    ConfigError for flags that cannot be combined.
    """
    tokenizer = load_tokenizer(str(tokenizer_dir), config.trust_remote_code)
    if stored is None:
        model_config = read_config(config, tokenizer, block_size)
    else:
        model_config = from_pretrained(AutoConfig, stored, trust_remote_code=config.trust_remote_code)
    check_fits(model_config, vocabulary_size(tokenizer), block_size)
    attention: dict[str, Any] = {}
    if config.attn_implementation:
        attention["attn_implementation"] = config.attn_implementation
    set_seed(seed)
    if config.model_name_or_path is not None and stored is None:
        trust, token = config.trust_remote_code, config.token
        check_own_tokenizer(config.model_name_or_path, model_config, tokenizer, trust, token)
        model = load_weights(
            config.model_name_or_path,
            may_lack_head=True,
            config=model_config,
            dtype=torch.float32,
            **_hub_arguments(config),
            **attention,
        )
    else:
        trust = config.trust_remote_code
        with overrides_named(config.config_overrides):
            model = from_config(
                AutoModelForMaskedLM, model_config, trust_remote_code=trust, dtype=torch.float32, **attention
            )
    return model, tokenizer


def load_pretrained(folder: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return a finished model from a folder or Hub name, for inference. Raises ModelError."""
    return load_weights(folder, trust_remote_code=trust_remote_code, dtype=torch.float32).eval()


def load_checked(folder: Path) -> PreTrainedModel:
    """Return a consolidated model, on the CPU. Raises ModelError if a weight is missing, left over, or of the wrong
    shape.

    Weights stay in the type they are stored in: so they are mapped from the files, and take no memory of their own.
    """
    return load_weights(folder, exact=True, dtype="auto").eval()


def read_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PretrainedConfig:
    """Return the model's configuration with the overrides applied and, from scratch, made to fit the tokenizer."""
    overrides = parse_overrides(config.config_overrides)
    source = config.model_name_or_path or config.config_name
    if source is not None:
        refuse_adapter(source)
        model_config = from_pretrained(
            AutoConfig, source, typed_attention=config.attn_implementation, **_hub_arguments(config)
        )
        if config.model_type not in (None, model_config.model_type):
            raise ConfigError(
                f"{source} is of type {model_config.model_type}",
                where=f"--model_type {config.model_type}",
                hint="leave --model_type out: it is for a model from scratch",
            )
    elif config.model_type is not None:
        check_model_type(config.model_type)
        model_config = AutoConfig.for_model(config.model_type)
    else:
        raise ConfigError(
            "which model?",
            where="cloze train",
            hint="give --model_name_or_path, or --model_type (from scratch), or --config_name (from scratch)",
        )
    if config.model_name_or_path is None:
        _fit_to_tokenizer(model_config.get_text_config(), tokenizer, block_size, overrides)
        adapt_config(model_config, tokenizer, block_size)
        apply_overrides(model_config, overrides)
    elif overrides:
        stored = copy.deepcopy(model_config)
        apply_overrides(model_config, overrides)
        with overrides_named(config.config_overrides):
            check_same_weights(stored, model_config, config.trust_remote_code)
    check_reads_both_ways(model_config, source or config.model_type, overrides)
    check_token_ids(model_config, overrides, tokenizer)
    return model_config


def usable_length(config: PretrainedConfig) -> int | None:
    """Return how many tokens the model can take at once; None without a limit."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    if config.model_type in POSITIONS_AFTER_PADDING:
        padding = PADDING_ID.get(config.model_type, getattr(config, "pad_token_id", None) or 0)
        return positions - padding - 1
    return positions


def check_finite(value: float, name: str) -> None:
    """Raise ModelError if a sum over a model's output is not finite."""
    if not math.isfinite(value):
        raise ModelError(
            "its logits are not finite",
            where=name,
            hint="its weights are damaged, or its training diverged",
        )


def check_fits(config: PretrainedConfig, tokenizer_size: int, block_size: int) -> None:
    """Raise ModelError if blocks or token ids are larger than the model allows."""
    length = usable_length(config)
    if length is not None and block_size > length:
        raise ModelError(
            f"blocks of {block_size} tokens, but the model takes {length} (max_position_embeddings="
            f"{config.get_text_config().max_position_embeddings})",
            where=config.model_type,
            hint=f"prepare with --block_size {length} or less",
        )
    check_block_size(config, block_size)
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(vocab_size, int) and tokenizer_size > vocab_size:
        raise ModelError(
            f"the tokenizer has {tokenizer_size} tokens, but the model has embeddings for {vocab_size}",
            where=config.model_type,
            hint="prepare with the model's own tokenizer, or make a model for this one with `cloze grow --tokenizer`",
        )


def _fit_to_tokenizer(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, block_size: int, overrides: dict[str, str]
) -> None:
    """Fit vocabulary, special ids and positions from scratch to tokenizer and blocks unless overridden."""
    check_padding(config, tokenizer, block_size, "max_position_embeddings" in overrides)
    fit_vocabulary(config, tokenizer, overrides)
    config.vocab_size = vocabulary_size(tokenizer)
    length = usable_length(config)
    if length is not None and length < block_size and "max_position_embeddings" not in overrides:
        config.max_position_embeddings += block_size - length


def fit_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, kept: Collection[str]) -> None:
    """Fit vocabulary size and ids of special tokens to the tokenizer, except the values in `kept`."""
    if "vocab_size" not in kept:
        config.vocab_size = vocabulary_size(tokenizer)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id"):
        if hasattr(config, name) and name not in kept:
            setattr(config, name, getattr(tokenizer, name, None))


def _hub_arguments(config: ModelConfig) -> dict[str, Any]:
    return {
        "revision": config.model_revision,
        "cache_dir": config.cache_dir,
        "token": config.token,
        "trust_remote_code": config.trust_remote_code,
    }
