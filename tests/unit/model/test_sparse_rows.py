"""Scores and losses of some rows match those of all rows: none, one, around multiples of eight, and all of them."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from cloze.data.batches.masking import IGNORE_INDEX
from cloze.errors import ModelError
from cloze.model.sparse_head import MaskedHead, check_head, checked_length
from cloze.model.sparse_loss import sparse_head

BATCH, SIZE, VOCABULARY = 3, 8, 20
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def tiny(**more: Any) -> BertForMaskedLM:
    torch.manual_seed(0)
    values = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.5, **SIZES, **more}
    config = BertConfig(**values)
    return BertForMaskedLM(config)


def batch(masked: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [B, S] and labels at the masked places."""
    ids = torch.randint(1, VOCABULARY, (BATCH, SIZE), generator=torch.Generator().manual_seed(1))
    labels = torch.full((BATCH * SIZE,), IGNORE_INDEX)
    labels[masked] = torch.arange(len(masked)) % VOCABULARY
    return ids, labels.view(BATCH, SIZE)


@pytest.mark.parametrize("positions", [[0], [23], [5, 5, 0], list(range(24)), [7, 8, 15, 16], []], ids=str)
def test_scores_of_some_rows_match_those_of_all_rows(positions: list[int]):
    model, (ids, _) = tiny().eval(), batch([])
    dense = model(input_ids=ids).logits.reshape(-1, VOCABULARY)[positions]
    head, whole = MaskedHead(model), MaskedHead(tiny().eval(), sparse=False)
    for one, of in ((head, model), (whole, tiny().eval())):
        torch.testing.assert_close(one.logits(of, {"input_ids": ids}, torch.tensor(positions).long()), dense)
    assert model(input_ids=ids).logits.shape == (BATCH, SIZE, VOCABULARY), "rows of a forward pass stay for the next"


def test_only_the_requested_rows_reach_the_head():
    model, (ids, _) = tiny().eval(), batch([])
    seen: list[tuple[int, ...]] = []
    model.cls.register_forward_hook(lambda module, given, output: seen.append(tuple(output.shape)))
    MaskedHead(model).logits(model, {"input_ids": ids}, torch.tensor([1, 2]))
    assert seen == [(1, 2, VOCABULARY)]


def test_a_forward_pass_that_fails_leaves_no_rows_for_the_next():
    model, (ids, _) = tiny().eval(), batch([])
    head = MaskedHead(model)
    with pytest.raises(IndexError):
        head.logits(model, {"input_ids": ids + VOCABULARY}, torch.tensor([1]))
    assert model(input_ids=ids).logits.shape == (BATCH, SIZE, VOCABULARY)


def test_a_backbone_with_a_wrong_number_of_rows_is_an_error():
    model, (ids, _) = tiny().eval(), batch([])
    head = MaskedHead(model)
    head.expect(torch.tensor([1]), (BATCH, SIZE + 1))
    with pytest.raises(ValueError, match=r"the backbone gives \(3, 8\) rows for \(3, 9\) tokens"):
        model(input_ids=ids)


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_outputs_other_than_the_scores_are_kept(returns_tuple: bool):
    model, (ids, _) = tiny(output_hidden_states=True, return_dict=not returns_tuple).eval(), batch([])
    dense = model(input_ids=ids)
    MaskedHead(model).expect(None)
    head = MaskedHead(model)
    head.expect(torch.tensor([3]), (BATCH, SIZE))
    output = model(input_ids=ids)
    torch.testing.assert_close(output[0], dense[0].reshape(1, -1, VOCABULARY)[:, [3]])
    assert [one.shape for one in output[1]] == [one.shape for one in dense[1]]


@pytest.mark.parametrize(
    ("kind", "vocabulary", "blocks", "size", "expected"),
    [
        ("bert", 2**15, 8, 512, 128),  # 2^25 scores: 128 tokens of each block
        ("bert", 2**15, 8, 100, 100),
        ("bert", 2**15, 9, 512, 128),
        ("bert", 2**15, 1, 4096, 1024),
        ("bert", 2**15, 1, 1023, 1023),
        ("bert", 2**15, 4, 4096, 256),
        ("bert", 2**15 + 1, 4, 4096, 128),  # rounded down to a power of two
        ("bert", 2**25, 2, 4096, 128),
        ("bert", 1, 1, 2**26, 2**25),
        ("perceiver", 2**15, 8, 512, 512),
        ("big_bird", 2**15, 8, 4096, 4096),
    ],
)
def test_the_head_is_checked_on_few_scores(kind: str, vocabulary: int, blocks: int, size: int, expected: int):
    config = SimpleNamespace(model_type=kind, get_text_config=lambda: SimpleNamespace(vocab_size=vocabulary))
    assert checked_length(config, blocks, size) == expected


