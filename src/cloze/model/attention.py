"""The attention implementation of transformers for a run, and its emulation on a CPU.

    eager, sdpa        anywhere; documents of one block are kept apart by a dense mask [B, 1, S, S]
    flex_attention     a GPU; by a BlockMask, which skips whole tiles; no attention dropout
    flash_attention_*  a GPU and half precision; by the offsets of the documents (varlen), without a mask

    names = attention_order(supported(type(model)), packed=512, on_gpu=True, half=True, dropout=False, installed=[])
    with computed_plainly(model): ...      # on the CPU, in fp32, what flex and flash compute on a GPU

Flash attention needs a GPU, and PyTorch's flex attention has no backward pass on the CPU (torch 2.13: compiled or not,
it raises NotImplementedError as soon as an input requires a gradient). Whether an architecture passes mask, offsets
and positions on unchanged is tested on the CPU too, with plain attention in their place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from cloze.errors import ConfigError

NAMES = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_PLAIN = "cloze_plain"
_WITHOUT_DROPOUT = ("flex", "attention_3", "attention_4", "attn3", "attn4")
_DROPOUT_SETTINGS = ("attention_probs_dropout_prob", "attention_dropout")
# Tokens of a block from which flex attention comes before sdpa with a dense mask. On an H200 (torch 2.11, ModernBERT's
# width, blocks of 512) a step took 42 ms with flex and 25 ms with sdpa, and flex compiled for a minute; what it skips
# grows with the square of the length.
FLEX_FROM = 2048


def supported(model_class: Any) -> frozenset[str]:
    """Return which of sdpa, flash, flex and checkpointing a model class of transformers supports."""
    names = {
        "sdpa": "_supports_sdpa",
        "flash": "_supports_flash_attn",
        "flex": "_supports_flex_attn",
        "checkpointing": "supports_gradient_checkpointing",
    }
    return frozenset(name for name, attribute in names.items() if getattr(model_class, attribute, False))


def flash_packages() -> list[str]:
    """Return the installed flash attentions, named as for --attn_implementation, the newest first."""
    checks = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
    return [name for name, is_available in checks.items() if is_available()]


def attention_order(
    supports: frozenset[str], packed: int, on_gpu: bool, half: bool, dropout: bool, installed: Sequence[str]
) -> list[str]:
    """Return the attentions to try if the user chose none, the best first.

    `supports`: see `supported`; `packed`: the length of blocks whose documents are to be kept apart, else 0; `half`:
    bf16 or fp16; `dropout`: whether the model drops attention weights; `installed`: see `flash_packages`. Other blocks
    get transformers' default: there sdpa reaches the flash kernels without a package.
    """
    usual = ["sdpa", "eager"] if "sdpa" in supports else ["eager"]
    if not packed or not on_gpu:
        return usual
    flash = [name for name in installed if "flash" in supports and half and not (dropout and without_dropout(name))]
    flex = ["flex_attention"] if "flex" in supports and not dropout else []
    return [*flash, *flex, *usual] if packed >= FLEX_FROM else [*flash, usual[0], *flex, *usual[1:]]


def attention_names(model: Any, asked: str | None, packed: int, on_gpu: bool, half: bool) -> list[str]:
    """Return the attentions to try, the best first: only `asked` (--attn_implementation) if given, else those that
    suit model, blocks and machine (`attention_order`). Raises ConfigError."""
    if asked is not None:
        check_dropout(asked, model.config)
        return [model.config._attn_implementation]
    dropout = attention_dropout(model.config) > 0
    return attention_order(supported(type(model)), packed, on_gpu, half, dropout, flash_packages())


def is_flash(name: str) -> bool:
    """Return whether an --attn_implementation is flash attention for transformers: a package's, or a Hub kernel."""
    return "flash" in name


def is_flex(name: str) -> bool:
    """Return whether an --attn_implementation is PyTorch's flex attention."""
    return name == "flex_attention"


