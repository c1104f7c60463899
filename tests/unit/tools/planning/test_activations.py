"""What a trace without weights says of activations is what autograd keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planned_models import SMALL, run_plan, twin
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.model.sparse_head import MaskedHead
from cloze.tools.planning import activations
from cloze.tools.planning.activations import Untraceable, trace_pass, untrained
from cloze.tools.planning.meta_op_cache import Repeats
from cloze.training.loss import masked_loss_sum

slow = pytest.mark.slow
SPARSE = {"attention_type": "block_sparse", "block_size": 16, "max_position_embeddings": 192}  # of more than 11 blocks


@pytest.mark.parametrize(
    ("model_type", "size", "more", "rel"),  # of BigBird one mask is not seen
    [("roberta", 24, {}, 1e-3), ("bert", 24, {}, 1e-3), pytest.param("big_bird", 192, SPARSE, 0.03, marks=slow)],
)
def test_what_a_trace_keeps_is_what_autograd_keeps_on_real_tensors(model_type: str, size: int, more: Any, rel: float):
    """Saved tensors of a real forward pass, each storage once, weights and inputs left out."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **(SMALL | more))).train()
    blocks, rows = 5, 15
    ids, positions = torch.randint(5, 500, (blocks, size)), torch.arange(rows)
    head, ours = MaskedHead(model), {p.untyped_storage().data_ptr() for p in [*model.parameters(), ids, positions]}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    buffers = {b.untyped_storage().data_ptr() for b in model.buffers()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = masked_loss_sum(head.logits(model, {"input_ids": ids}, positions), positions)
    real = sum(size for pointer, size in saved.items() if pointer not in buffers)
    assert loss.requires_grad
    found = trace_pass(twin(model_type, **more), size, 3, None, on_gpu=False)
    predicted = found.activations(blocks) + found.logits(rows)
    scores = rows * SMALL["vocab_size"] * 4  # which the training loop holds beside what the loss keeps
    assert predicted == pytest.approx(real + scores, rel=rel)


def test_a_pass_of_any_size_is_a_plane_through_three_small_ones(monkeypatch: pytest.MonkeyPatch):
    model = twin()
    small = trace_pass(model, 16, 2, None, on_gpu=True)
    monkeypatch.setattr(activations, "_SHAPES", ((9, 4), (11, 4), (9, 7)))
    large = trace_pass(model, 16, 2, None, on_gpu=True)
    for blocks, rows in ((1, 2), (9, 8), (40, 100)):
        assert small.peak(blocks, rows) == pytest.approx(large.peak(blocks, rows))
        assert small.activations(blocks) == pytest.approx(large.activations(blocks))


def test_attention_keeps_its_weights_only_where_no_kernel_is_fused():
    """Between blocks of 64 and of 256 tokens, activations of a token grow by what attention keeps of it."""

    def a_token(on_gpu: bool, **more: Any) -> float:
        long, short = (trace_pass(twin(**more), size, 2, None, on_gpu).activations(1) / size for size in (256, 64))
        return long - short

    assert a_token(on_gpu=True) == pytest.approx(0, abs=1)
    assert a_token(on_gpu=False) > 2 * 192 * 4  # heads, more tokens to look at, bytes
    assert a_token(on_gpu=False, attention_probs_dropout_prob=0.0) == pytest.approx(0, abs=1)
    assert a_token(on_gpu=True, attn_implementation="eager") > 2 * 192 * 4


def test_half_precision_halves_what_is_kept_and_recomputation_keeps_little():
    def traced(dtype: torch.dtype, cast: torch.dtype | None, checkpointing: bool = False) -> activations.Trace:
        return trace_pass(twin(dtype=dtype, checkpointing=checkpointing, num_hidden_layers=2), 64, 8, cast, True)

    whole, half = traced(torch.float32, None).activations(8), traced(torch.bfloat16, None).activations(8)
    assert 0.4 * whole < half < 0.65 * whole  # masks of dropout are as large in both
    autocast, again = (traced(torch.float32, torch.bfloat16, one) for one in (False, True))
    assert half < autocast.activations(8) < whole
    assert again.activations(8) < 0.35 * autocast.activations(8)
    assert again.logits(64) == autocast.logits(64) > 64 * SMALL["vocab_size"] * 4
    assert again.peak(32, 256) < 0.75 * autocast.peak(32, 256)


def test_gradients_that_travel_at_once_take_no_room_until_the_end():
    found = trace_pass(twin(), 16, 2, None, on_gpu=True)
    elements = sum(p.numel() for p in twin().parameters())
    assert found.finished[-1] == 4 * elements
    assert found.peak(1, 2, kept=1.0) >= max(4 * elements, found.peak(1, 2, kept=0.0) + elements)
    assert found.peak(1, 2, kept=0.0, copies=4.0) > found.peak(1, 2, kept=0.0)


def test_repeated_operations_give_what_they_gave_before_and_views_stay_views(monkeypatch: pytest.MonkeyPatch):
    again, aten = Repeats(), torch.ops.aten
    one, two = (torch.empty((6, 4), device="meta") for _ in range(2))
    for _ in range(2):
        for view in (
            again.call(aten.view.default, (one, [24]), {}),
            again.call(aten._unsafe_view.default, (one, [24]), {}),
        ):
            assert view.untyped_storage()._cdata == one.untyped_storage()._cdata
        assert again.call(aten.add_.Tensor, (one, two), {}) is one
    outs = [again.call(aten.native_dropout.default, (one, 0.1, True), {}) for _ in range(2)]
    assert [(o.shape, o.dtype) for o in outs[0]] == [(o.shape, o.dtype) for o in outs[1]]
    assert outs[1][1].dtype is torch.bool
    assert len({o.untyped_storage()._cdata for pair in outs for o in pair}) == 4
    remembered = [trace_pass(twin(checkpointing=one), 16, 2, None, on_gpu=True) for one in (False, True)]
    monkeypatch.setattr(Repeats, "call", lambda self, func, args, kwargs: func(*args, **kwargs))
    for fast, one in zip(remembered, (False, True), strict=True):
        slow = trace_pass(twin(checkpointing=one), 16, 2, None, on_gpu=True)
        assert np.array_equal(fast.plane, slow.plane)


def test_a_trace_leaves_the_model_as_it_was():
    model = twin()
    first, second = (trace_pass(model, 16, 2, None, on_gpu=True) for _ in range(2))
    assert not model.roberta._forward_hooks
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    assert first.peak(4, 8) == second.peak(4, 8)


def test_a_model_that_looks_at_its_data_is_not_guessed_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def forward(self: Any, input_ids: Any, **_: Any) -> Any:
        return input_ids.tolist()

    monkeypatch.setattr("transformers.models.roberta.modeling_roberta.RobertaModel.forward", forward)
    with pytest.raises(Untraceable, match="meta"):
        trace_pass(twin(), 16, 2, None, on_gpu=True)
    found = run_plan(tmp_path, gpus="A10G")
    assert "cannot be traced without data" in " ".join(found["notes"])
    for one in found["choices"]:
        assert (
            one["memory"]["activations"] is one["memory"]["peak"] is one["largest_micro_batch"] is one["fits"] is None
        )
        assert one["memory"]["parameters"] > 0
    assert found["recommended"] is None


def test_parameters_without_a_part_in_the_output_are_found():
    assert untrained(twin(), 16) == []
    assert all("contact_head" in name for name in untrained(twin("esm", pad_token_id=1, mask_token_id=3), 16))
    assert untrained(twin("esm", pad_token_id=1, mask_token_id=3), 16)
