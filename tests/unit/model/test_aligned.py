"""A vocabulary that does not suit tensor cores: the output layer computes with rows to spare, and nobody notices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.model.aligned import align_output_layer, padded_linear
from cloze.model.sparse_head import MaskedHead


def tiny(vocab_size: int):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model("roberta", vocab_size=vocab_size, **sizes)
    return AutoModelForMaskedLM.from_config(config).eval()


@pytest.mark.parametrize("with_bias", [True, False])
def test_scores_and_gradients_are_those_of_the_plain_layer(with_bias: bool):
    torch.manual_seed(0)
    inputs = [torch.randn(5, 16), torch.randn(101, 16), *([torch.randn(101)] if with_bias else [])]
    found = []
    for compute in (padded_linear, F.linear):
        leaves = [one.double().requires_grad_() for one in inputs]
        scores = compute(*leaves, *([] if with_bias else [None]))
        F.cross_entropy(scores.float(), torch.arange(5)).backward()
        found.append([scores, *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*found, strict=True):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-14)


def test_the_product_has_a_multiple_of_64_columns():
    scores = padded_linear(torch.randn(3, 16), torch.randn(101, 16), None)
    assert scores.stride() == (128, 1)


def test_a_model_keeps_its_parameters_and_its_scores():
    model = tiny(101)
    ids, positions = torch.arange(20).view(2, 10) + 5, torch.tensor([3, 11, 19])
    head = MaskedHead(model)
    names, before = list(model.state_dict()), head.logits(model, {"input_ids": ids}, positions)
    assert align_output_layer(model)
    after = head.logits(model, {"input_ids": ids}, positions)
    assert after.shape == (3, 101)
    assert after.stride(0) == 128
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == names


def test_a_vocabulary_that_suits_is_left_alone():
    model = tiny(104)
    assert not align_output_layer(model)
    assert "forward" not in vars(model.get_output_embeddings())