def without_dropout(name: str) -> bool:
    """Return whether an --attn_implementation ignores or refuses attention dropout."""
    return any(part in name for part in _WITHOUT_DROPOUT)


def attention_dropout(config: Any) -> float:
    """Return the share of attention weights that a model drops in training."""
    config = config.get_text_config()
    return max(float(getattr(config, name, None) or 0.0) for name in _DROPOUT_SETTINGS)


def check_attention(name: str | None, on_gpu: bool) -> None:
    """Raise ConfigError for an --attn_implementation that is unknown, or that this machine cannot train with."""
    if name is None:
        return
    where = "--attn_implementation"
    if name not in NAMES and "/" not in name:
        hint = f"use one of {', '.join(NAMES)}, or a kernel on the Hub such as kernels-community/flash-attn2"
        raise ConfigError(f"no attention called {name}", where=where, hint=hint)
    if not on_gpu and is_flash(name):
        raise ConfigError("flash attention needs a GPU", where=where, hint="use sdpa, or leave it out")
    if not on_gpu and is_flex(name):
        raise ConfigError(
            "PyTorch's flex attention has no backward pass on a CPU", where=where, hint="use sdpa, or leave it out"
        )


def check_dropout(name: str, config: Any) -> None:
    """Raise ConfigError if attention dropout is set, and this --attn_implementation does not have it."""
    share = attention_dropout(config)
    if share > 0 and without_dropout(name):
        setting = next(one for one in _DROPOUT_SETTINGS if getattr(config.get_text_config(), one, None))
        raise ConfigError(
            f"{name} has no dropout, but this {config.model_type} drops {share:.0%} of attention weights",
            where="--attn_implementation",
            hint=f"use sdpa or flash_attention_2, or from scratch --config_overrides {setting}=0.0",
        )


def check_half(name: str, precision: str) -> None:
    """Raise ConfigError for flash attention in fp32. `precision`: "no", "bf16" or "fp16"."""
    if is_flash(name) and precision == "no":
        raise ConfigError(
            "flash attention computes in half precision only", where="--attn_implementation", hint="add --bf16"
        )


@contextlib.contextmanager
def as_usual(model: Any) -> Iterator[None]:
    """Let a model with flex or flash attention use one that runs on the CPU, backward too, inside the block."""
    name = model.config._attn_implementation
    if not is_flash(name) and not is_flex(name):
        yield
        return
    with _set(model, "sdpa" if "sdpa" in supported(type(model)) else "eager"):
        yield


@contextlib.contextmanager
def computed_plainly(model: Any) -> Iterator[None]:
    """Compute attention in plain torch from the inputs of flex and flash attention inside the block."""
    AttentionInterface.register(_PLAIN, _plain_attention)
    with _set(model, _PLAIN):
        yield


@contextlib.contextmanager
def _set(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _plain_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return [B, S, H, D] from query, key, value [B, H, S, D]. Computes flex attention from a BlockMask, and flash
    attention from offsets, for which a window of w sees w - 1 tokens to either side (transformers,
    `_process_flash_attention_kwargs`). Raises TypeError for other inputs: then the model did not pass them on."""
    batch, length = query.shape[0], query.shape[2]
    if isinstance(attention_mask, BlockMask):
        allowed = create_mask(attention_mask.mask_mod, batch, None, length, key.shape[2], device=str(query.device))
    elif attention_mask is None and cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if (module.is_causal if is_causal is None else is_causal) or max_length_q is None or max_length_k is None:
            raise TypeError("not attention in both directions within given lengths")
        places = torch.arange(batch * length, device=query.device)
        of_query, of_key = (torch.searchsorted(one, places, right=True) for one in (cu_seq_lens_q, cu_seq_lens_k))
        allowed = (of_query.view(batch, length, 1) == of_key.view(batch, 1, length))[:, None]
        if sliding_window is not None:
            allowed = allowed & ((places[:length, None] - places[None, :length]).abs() < sliding_window)
    else:
        raise TypeError("neither a BlockMask nor offsets of documents")
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None
