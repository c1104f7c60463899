"""Attention stays inside documents: every document of a block gets the logits it has alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.data.loader import document_offsets
from cloze.errors import ModelError
from cloze.model.packed import document_attention, model_inputs, positions_in_documents

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


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["roberta", "bert", "electra", "modernbert", "albert", "xlm-roberta"])
def test_a_document_gets_the_logits_it_has_alone(model_type: str, attention: str):
    model = make(model_type, attention, **({"local_attention": 16} if model_type == "modernbert" else {}))
    rule = document_attention(model, 64, 300)
    lengths = [[5, 40, 19], [64], [1, 1, 50]]  # the last block has 12 tokens of padding
    ids = torch.randint(5, 300, (3, 64), generator=torch.Generator().manual_seed(3))
    ids[2, 52:] = 1
    segments = torch.tensor([[0] * 5 + [1] * 40 + [2] * 19, [0] * 64, [0] + [1] + [2] * 50 + [3] * 12])
    offsets = torch.from_numpy(document_offsets(segments.numpy()))
    batch = {"input_ids": ids, "segments": segments, "document_offsets": offsets}
    logits = model(**model_inputs(batch, torch.device("cpu"), rule)).logits
    for row, pieces in enumerate(lengths):
        at = 0
        for length in pieces:
            alone = model(input_ids=ids[row : row + 1, at : at + length]).logits[0]
            torch.testing.assert_close(logits[row, at : at + length], alone, rtol=1e-4, atol=1e-3)
            at += length
    plain = model(input_ids=ids).logits
    assert (plain[0, :5] - logits[0, :5]).abs().max() > 0.1


@pytest.mark.parametrize("model_type", ["fnet", "deberta-v2"])
def test_an_architecture_without_such_masks_is_refused(model_type: str):
    with pytest.raises(ModelError, match=r"cannot keep attention inside documents; .* --packing concat"):
        document_attention(make(model_type, "eager"), 64, 300)


def test_positions_begin_anew_with_each_document():
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 0, 1, 2, 0], [0] * 6, [0, 1, 2, 3, 4, 5]]
    assert positions_in_documents(segments).tolist() == expected


def test_blocks_without_documents_are_given_as_they_are():
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    assert list(model_inputs(batch, torch.device("cpu"), None)) == ["input_ids"]
