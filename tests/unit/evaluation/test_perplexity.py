"""Scores of blocks are sums over their masked tokens, for any number of ranks and blocks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloze.data.batches.masking import IGNORE_INDEX, Masking
from cloze.evaluation.perplexity import Interrupted, Scores, TokenFacts, perplexity, score_batch, score_blocks

VOCABULARY, SIZE = 13, 5
MASKING = Masking(4, VOCABULARY, (0, 1, 2, 3, 4), seed=3, mlm_probability=0.5).for_evaluation()
FACTS = TokenFacts(torch.arange(VOCABULARY) % 4, torch.arange(VOCABULARY) % 3, ("often", "seldom", "never"))
LOGITS = torch.randn(VOCABULARY, SIZE, VOCABULARY, generator=torch.Generator().manual_seed(0))


class Blocks:
    """Blocks of random tokens."""

    block_size, has_pieces = SIZE, False

    def __init__(self, count: int):
        self.ids = np.random.default_rng(count).integers(3, VOCABULARY, (count, SIZE)).astype(np.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self.ids[indices]


def logits_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return logits [K, V] that depend on the input token and its place in the block."""
    flat, places = batch["input_ids"].reshape(-1), batch["positions"]
    return LOGITS[flat[places], places % SIZE]


def on_rank(rank: int, world_size: int) -> SimpleNamespace:
    """Return what `score_blocks` needs of an accelerator; the test itself sums over ranks."""
    return SimpleNamespace(
        device=torch.device("cpu"), num_processes=world_size, process_index=rank, reduce=lambda tensor, _: tensor
    )


def one_by_one(blocks: Blocks, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the table and the bands, computed one token at a time."""
    table, bands = np.zeros((len(blocks), 5)), np.zeros((3, 3))
    for draw in range(draws):
        samples = np.arange(len(blocks)) + draw * len(blocks)
        for block, (ids, labels) in enumerate(zip(*MASKING.apply(blocks.ids, samples), strict=True)):
            for place in np.flatnonzero(labels != IGNORE_INDEX):
                token, scores = int(labels[place]), LOGITS[ids[place], place].double()
                loss = float(scores.logsumexp(0) - scores[token])
                better = int((scores > scores[token]).sum())
                table[block] += [loss, 1, better < 1, better < 5, token % 4]
                bands[token % 3] += [loss, 1, better < 1]
    return table, bands


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 9), st.integers(1, 3))
@example(count=10, world_size=2, per_device=8, draws=1)  # a rank's share is smaller than a batch
@example(count=1, world_size=3, per_device=8, draws=2)  # two ranks have no block
@example(count=5, world_size=2, per_device=2, draws=1)  # the last batch of one rank is empty
@example(count=1, world_size=1, per_device=1, draws=1)
def test_the_ranks_score_every_block_once_with_each_of_its_masks(
    count: int, world_size: int, per_device: int, draws: int
):
    blocks = Blocks(count)
    parts = [
        score_blocks(logits_of, blocks, MASKING, per_device, on_rank(rank, world_size), facts=FACTS, draws=draws)
        for rank in range(world_size)
    ]
    table, bands = one_by_one(blocks, draws)
    assert parts[0].table.dtype == parts[0].bands.dtype == np.float64
    np.testing.assert_allclose(sum(part.table for part in parts), table, rtol=1e-5)
    np.testing.assert_allclose(sum(part.bands for part in parts), bands, rtol=1e-5)


def test_a_vote_to_stop_is_checked_before_each_batch_and_ends_the_scoring():
    votes, scored = iter([0, 0, 1]), []

    def counted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scored.append(len(batch["input_ids"]))
        return logits_of(batch)

    with pytest.raises(Interrupted):
        score_blocks(counted, Blocks(9), MASKING, 2, on_rank(0, 1), lambda: next(votes))
    assert scored == [2, 2]
    score_blocks(counted, Blocks(9), MASKING, 2, on_rank(0, 1), lambda: 0)  # one mask per block
    assert scored == [2] * 7


@pytest.mark.parametrize("size", [1, 4, 5, 6])
def test_the_best_five_are_all_tokens_of_a_small_vocabulary(size: int):
    logits, targets = torch.arange(float(size)).flip(0).repeat(size, 1), torch.arange(size)
    table, bands = score_batch(logits, targets, torch.zeros(size, dtype=torch.long), 1)
    assert table[0, 1:].tolist() == [size, 1, min(size, 5), 0]
    assert bands.shape == (0, 3)


def test_one_masked_token_is_scored_in_fp32_and_ignored_positions_are_not_scored():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).mul(8).bfloat16()
    targets = torch.tensor([IGNORE_INDEX, 7, IGNORE_INDEX])
    table, _ = score_batch(logits, targets, torch.tensor([0, 2, 1]), 3)
    expected = float(logits[1].double().logsumexp(0) - logits[1, 7].double())
    assert table[:, 0].tolist() == [0.0, 0.0, pytest.approx(expected, rel=1e-6)]
    assert table[:, 1].tolist() == [0.0, 0.0, 1.0]


def test_scores_are_ratios_of_the_sums_of_the_table():
    table = np.array([[6.0, 2, 1, 2, 8], [0, 0, 0, 0, 0], [3.0, 1, 0, 0, 4]])
    scores = Scores(table)
    assert (scores.blocks, scores.masked_tokens, scores.loss) == (3, 3, 3.0)
    assert (scores.masked_accuracy, scores.masked_accuracy_top5) == (1 / 3, 2 / 3)
    assert scores.bits_per_byte == pytest.approx(9 / math.log(2) / 12, rel=1e-15)
    assert scores.perplexity == math.exp(3)
    assert scores.loss_interval == (3.0, 3.0)  # the loss is the same in all blocks
    scattered = Scores(table + np.array([[1.0, 0, 0, 0, 0], [0] * 5, [-1.0, 0, 0, 0, 0]]))
    half = 1.959963984540054 * math.sqrt(3 / 2 * (1 + 1)) / 3
    assert scattered.loss_interval == pytest.approx((3 - half, 3 + half), rel=1e-12)
    assert scattered.perplexity_interval == pytest.approx((math.exp(3 - half), math.exp(3 + half)), rel=1e-12)
    assert Scores(table * [1, 1, 1, 1, 0]).bits_per_byte is None
    assert math.isnan(Scores(table * 0).masked_accuracy)


def test_a_perplexity_overflows_at_700_nats():
    below = math.nextafter(700, 0)
    assert (perplexity(0.0), perplexity(below), perplexity(700.0)) == (1.0, math.exp(below), math.inf)
