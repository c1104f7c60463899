"""Real ELI5 threads through the real RoBERTa and BERT tokenizers: the tutorial's blocks, and a loss that falls."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
from ranks import cloze_ranks, succeed
from transformers import AutoTokenizer

from cloze.config import PrepareConfig
from cloze.data.prepare.pipeline import prepare


def prepare_threads(shared_data: Path, output: Path, tokenizer: str, split: str, block_size: int = 128) -> Path:
    corpus = shared_data / "eli5_category" / "eli5-category-validation-2.json.gz"
    config = PrepareConfig(
        dataset_name=str(corpus),
        tokenizer_name=str(shared_data / "tokenizers" / tokenizer),
        text_field="answers.text",
        split=split,
        block_size=block_size,
        output=str(output),
    )
    prepare(config)
    return output


@pytest.mark.parametrize("tokenizer", ["roberta-base", "bert-base-uncased"])
def test_blocks_of_real_threads_are_the_tutorials(shared_data: Path, tmp_path: Path, tokenizer: str):
    folder = prepare_threads(shared_data, tmp_path / "p", tokenizer, "train[:300]")
    with gzip.open(shared_data / "eli5_category" / "eli5-category-validation-2.json.gz", "rt") as file:
        threads = json.load(file)[:300]
    encode = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / tokenizer)
    sides: dict[str, list[int]] = {"train": [], "validation": []}
    from cloze.data.prepare.unit import is_validation

    for thread in threads:
        side = "validation" if is_validation(thread["q_id"], 5.0) else "train"
        sides[side] += encode(" ".join(thread["answers"]["text"]), verbose=False)["input_ids"]
    loaded = datasets.load_from_disk(str(folder))
    for side, stream in sides.items():
        assert loaded[side]["input_ids"][:] == [stream[i : i + 128] for i in range(0, len(stream) // 128 * 128, 128)]


def test_the_loss_falls_on_real_threads(shared_data: Path, tmp_path: Path):
    """A narrow RoBERTa with the real vocabulary, from scratch, two ranks, ZeRO-2."""
    folder = prepare_threads(shared_data, tmp_path / "p", "roberta-base", "train[:200]", block_size=64)
    narrow = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
    argv = ["train", "--dataset_name", str(folder), "--output_dir", str(tmp_path / "run"), "--max_steps", "30"]
    argv += ["--config_name", str(shared_data / "tokenizers" / "roberta-base"), "--config_overrides", narrow]
    argv += ["--learning_rate", "1e-2", "--logging_steps", "5", "--save_strategy", "no", "--warmup_steps", "5"]
    argv += ["--per_device_train_batch_size", "4"]
    succeed(cloze_ranks(argv, 2, "zero2", tmp_path / "log"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > 10
    assert losses[-1] < 0.85 * losses[0]
