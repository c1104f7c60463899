"""Learning rates are those of transformers at every step, without state; norms and biases do not decay."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, get_scheduler

from cloze.config import TrainConfig
from cloze.train.optim import build_optimizer
from cloze.train.schedule import learning_rate_schedule


def config(**values) -> TrainConfig:
    return TrainConfig(dataset_name="", output_dir="", **values)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("linear", None),
        ("cosine", None),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("polynomial", {"power": 2.0}),
        ("constant", None),
        ("constant_with_warmup", None),
        ("inverse_sqrt", None),
        ("warmup_stable_decay", {"num_decay_steps": 10}),
    ],
)
def test_every_schedule_is_that_of_transformers(name: str, kwargs: dict | None):
    schedule = learning_rate_schedule(
        config(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=5, learning_rate=3e-4), total_steps=40
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(name, optimizer, 5, 40, scheduler_specific_kwargs=kwargs)
    expected = []
    for _ in range(40):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert [schedule(step) for step in range(40)] == expected
    assert [schedule(step) for step in (30, 3, 17)] == [expected[30], expected[3], expected[17]]


def test_warmup_below_one_is_a_share_of_the_steps():
    by_share = learning_rate_schedule(config(warmup_steps=0.1), 50)
    by_steps = learning_rate_schedule(config(warmup_steps=5), 50)
    assert [by_share(s) for s in range(50)] == [by_steps(s) for s in range(50)]
    assert by_share(4) < by_share(5) > by_share(6)


def test_biases_and_norms_do_not_decay():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForMaskedLM(BertConfig(vocab_size=20, **sizes))
    optimizer, names = build_optimizer(model, config(weight_decay=0.1), offload=False)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(name.endswith(".weight") and "LayerNorm" not in name for name in names[0])
    assert all(name.endswith("bias") or "LayerNorm" in name for name in names[1])
    assert sorted(names[0] + names[1]) == sorted(name for name, _ in model.named_parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
