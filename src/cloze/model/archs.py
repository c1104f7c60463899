"""Exceptions for single architectures: the one module that knows their names.

The rest of Cloze treats all masked language models of transformers alike; the exceptions here were found by running
each of them. `adapt_config` makes a configuration from scratch fit, `check_block_size` refuses lengths that an
architecture cannot take, `GONE` names replacements for what transformers no longer has, `architectures` is the table
of `cloze archs`.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PretrainedConfig

from cloze.errors import ConfigError, ModelError
from cloze.model.attention import supported
from cloze.utils.suggest import suggestion
from cloze.utils.terminal.console import warn

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
# They need the id of the padding token when they are made.
PADDED = {"bart", "flaubert", "mbart", "mvp", "nomic_bert", "xlm"}
# They hard-code the id of the padding token.
PADDING_ID = {"mpnet": 1}
# They take the first padding token of a text for its end.
ENDS_AT_PADDING = {"flaubert", "xlm"}
# A decoder predicts, which reads the original text shifted by one.
ENCODER_DECODER = {"bart", "mbart", "mvp"}
# Their backward pass recomputes activations, and refuses to outside of training.
REVERSIBLE = {"reformer"}
# Their backbone does not become one graph under torch.compile; that of all others does.
BREAKS_GRAPH = {"flaubert", "ibert", "longformer", "mra", "reformer", "xlm", "xmod", "yoso"}
# They bypass the hooks in which FSDP2 gathers a layer's weights.
GATHERED_AS_ONE = {"reformer", "squeezebert"}
# Unchanged, their forward pass fails under autocast to bfloat16 (deberta, xmod) or with such weights (fnet, mra).
NO_BF16 = {"deberta", "fnet", "mra", "xmod"}
# Without their CUDA kernel, attention silently returns zeros.
NEEDS_CUDA = {"mra"}
# They take blocks of one size only (`check_block_size`).
FIXED_BLOCK_SIZE = {"perceiver", "reformer"}
# A short block disables their sparse attention permanently.
LONG_BLOCKS_ONLY = {"big_bird"}
# Some of their parameters do not affect the prediction, and are not trained.
UNUSED_PARAMETERS = {
    "big_bird",
    "esm",
    "fnet",
    "layoutlm",
    "longformer",
    "luke",
    "modernvbert",
    "mra",
    "neomme",
    "reformer",
    "squeezebert",
    "ultravbert",
}
# Their documents cannot be kept apart: no form of mask gives the logits of each document alone.
ONE_DOCUMENT_PER_BLOCK = {
    "bart",
    "convbert",
    "deberta",
    "deberta-v2",
    "flaubert",
    "fnet",
    "funnel",
    "layoutlm",
    "longformer",
    "mbart",
    "mobilebert",
    "mvp",
    "nystromformer",
    "perceiver",
    "reformer",
    "roformer",
    "xlm",
    "yoso",
}
# Only offsets keep their documents apart: they accept no mask of two dimensions.
DOCUMENTS_BY_FLASH_ONLY = {"esm"}

MIN_POSITIONS = 64  # this many rows of positions may be unused, for any block length

GONE = {
    "mega": "it left transformers after 4.57; use modernbert for long inputs",
    "nezha": "it left transformers after 4.57; use roformer, which has relative positions too",
    "qdqbert": "it left transformers after 4.57; train a bert and quantize it afterwards",
    "wav2vec2": "it models sound, and never predicted masked text; use roberta or modernbert",
}


# The notes of `cloze archs`: architectures, and the meaning of the note.
NOTES: dict[str, tuple[Set[str], str]] = {
    "needs a GPU": (NEEDS_CUDA, "without one its attention returns zeros"),
    "one block size": (
        FIXED_BLOCK_SIZE,
        "exactly max_position_embeddings, or the product of axial_pos_shape",
    ),
    "decoder": (ENCODER_DECODER, "a decoder, which reads the text shifted by one, predicts the tokens"),
    "default language": ({"xmod"}, "from scratch it is trained as the first of its languages"),
    "offset positions": (POSITIONS_AFTER_PADDING, "they begin after the padding id, which shortens the usable length"),
    "unused weights": (UNUSED_PARAMETERS, "some parameters have no part in the prediction, and are not trained"),
    "no best_fit": (
        ONE_DOCUMENT_PER_BLOCK,
        "attention cannot be kept inside documents: use --packing concat",
    ),
    "no torch.compile": (BREAKS_GRAPH, "the backbone does not become one graph"),
    "best_fit by flash": (DOCUMENTS_BY_FLASH_ONLY, "attention is kept inside documents by flash attention only"),
}


@dataclass(frozen=True)
class Architecture:
    """The features of one architecture. `sdpa`, `flash`, `flex`, `checkpointing`: as its class in transformers states;
    the rest was found by running it. `note`: further remarks, a few words."""

    model_type: str
    sdpa: bool
    flash: bool
    flex: bool
    checkpointing: bool
    bf16: bool
    zero3: bool
    sparse_head: bool
    note: str


def architectures(model_type: str | None = None) -> list[Architecture]:
    """Return the masked language models of the installed transformers, or one, sorted by name. Raises ConfigError."""
    known = {config.model_type: config for config in MODEL_FOR_MASKED_LM_MAPPING}
    if model_type is not None:
        check_model_type(model_type)
    return [_architecture(name, known[name]) for name in ([model_type] if model_type else sorted(known))]


def _architecture(name: str, config_class: type[PretrainedConfig]) -> Architecture:
    found = MODEL_FOR_MASKED_LM_MAPPING[config_class]
    has = supported(found[0] if isinstance(found, list | tuple) else found)
    return Architecture(
        model_type=name,
        sdpa="sdpa" in has,
        flash="flash" in has,
        flex="flex" in has,
        checkpointing="checkpointing" in has,
        bf16=name not in NO_BF16,
        zero3=True,  # all 51: tests/distributed/test_archs_table.py
        sparse_head=True,  # all 51: tests/distributed/test_sparse_head.py
        note="; ".join(note for note, (names, _) in NOTES.items() if name in names),
    )


def check_model_type(model_type: str) -> None:
    """Raise ConfigError for an architecture that transformers does not have, with what to use instead."""
    known = sorted(config.model_type for config in MODEL_FOR_MASKED_LM_MAPPING)
    if model_type not in known:
        raise ConfigError(
            f"no masked language model of type {model_type}",
            where="--model_type",
            hint=GONE.get(model_type) or suggestion(model_type, known) or f"the types are: {', '.join(known)}",
        )


def adapt_config(config: PretrainedConfig, tokenizer: Any, block_size: int) -> None:
    """Set, from scratch, what an architecture needs to train on such blocks of this tokenizer."""
    if config.model_type == "xmod":
        config.default_language = config.languages[0]
    elif config.model_type == "perceiver":  # its decoder predicts a fixed number of positions
        config.max_position_embeddings = block_size
    elif config.model_type == "reformer":  # its position table is a product of two
        config.is_decoder = False
        rows = 1 << (block_size.bit_length() // 2)
        if block_size % rows == 0:
            config.axial_pos_shape = (rows, block_size // rows)
    elif config.model_type in ("xlm", "flaubert"):  # they take what follows the first padding for padding
        config.pad_index = tokenizer.pad_token_id


def check_padding(config: PretrainedConfig, tokenizer: Any, length: int, positions_chosen: bool = False) -> None:
    """Raise ModelError if an architecture cannot be made from scratch for the padding token of a tokenizer.

    `length`: tokens that it is to take at once. `positions_chosen`: the user chose the number of positions.
    """
    name, pad = config.model_type, tokenizer.pad_token_id
    where = getattr(tokenizer, "name_or_path", "") or "tokenizer"
    other = "or choose an architecture that counts positions from 0: --model_type bert or modernbert"
    if pad is None:
        if name in POSITIONS_AFTER_PADDING | PADDED:
            hint = f"give it one (tokenizer.add_special_tokens({{'pad_token': '<pad>'}})), {other}"
            raise ModelError(f"the tokenizer has no padding token, and {name} needs its id", where=where, hint=hint)
        return
    if pad != PADDING_ID.get(name, pad):
        hint = f"use a tokenizer whose padding token has this id (`cloze tokenizer --kind bpe`), {other}"
        what = f"the padding token has the id {pad}, and {name} has {PADDING_ID[name]} in its code"
        raise ModelError(what, where=where, hint=hint)
    if name in POSITIONS_AFTER_PADDING and pad >= max(length, MIN_POSITIONS) and not positions_chosen:
        raise ModelError(
            f"the padding token has the id {pad}, and {name} counts positions from there: {pad + 1 + length:,} of "
            f"them for blocks of {length}",
            where=where,
            hint=f"give the padding token a small id (`cloze tokenizer` gives it 1), {other}; "
            f"--config_overrides max_position_embeddings={pad + 1 + length} takes it as it is",
        )
    names = ("unk_token", "cls_token", "sep_token", "bos_token", "eos_token")
    same = [each for each in names if getattr(tokenizer, f"{each}_id", None) == pad]
    if not same:
        return
    what = f"the padding token is also the {same[0]}"
    if name in POSITIONS_AFTER_PADDING | ENDS_AT_PADDING:
        raise ModelError(
            f"{what}, so {name} would read it as padding in the middle of a text",
            where=where,
            hint=f"give the tokenizer a padding token of its own, {other}",
        )
    warn(f"{where}: {what}: its embedding is not trained in architectures that keep the row of padding at zero")


def decoder_start(config: PretrainedConfig) -> int | None:
    """Return the token with which the decoder of an encoder-decoder begins to read; None for all others."""
    if config.model_type not in ENCODER_DECODER:
        return None
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int) and token < config.vocab_size:
            return token
    return 0


def fixed_length(config: PretrainedConfig) -> int | None:
    """Return the one length of blocks that an architecture of FIXED_BLOCK_SIZE takes; None for all others."""
    if config.model_type == "perceiver":
        return int(config.max_position_embeddings)
    if config.model_type == "reformer" and config.axial_pos_embds:
        return int(config.axial_pos_shape[0] * config.axial_pos_shape[1])
    return None


def check_block_size(config: PretrainedConfig, block_size: int) -> None:
    """Raise ConfigError for a block size that the architecture cannot use, independent of its number of positions."""
    length = fixed_length(config)
    if length is None or block_size == length:
        return
    if config.model_type == "perceiver":
        raise ConfigError(
            f"perceiver predicts {config.max_position_embeddings} positions, no more and no less",
            where="--block_size",
            hint=f"prepare with --block_size {config.max_position_embeddings}",
        )
    raise ConfigError(
        f"reformer trains on blocks of {length} tokens (axial_pos_shape {config.axial_pos_shape})",
        where="--block_size",
        hint=f"prepare with --block_size {length}",
    )


def check_kernels(config: PretrainedConfig) -> None:
    """Warn of an architecture whose attention has no effect on this machine."""
    if config.model_type in NEEDS_CUDA and not torch.cuda.is_available():
        warn(
            f"without a GPU the attention of {config.model_type} returns zeros: good for trying out, not for training"
        )


def check_precision(config: PretrainedConfig, precision: str) -> None:
    """Raise ConfigError for a precision in which the architecture's forward pass fails."""
    if precision in ("bf16", "fp8") and config.model_type in NO_BF16:  # fp8 is for some products, bf16 for the rest
        raise ConfigError(
            f"{config.model_type} cannot be trained in {precision}", where="--precision", hint="choose fp32"
        )
