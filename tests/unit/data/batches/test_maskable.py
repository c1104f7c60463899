"""Where nothing can be masked nothing is trained, and a step without masked tokens has no loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from corpus import TINY_MODEL
from ranks import cloze_ranks, succeed
from tokenizer_files import saved, words

from cloze.config import PrepareConfig
from cloze.data.batches.maskable import SAMPLE_BLOCKS, check_maskable, maskable_share
from cloze.data.prepare.pipeline import prepare
from cloze.errors import DataError
from cloze.evaluation.perplexity import Scores, perplexity

MANIFEST = {"tokenizer": {"special_token_ids": [0, 1, 2, 3], "pad_token_id": 0}}


class Held:
    """Blocks in memory, which count how many of them were read."""

    block_size, has_pieces = 8, False

    def __init__(self, blocks: np.ndarray):
        self.blocks, self.reads = blocks.astype(np.int32), 0

    def __len__(self) -> int:
        return len(self.blocks)

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.reads += len(indices)
        return self.blocks[indices]

    def read_segments(self, indices: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def test_blocks_of_unknown_tokens_are_refused(capsys):
    with pytest.raises(DataError, match=r"^x: train: none .*masked"):
        check_maskable(Held(np.ones((5000, 8))), MANIFEST, "x: train")
    assert not capsys.readouterr().err


def test_one_token_that_can_be_masked_is_found_wherever_it_is(capsys):
    blocks = np.ones((20_000, 8))
    blocks[19_991, 3] = 9
    check_maskable(Held(blocks), MANIFEST, "x")
    assert "only 0.0% of its tokens can be masked" in capsys.readouterr().err


def test_of_ordinary_blocks_a_sample_is_read(capsys):
    held = Held(np.full((20_000, 8), 9))
    check_maskable(held, MANIFEST, "x")
    assert held.reads == SAMPLE_BLOCKS
    assert not capsys.readouterr().err


def test_without_masked_tokens_there_is_no_perplexity():
    scores = Scores(np.zeros((3, 5)))
    assert math.isnan(scores.loss)
    assert math.isnan(scores.perplexity)
    assert perplexity(700.0) == math.inf


def test_padding_is_no_token():
    blocks = np.array([[9, 9, 0, 0], [9, 1, 0, 0]], np.int32)
    assert maskable_share(blocks, MANIFEST) == 3 / 8
    assert maskable_share(blocks, MANIFEST | {"packing": "best_fit"}) == 3 / 4
    assert maskable_share(blocks[:, 2:], MANIFEST | {"packing": "best_fit"}) == 0.0


def test_training_refuses_a_corpus_that_the_tokenizer_does_not_know(tmp_path: Path):
    corpus = tmp_path / "dna.txt"
    name = saved(tmp_path / "tokenizer", *words())
    prepared = str(tmp_path / "prepared")
    values = {"block_size": 8, "validation_split_percentage": 0.0, "num_proc": 1}
    corpus.write_text("".join(f"{'acgt' * 40}\n" for _ in range(100)))
    prepare(PrepareConfig(dataset_name=str(corpus), tokenizer_name=name, output=prepared, **values))
    argv = [
        "train",
        *TINY_MODEL,
        "--max_steps",
        "2",
        "--dataset_name",
        prepared,
        "--output_dir",
        str(tmp_path / "run"),
    ]
    outcome = cloze_ranks(argv, 1, "single", tmp_path / "log")[0]
    assert outcome.code == 2, outcome.output
    assert "train: none of its tokens can be masked" in outcome.output.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_step_without_masked_tokens_has_no_loss(prepared: Path, tmp_path: Path, engine: str):
    argv = ["train", *TINY_MODEL, "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no"]
    argv += ["--per_device_train_batch_size", "2", "--mlm_probability", "1e-9", "--dataset_name", str(prepared)]
    argv += ["--eval_strategy", "steps", "--eval_steps", "2", "--output_dir", str(tmp_path / "run")]
    succeed(cloze_ranks(argv, 2, engine, tmp_path / "log"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [None, None]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [None]
