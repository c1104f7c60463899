"""Stand-ins for the kernels of flash attention, which need a GPU, in plain torch and any precision.

Everything around them is transformers' own: what models hand to `flash_attention_forward`, and what that makes of it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

NAME = "stand_in_flash"


def install(monkeypatch: pytest.MonkeyPatch) -> str:
    """Let `attn_implementation="stand_in_flash"` be flash attention with these kernels; return that name."""
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, flash_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, NAME, flash_attention_mask)
    for place, value in {
        "_loaded_implementation": NAME,
        "_flash_fn": dense_stand_in,
        "_flash_varlen_fn": varlen_stand_in,
        "_process_flash_kwargs_fn": flash_utils._lazy_define_process_function(varlen_stand_in),
    }.items():
        monkeypatch.setattr(flash_utils, place, value)
    return NAME


def varlen_stand_in(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
):  # fmt: skip
    """A stand-in for flash_attn.flash_attn_varlen_func (2.8), which needs a GPU: one document after the other.
    q, k, v [T, H, D]."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist()
    assert not causal
    assert dropout_p == softcap == 0.0
    parts = []
    for begin, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        assert 0 <= end - begin <= min(max_seqlen_q, max_seqlen_k)
        one = [x[begin:end].unsqueeze(0) for x in (q, k, v)]
        parts.append(dense_stand_in(*one, softmax_scale=softmax_scale, window_size=window_size)[0])
    out = torch.cat(parts)
    assert out.shape == q.shape
    return out


def dense_stand_in(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **_: Any):
    """A stand-in for flash_attn.flash_attn_func. q, k, v [B, S, H, D]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    places = torch.arange(q.shape[1])
    if window_size != (-1, -1):
        assert window_size[0] == window_size[1]
        far = (places[:, None] - places[None, :]).abs() > window_size[0]
        scores = scores.masked_fill(far, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