@pytest.mark.parametrize("training", [True, False])
def test_a_check_keeps_the_mode_of_the_model_and_skips_a_dense_head(training: bool, capsys):
    model, (ids, _) = tiny().train(training), batch([])
    head = MaskedHead(model)
    check_head(head, model, {"input_ids": ids}, "no")
    assert (head.sparse, model.training) == (True, training)
    head.sparse = False
    check_head(head, model, {}, "no")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[:3], r"logits of shape \(3, 20\) for \(32, 20\)"),
        (lambda rows: rows.flip(0), "logits differ by"),
        (lambda rows: rows[99], "IndexError"),
    ],
)
def test_a_head_that_mixes_up_rows_is_used_on_all_of_them(change: Any, says: str, monkeypatch, capsys):
    model, (ids, _) = tiny().eval(), batch([])
    head, logits = MaskedHead(model), MaskedHead.logits
    monkeypatch.setattr(head, "logits", lambda *given: change(logits(head, *given)))
    check_head(head, model, {"input_ids": ids}, "no")
    assert not head.sparse
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize("masked", [1, 2, 7, 8, 9, 16, 17, 24])
def test_the_loss_of_masked_rows_is_the_models_own(masked: int):
    ids, labels = batch(list(range(24))[24 - masked :])
    found = []
    for model in (tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) for _ in range(2)):
        found.append(sparse_head(model.train()) if found else model.train())
    dense, sparse = (model(input_ids=ids, labels=labels) for model in found)
    assert sparse.logits.shape == (1, -(-masked // 8) * 8, VOCABULARY)
    torch.testing.assert_close(sparse.loss, dense.loss)
    for output in (dense, sparse):
        output.loss.backward()
    gradients = [[parameter.grad for parameter in model.parameters()] for model in found]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_without_labels_and_outside_of_training_all_rows_are_computed():
    model, (ids, labels) = sparse_head(tiny().train()), batch([3])
    assert model.training
    rows = (BATCH, SIZE, VOCABULARY)
    assert model(input_ids=ids).logits.shape == rows
    assert model(input_ids=ids, labels=labels).logits.shape == (1, 8, VOCABULARY)
    assert model(input_ids=ids, labels=None).logits.shape == rows
    model.eval()
    assert model(input_ids=ids, labels=labels).logits.shape == rows
    assert sparse_head(model) is model, "a second call adds no more hooks"
    assert len(model._forward_pre_hooks) == 1


def test_labels_are_gathered_with_the_rows_and_padding_is_ignored():
    model, (ids, labels) = sparse_head(tiny().train()), batch([3, 20])
    given: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda module, arguments, named: given.append(named["labels"]), with_kwargs=True)
    model(input_ids=ids, labels=labels)
    assert given[0].tolist() == [[0, 1] + [IGNORE_INDEX] * 6]


@pytest.mark.parametrize("positions", [2, 8, 64])
def test_the_loss_is_checked_on_no_more_tokens_than_the_model_has_positions(positions: int):
    model = tiny(max_position_embeddings=positions)
    assert sparse_head(model) is model


def test_the_loss_of_a_model_without_padding_is_checked():
    assert sparse_head(tiny(pad_token_id=None)).training


def test_a_forward_pass_with_labels_that_fails_leaves_no_rows_for_the_next():
    model, (ids, labels) = sparse_head(tiny().train()), batch([3])
    with pytest.raises(IndexError):
        model(input_ids=ids + VOCABULARY, labels=labels)
    assert model(input_ids=ids).logits.shape == (BATCH, SIZE, VOCABULARY)


def test_a_model_without_a_separate_backbone_uses_the_dense_head():
    model, (ids, _) = tiny().eval(), batch([])
    dense = model(input_ids=ids).logits
    model.base_model_prefix = "none_of_its_modules"
    head = MaskedHead(model)
    assert not head.sparse
    found = head.logits(model, {"input_ids": ids}, torch.tensor([9, 2]))
    torch.testing.assert_close(found, dense.reshape(-1, VOCABULARY)[[9, 2]])
    assert not model._forward_hooks
    MaskedHead(model := tiny(), sparse=False)
    assert not model.bert._forward_hooks, "the dense head needs no hook"


class Shifted(torch.nn.Module):
    """A head that adds an error to its scores if the batch has one row, and raises if the error is infinite."""

    def __init__(self, plain: torch.nn.Module, amount: float):
        super().__init__()
        self.plain, self.amount = plain, amount

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.amount == math.inf and len(hidden) == 1:
            raise TypeError("needs whole blocks\nand says so at length")
        scores = self.plain(hidden)
        return scores + self.amount * scores.abs().max() if len(hidden) == 1 else scores


@pytest.mark.parametrize(
    ("amount", "precision", "message"),
    [
        (0.0, "no", None),
        (0.5e-4, "no", None),
        (2e-4, "no", "logits differ by 2.0e-04 of the largest"),
        (4e-2, "bf16", None),
        (6e-2, "bf16", "logits differ by 6.0e-02 of the largest"),
        (1e-2, "fp16", None),
        (3e-2, "fp16", "logits differ by 3.0e-02 of the largest"),
        (math.nan, "no", "logits differ by inf of the largest"),
        (math.inf, "no", "TypeError: needs whole blocks"),
    ],
)
def test_a_head_that_gives_different_scores_for_fewer_rows_is_not_used(amount, precision, message, capsys):
    model, (ids, _) = tiny().eval(), batch([])
    model.cls = Shifted(model.cls, amount)
    head = MaskedHead(model)
    check_head(head, model, {"input_ids": ids}, precision)
    assert head.sparse == (message is None)
    said = capsys.readouterr().err
    assert (said == "") if message is None else (f"{message}; all positions go through the head" in said)


def test_a_model_whose_loss_would_change_is_refused_and_left_as_it_was():
    model, (ids, labels) = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).eval(), batch([3, 4])
    dense = model(input_ids=ids, labels=labels).loss
    first = model.cls.predictions.decoder.register_forward_hook(lambda _, given, scores: scores * min(len(scores), 2))
    with pytest.raises(ModelError, match="the masked-only head gives another loss"):
        sparse_head(model)
    assert not model.training
    first.remove()
    assert model.train()(input_ids=ids, labels=labels).logits.shape == (BATCH, SIZE, VOCABULARY)
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, dense)
