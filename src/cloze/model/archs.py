"""What architectures need beyond the common case: the one place that knows their names.

Everything else in Cloze treats all masked language models of transformers the same way; what is listed here was found
by running every one of them. `adapt_config` makes a configuration from scratch fit, `check_block_size` refuses lengths
that an architecture cannot take, `GONE` says what to use instead of what transformers no longer has.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from cloze.console import warn
from cloze.errors import ConfigError

# Position ids of these start after the padding id (fairseq's numbering), which shortens the usable length.
POSITIONS_AFTER_PADDING = {
    "roberta",
    "camembert",
    "data2vec-text",
    "xmod",
    "xlm-roberta",
    "xlm-roberta-xl",
    "longformer",
    "ibert",
    "luke",
    "roberta-prelayernorm",
    "mpnet",
    "esm",
}
# The prediction comes out of a decoder, which reads the original text shifted by one.
ENCODER_DECODER = {"bart", "mbart", "mvp"}
# Their backward pass computes activations anew, and refuses to outside of training.
REVERSIBLE = {"reformer"}
# Their backbone does not become one graph under torch.compile; that of all others does.
BREAKS_GRAPH = {"ibert", "longformer", "mra", "reformer", "yoso"}
# Left alone, autocast or weights in bfloat16 fail in their forward pass.
NO_BF16 = {"deberta", "deberta-v2", "fnet", "mra", "reformer", "xmod"}
# Without their CUDA kernel, attention silently returns zeros.
NEEDS_CUDA = {"mra"}

GONE = {
    "mega": "it left transformers after 4.57; use modernbert for long inputs",
    "nezha": "it left transformers after 4.57; use roformer, which has relative positions too",
    "qdqbert": "it left transformers after 4.57; train a bert and quantize it afterwards",
    "wav2vec2": "it models sound, and never predicted masked text; use roberta or modernbert",
}


def adapt_config(config: PretrainedConfig, tokenizer: Any, block_size: int) -> None:
    """From scratch: settings without which an architecture cannot train on such blocks of this tokenizer."""
    if config.model_type == "xmod":
        config.default_language = config.languages[0]
    elif config.model_type == "perceiver":  # its decoder predicts exactly so many positions
        config.max_position_embeddings = block_size
    elif config.model_type == "reformer":  # its position table is a product of two
        config.is_decoder = False
        rows = 1 << (block_size.bit_length() // 2)
        if block_size % rows == 0:
            config.axial_pos_shape = (rows, block_size // rows)
    elif config.model_type in ("xlm", "flaubert"):  # they take what follows the first padding for padding
        config.pad_index = tokenizer.pad_token_id


def decoder_start(config: PretrainedConfig) -> int | None:
    """The token with which the decoder of an encoder-decoder begins to read; None for all others."""
    if config.model_type not in ENCODER_DECODER:
        return None
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and token < config.vocab_size:
            return token
    return 0


def check_block_size(config: PretrainedConfig, block_size: int) -> None:
    """Raise ConfigError for a block size that the architecture cannot take, whatever its number of positions."""
    if config.model_type == "perceiver" and block_size != config.max_position_embeddings:
        raise ConfigError(
            f"perceiver predicts {config.max_position_embeddings} positions, no more and no less",
            where="--block_size",
            hint=f"prepare with --block_size {config.max_position_embeddings}",
        )
    if config.model_type == "reformer" and config.axial_pos_embds:
        product = config.axial_pos_shape[0] * config.axial_pos_shape[1]
        if block_size != product:
            raise ConfigError(
                f"reformer trains on blocks of {product} tokens (axial_pos_shape {config.axial_pos_shape})",
                where="--block_size",
                hint=f"prepare with --block_size {product}",
            )


def check_kernels(config: PretrainedConfig) -> None:
    """Warn of an architecture whose attention does nothing on this machine."""
    if config.model_type in NEEDS_CUDA and not torch.cuda.is_available():
        warn(
            f"without a GPU the attention of {config.model_type} returns zeros: good for trying out, not for training"
        )


def check_precision(config: PretrainedConfig, precision: str) -> None:
    """Raise ConfigError for a precision in which the architecture's forward pass fails."""
    if precision == "bf16" and config.model_type in NO_BF16:
        raise ConfigError(f"{config.model_type} cannot be trained in bf16", where="--bf16", hint="leave it out")
