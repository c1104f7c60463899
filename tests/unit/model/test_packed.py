"""Attention stays inside documents: every document of a block gets the logits it has alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_models import make

from cloze.data.batches.make_batch import document_offsets
from cloze.data.batches.masking import IGNORE_INDEX
from cloze.errors import ModelError
from cloze.model.packed import DocumentAttention, document_attention, model_inputs, positions_in_documents


@pytest.mark.parametrize("pad", [0, 7])
def test_the_check_of_masks_uses_no_padding(pad: int):
    """With 8 tokens, every eighth token of the check would be padding, which has no position in RoBERTa."""
    found = document_attention(make("roberta", vocab_size=8, pad_token_id=pad), 64, 8)
    assert (found.form, found.first_position) == ("boolean", pad + 1)


def test_a_model_without_padding_keeps_documents_apart():
    model = make("bert")
    model.config.pad_token_id = None
    assert document_attention(model, 64, 300).form == "boolean"


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


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_attention_computes_in_the_type_of_the_weights(dtype: torch.dtype):
    """DeepSpeed runs models without autocast."""
    model = make("roberta", "eager")
    rule = document_attention(model, 64, 300)
    assert rule.form == "additive"
    segments = torch.tensor([[0] * 20 + [1] * 44])
    offsets = torch.from_numpy(document_offsets(segments.numpy()))
    ids = torch.randint(5, 300, (1, 64), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": ids, "segments": segments, "document_offsets": offsets}
    exact = model(**model_inputs(batch, torch.device("cpu"), rule.in_dtype_of(model))).logits
    model.to(dtype)
    logits = model(**model_inputs(batch, torch.device("cpu"), rule.in_dtype_of(model))).logits
    assert logits.dtype == dtype
    assert (logits.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("model_type", ["fnet", "deberta-v2"])
def test_an_architecture_without_such_masks_is_refused(model_type: str):
    with pytest.raises(ModelError, match=r"inside documents.*--packing concat"):
        document_attention(make(model_type, "eager"), 64, 300)


def test_positions_begin_anew_with_each_document():
    segments = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 0, 1, 2, 0], [0] * 6, [0, 1, 2, 3, 4, 5]]
    assert positions_in_documents(segments).tolist() == expected


def test_blocks_without_documents_are_given_as_they_are():
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    assert list(model_inputs(batch, torch.device("cpu"), None)) == ["input_ids"]


@pytest.mark.parametrize("size", [8, 15, 16, 17])
def test_the_check_of_masks_has_three_documents_even_in_the_smallest_blocks(size: int):
    """Each has at least one token, although a sixteenth of fewer than 16 tokens rounds to 0."""
    rule = document_attention(make("bert"), size, 300)
    assert (rule.form, rule.first_position, rule.window) == ("boolean", 0, None)


FEW = settings(max_examples=15, deadline=None, derandomize=True, database=None)
ROWS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3)


def segments_of(rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Return the document of each token; one more document fills each row up to the longest."""
    size = max(map(sum, rows))
    counts = [[*row, size - sum(row)] for row in rows]
    return torch.tensor([[number for number, n in enumerate(row) for _ in range(n)] for row in counts])


@FEW
@given(ROWS, st.none() | st.integers(0, 6), st.none() | st.integers(0, 2))
@example([(1,)], None, None)  # one document of one token
@example([(1, 1, 1), (3,)], 0, 0)
@example([(5,), (2, 3)], 1, 1)
@example([(4, 4)], 4, 2)  # a window as long as the documents
def test_a_token_sees_only_its_own_document_and_there_only_the_window(rows, window: int | None, first: int | None):
    segments = segments_of(rows)
    batch, size = segments.shape
    offsets = torch.from_numpy(document_offsets(segments.numpy()))
    for limit in {None, window}:
        expected = torch.tensor([
            [[one == other and (limit is None or abs(q - k) <= limit) for k, other in enumerate(row)]
             for q, one in enumerate(row)] for row in segments.tolist()
        ])  # fmt: skip
        name = "full_attention" if limit is None else "sliding_attention"
        for form in ("boolean", "additive", "square", "flex"):
            found = DocumentAttention(form, first, window).inputs(segments, offsets)
            mask = found["attention_mask"] if window is None else found["attention_mask"][name]
            if form == "boolean":
                assert torch.equal(mask, expected[:, None])
            elif form == "square":
                assert torch.equal(mask, expected.long())
            elif form == "additive":
                lowest = torch.finfo(torch.float32).min
                assert torch.equal(mask, torch.where(expected, 0.0, lowest)[:, None])
            else:
                b, q, k = torch.meshgrid(torch.arange(batch), torch.arange(size), torch.arange(size), indexing="ij")
                assert torch.equal(mask.mask_mod(b, torch.zeros_like(b), q, k), expected)
                assert mask.shape == (batch, 1, size, size)
            places = found.pop("position_ids", None)
            assert (places is None) == (first is None)
            if first is not None:
                counted = [
                    [row[:place].count(one) + first for place, one in enumerate(row)] for row in segments.tolist()
                ]
                assert places.tolist() == counted
            assert set(found) == {"attention_mask"}


@pytest.mark.parametrize("first", [None, 0, 2])
def test_flash_attention_is_given_the_offsets_of_documents(first: int | None):
    segments = segments_of([(1, 2), (3,)])
    offsets = torch.from_numpy(document_offsets(segments.numpy()))
    found = DocumentAttention("varlen", first).inputs(segments, offsets)
    assert found["cu_seq_lens_q"] is found["cu_seq_lens_k"] is offsets
    assert found["max_length_q"] == found["max_length_k"] == 3
    assert "attention_mask" not in found
    assert ("position_ids" in found) == (first is not None)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_decoder_reads_the_original_text_shifted_by_one(size: int):
    ids, labels = torch.full((2, size), 4), torch.full((2, size), IGNORE_INDEX)
    ids[0] = torch.arange(10, 10 + size)
    labels[1] = torch.arange(20, 20 + size)
    inputs = model_inputs({"input_ids": ids, "labels": labels}, torch.device("cpu"), None, decoder_start=2)
    assert inputs["decoder_input_ids"].tolist() == [[2, *range(9 + b, 8 + b + size)] for b in (1, 11)]
    assert torch.equal(inputs["input_ids"], ids)
    rule = DocumentAttention("boolean", 0)
    assert set(model_inputs({"input_ids": ids, "labels": labels}, torch.device("cpu"), rule)) == {"input_ids"}
