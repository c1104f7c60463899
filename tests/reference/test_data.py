"""Order, masks and packing are those of the reference, bit for bit."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
from proteins import ESM, sequences, write_esm
from transformers import AutoTokenizer

from cloze.data.batches.collator import MaskingCollator
from cloze.data.batches.layout import Layout
from cloze.data.batches.masking import Masking
from cloze.data.batches.word_boundaries import words_of
from cloze.data.prepared.shards import open_prepared
from reference.masks import Rule
from reference.order import batch_size, samples_of, samples_of_rank
from reference.packing import flat
from reference.runs import BLOCK, Corpus, packed, prepare_blocks

PLAIN = ("counter", "masks", "order", "packing", "scores", "training")
ALLOWED = {"numpy", "torch", "transformers", "reference"}


@pytest.mark.parametrize("name", PLAIN)
def test_the_reference_imports_nothing_of_cloze(name: str):
    for node in ast.walk(ast.parse(Path(__file__).with_name(f"{name}.py").read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert {module.split(".")[0] for module in modules} <= ALLOWED | set(sys.stdlib_module_names)


@pytest.mark.parametrize("warmup", [(1, 0), (1, 1), (3, 1), (2, 5), (8, 4), (1, 7)])
@pytest.mark.parametrize(("per_device", "accumulation", "world_size", "size"), [
    (8, 1, 1, None), (2, 4, 1, None), (2, 2, 2, None), (3, 1, 3, 8), (1, 3, 3, 8), (2, 1, 4, None),
])  # fmt: skip
def test_ranks_take_the_samples_that_the_documented_layout_gives(per_device, accumulation, world_size, size, warmup):
    for rank in range(world_size):
        layout = Layout(per_device, accumulation, rank, world_size, size, *warmup)
        assert layout.global_batch == 8
        for step in range(10):
            assert layout.batch_sizes.size(step) == batch_size(step, 8, *warmup)
            expected = samples_of_rank(samples_of(step, 8, *warmup), rank, world_size, per_device)
            found = [layout.samples(step, micro) for micro in range(layout.micro_steps(step))]
            assert [[s for s in each.tolist() if s >= 0] for each in found] == expected


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("shares", [(0.15, 0.8, 0.1, None), (0.4, 0.0, 1.0, None), (1.0, 0.5, 0.5, 0.2)])
def test_masks_are_those_of_the_documented_draws(corpus: Corpus, kind: str, unit: str, shares):
    tokenizer = corpus.tokenizer(kind)
    stream = flat(corpus.documents(kind, corpus.texts[:40]))
    blocks = np.array(stream[: 24 * 29], np.int32).reshape(24, 29)
    samples = np.array([0, 1, 2, 3, 10, 11, 12, 99, *range(2**40, 2**40 + 16)], np.int64)
    rate, mask, random, end = shares
    masking = Masking(
        mask_token_id=tokenizer.mask_token_id,
        vocab_size=len(tokenizer),
        special_token_ids=tuple(tokenizer.all_special_ids),
        seed=5,
        mlm_probability=rate,
        mask_replace_prob=mask,
        random_replace_prob=random,
        mlm_probability_end=end,
        total_samples=100,
        words=None if unit == "token" else words_of(tokenizer),
        spans=unit == "span",
    )
    rule = Rule(tokenizer, 5, rate, mask, random, unit, end, 100)
    assert_same_masks(masking.apply(blocks, samples), rule, blocks, samples)
    fixed = Rule(tokenizer, 5, rate if end is None else end, mask, random, evaluation=True)
    assert_same_masks(masking.for_evaluation().apply(blocks, samples), fixed, blocks, samples)


def assert_same_masks(found, rule: Rule, blocks, samples) -> None:
    for block, sample, input_ids, labels in zip(blocks.tolist(), samples.tolist(), *found, strict=True):
        assert rule.mask(block, sample) == (input_ids.tolist(), labels.tolist())


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_random_tokens_are_all_tokens_added_ones_too(corpus: Corpus, unit: str):
    tokenizer = corpus.tokenizer("bpe")
    tokenizer.add_tokens([f"galaxy{number}" for number in range(200)])
    rule = Rule(tokenizer, 3, 0.5, 0.0, 1.0, unit)
    collator = MaskingCollator(tokenizer, 0.5, 0.0, 1.0, unit, seed=3)
    odd = [
        "inagalaxy7ness of the.galaxy8.",
        "'quoted' galaxy9galaxy10 (and more)",
        "12galaxy11 12",
        "(it)",
        "a<unk>b. <unk>.<unk>",
        "a  b   c\n\nd\t e 3.14",
    ]
    texts = [tokenizer(text)["input_ids"] for text in [*corpus.texts[:4], *5 * odd]]
    assert_same_batch(collator, rule, texts)
    batch = collator([{"input_ids": text, "sample": number} for number, text in enumerate(texts)])
    shown = batch["input_ids"][batch["labels"] >= 0]
    assert (shown >= tokenizer.vocab_size).any()


def assert_same_batch(collator: MaskingCollator, rule: Rule, texts: list[list[int]]) -> None:
    batch = collator([{"input_ids": text, "sample": number} for number, text in enumerate(texts)])
    for number, text in enumerate(texts):
        found = [batch[key][number, : len(text)].tolist() for key in ("input_ids", "labels")]
        assert found == list(rule.mask(text, number)), number


def test_ids_without_a_token_are_never_shown(tmp_path: Path):
    twice = [*ESM[:8], ESM[20], *ESM[8:15], ESM[21], ESM[22], *ESM[15:]]  # the later of two lines has the token
    tokenizer = AutoTokenizer.from_pretrained(write_esm(tmp_path / "esm", twice))
    missing = set(range(max(tokenizer.get_vocab().values()))) - set(tokenizer.get_vocab().values())
    assert len(missing) == 3
    rule, texts = Rule(tokenizer, 3, 1.0, 0.0, 1.0), [tokenizer(text)["input_ids"] for text in sequences(10)]
    assert_same_batch(MaskingCollator(tokenizer, 1.0, 0.0, 1.0, seed=3), rule, texts)


@pytest.mark.parametrize(("kind", "packing"), [("bpe", "concat"), ("wordpiece", "best_fit")])
def test_blocks_are_those_of_the_documented_packing(corpus: Corpus, tmp_path: Path, kind: str, packing: str):
    texts = corpus.texts
    units = [texts[:70], texts[70:]]
    data = open_prepared(prepare_blocks(corpus, kind, tmp_path / "data", units, packing))
    blocks = data.blocks("train")
    expected = packed(corpus, kind, units, packing)
    every = np.arange(len(blocks))
    pad = corpus.tokenizer(kind).pad_token_id
    texts_of = [flat(block) for block in expected]
    assert blocks.read(every).tolist() == [text + [pad] * (BLOCK - len(text)) for text in texts_of]
    if packing == "best_fit":
        found = [[int((row == piece).sum()) for piece in np.unique(row)] for row in blocks.read_segments(every)]
        pieces = [[len(piece) for piece in block] for block in expected]
        padding = [[BLOCK - sum(block)] if sum(block) < BLOCK else [] for block in pieces]
        assert found == [block + more for block, more in zip(pieces, padding, strict=True)]
