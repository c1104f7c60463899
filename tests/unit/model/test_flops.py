"""Operations of a training step: counted without data or weights, and the same as torch counts on real tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BERT, TINY
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from cloze.config import ModelConfig
from cloze.model.flops import block_flops, device_peak, step_flops
from cloze.model.load import read_config
from cloze.model.sparse_head import MaskedHead
from cloze.tools.bench.sizes import make_tokenizer

SIZE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 500,
}
BLOCK, BATCH = 64, 2


def make(model_type: str, attention: str = "eager", **more: Any) -> Any:
    config = AutoConfig.for_model(model_type, **SIZE, **more)
    return AutoModelForMaskedLM.from_config(config, attn_implementation=attention)


def torch_counts(model: Any, rows: int) -> tuple[int, int]:
    """Forward, and forward with backward, of one real step that predicts `rows` of BATCH x BLOCK tokens."""
    head = MaskedHead(model)
    ids = torch.randint(5, 500, (BATCH, BLOCK))
    with FlopCounterMode(display=False) as counter:
        logits = head.logits(model, {"input_ids": ids}, torch.arange(rows))
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("model_type", ["bert", "roberta", "albert"])
def test_a_step_takes_the_operations_that_torch_counts_with_the_masked_rows_only(model_type: str):
    """Albert's layers share their weights, which does not make them fewer."""
    model = make(model_type)
    forward, both = torch_counts(model, rows=BATCH * BLOCK // 4)
    counted = step_flops(model, BATCH * BLOCK, BLOCK, mlm_probability=0.25)
    assert counted == 3 * forward
    assert both == 3 * forward


def test_dense_and_sparse_heads_differ_by_the_rows_that_are_not_predicted():
    model = make("bert")
    body, head = block_flops(model, BLOCK)
    assert step_flops(model, BLOCK, BLOCK, 0.25, sparse=False) == 3 * (body + head)
    assert step_flops(model, BLOCK, BLOCK, 0.25) == 3 * (body + head / 4)
    assert step_flops(model, 7 * BLOCK, BLOCK, 0.25) == 7 * 3 * (body + head / 4)


def test_local_attention_counts_the_window_that_tokens_see():
    """torch counts all pairs in every layer; layers 1 and 2 of three see 8 tokens to either side."""
    model = make("modernbert", local_attention=16, pad_token_id=0)
    forward, _ = torch_counts(model, rows=BATCH * BLOCK)
    pairs = torch.ones(BLOCK, BLOCK).triu(-8).tril(8).sum()
    unseen = 2 * 4 * SIZE["hidden_size"] * (BLOCK**2 - int(pairs))
    assert step_flops(model, BATCH * BLOCK, BLOCK, 1.0) == 3 * (forward - BATCH * unseen)
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    wide = make("modernbert", local_attention=2 * BLOCK, pad_token_id=0)
    assert step_flops(wide, BATCH * BLOCK, BLOCK, 1.0) == 3 * forward


def test_a_decoder_counts_beside_its_encoder():
    config = AutoConfig.for_model(
        "bart", d_model=64, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=96, decoder_ffn_dim=96,
        encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=500,
    )  # fmt: skip
    model = AutoModelForMaskedLM.from_config(config)
    weights = 2 * (4 * 64**2 + 2 * 64 * 96) + 3 * (8 * 64**2 + 2 * 64 * 96)  # a decoder layer attends twice
    attention = (2 + 3 * 2) * 4 * 64 * BLOCK
    assert block_flops(model, BLOCK)[0] == BLOCK * (2 * weights + attention)


def test_counting_leaves_the_model_and_the_random_state_alone():
    model = make("roberta", "sdpa").train()
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    assert step_flops(model, BLOCK, BLOCK, 0.15)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_every_architecture_is_counted_but_one_also_while_zero_3_is_on(tmp_path: Path):
    """X-MOD sends tokens to the adapter of their language by looking at them. ModernVBert makes a part of itself in a
    way that ZeRO-3 would divide among ranks, which do not come here together."""
    tokenizer, models = make_tokenizer(tmp_path, 600, 32), {}
    for model_type in ARCHITECTURES:
        wanted = ModelConfig(model_type=model_type, config_overrides=TINY.get(model_type, BERT))
        with torch.device("meta"):
            models[model_type] = AutoModelForMaskedLM.from_config(read_config(wanted, tokenizer, 32))
    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    assert [name for name, model in models.items() if step_flops(model, 32, 32, 0.15) is None] == ["xmod"]
    assert is_deepspeed_zero3_enabled()
    del zero3  # transformers holds it weakly
    assert not is_deepspeed_zero3_enabled()


def test_a_large_model_takes_no_weights_to_count():
    config = AutoConfig.for_model(
        "roberta", hidden_size=8192, num_hidden_layers=48, num_attention_heads=64, intermediate_size=32768
    )
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    flops = step_flops(model, 512, 512, 0.15)
    assert flops is not None
    assert flops > 512 * 6 * 48 * 12 * 8192**2  # 38,700 million weights: real ones would not fit
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA H20", 148), ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA A40", 150), ("NVIDIA RTX A6000", 155),
        ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA RTX 6000 Ada Generation", 364),
        ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-16GB", 112), ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_card_named(name: str, peak: float):
    assert device_peak(name) == peak * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA T400 4GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "AMD Instinct MI300X",
    ],
)
def test_a_card_whose_peak_is_not_known_has_none(name: str):
    assert device_peak(name) is None
