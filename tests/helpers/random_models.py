"""Tiny models with large random weights, for which other attention gives clearly other logits."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 1,
}
SPECIAL = ("eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id")


def make(model_type: str, attention: str | None = "sdpa", **more: int):
    config = AutoConfig.for_model(model_type)
    for name, value in {**TINY, **more, **dict.fromkeys(SPECIAL, 2)}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # so that other attention gives clearly other logits
    return model.eval()
