"""Recomputing activations: of all layers, or of every n-th; the gradients are the same bits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.errors import ConfigError
from cloze.training.prepare_model import enable_checkpointing

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}


def gradients(every: int | None) -> tuple[list[int], list[torch.Tensor]]:
    """How often each of five layers computes its forward in a step with dropout, and the gradients."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", num_hidden_layers=5, **SMALL)
    model = AutoModelForMaskedLM.from_config(config).train()
    calls = [0] * 5
    for place, layer in enumerate(model.bert.encoder.layer):

        def count(*_: object, place: int = place) -> None:
            calls[place] += 1

        layer.attention.register_forward_pre_hook(count)
    if every is not None:
        enable_checkpointing(model, every)
    torch.manual_seed(1)
    model(input_ids=torch.arange(12).view(2, 6)).logits.square().mean().backward()
    return calls, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("every", "expected"), [(None, [1, 1, 1, 1, 1]), (1, [2, 2, 2, 2, 2]), (2, [2, 1, 2, 1, 2]), (3, [2, 1, 1, 2, 1])]
)
def test_of_every_n_layers_one_is_computed_twice_and_gradients_stay_the_same_bits(every, expected):
    calls, found = gradients(every)
    assert calls == expected
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(None)[1], strict=True))


def test_a_model_of_one_layer_recomputes_it_or_not():
    single = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", num_hidden_layers=1, **SMALL))
    with pytest.raises(ConfigError, match="recomputes all of its layers or none"):
        enable_checkpointing(single, 2)


def test_an_architecture_without_recomputation_gets_a_hint():
    model = torch.nn.Linear(1, 1)
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="Linear has no gradient checkpointing"):
        enable_checkpointing(model)
