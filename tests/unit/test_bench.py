"""`cloze bench` runs every peer and prints what it measured; how fast anything is, is not asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloze.cli import main


def bench(*argv: object) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["bench", *(str(word) for word in argv)])
    assert not leaving.value.code


def test_prepare_is_measured_beside_the_tutorial_and_the_tokenizers(tmp_path: Path, capsys):
    output = tmp_path / "bench.json"
    bench("prepare", "--megabytes", 1, "--num_proc", 2, "--work_dir", tmp_path / "work", "--output", output)
    found = json.loads(output.read_text())
    rates = {row[0].strip(): row[1:] for row in found["rows"]}
    for name in (
        "cloze prepare, .jsonl",
        "cloze prepare, .parquet",
        "cloze prepare, .jsonl.gz",
        "tokenizers alone, in memory",
        "tutorial: map + group_texts, .jsonl",
        "one process: read",
        "one process: parse",
        "one process: tokenize",
        "one process: pack",
        "one process: write and hash",
    ):
        seconds, megabytes, tokens, _ = rates[name]
        assert seconds > 0
        assert megabytes > 0
        assert tokens > 0
    assert rates["tutorial: map + group_texts, .jsonl"][-1] == 1.0
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["packages"]["datasets"]
    assert "cloze prepare, .parquet" in capsys.readouterr().out
    assert list((tmp_path / "work").iterdir()) == []


def test_the_loader_is_measured_on_a_folder_of_its_own(tmp_path: Path):
    output = tmp_path / "bench.json"
    bench("loader", "--num_blocks", 70_000, "--block_size", 16, "--work_dir", tmp_path / "work", "--output", output)
    found = json.loads(output.read_text())
    assert found["title"] == "70,000 blocks of 16"
    figures = {row[0]: row[1] for row in found["rows"]}
    assert figures["opening the folder"] > 0
    assert figures["blocks read meanwhile"] > 0
    assert figures["first batch of a run that goes on at step 1,000,000"] > 0
    assert list((tmp_path / "work").iterdir()) == []


def test_saving_is_measured_beside_torch_save(tmp_path: Path):
    output = tmp_path / "bench.json"
    size = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,vocab_size=600"
    bench("save", "--config_overrides", size, "--work_dir", tmp_path / "work", "--output", output)
    rows = {row[0]: row[1:] for row in json.loads(output.read_text())["rows"]}
    for name in ("torch.save, flushed", "cloze, blocking", "cloze, --async_save, after that"):
        waits, whole, _ = rows[name]
        assert 0 < waits <= whole
    assert rows["load it, compare checksums"][0] > 0
    assert list((tmp_path / "work").iterdir()) == []


def test_training_is_measured_beside_trainer_and_a_bare_loop(tmp_path: Path):
    output = tmp_path / "bench.json"
    words = ["--sizes", "tiny-32", "--rounds", 2, "--steps", 2, "--work_dir", tmp_path / "work"]
    bench("train", *words, "--output", output)
    rows = {row[0]: row[1:] for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == [
        "tiny-32: cloze train", "tiny-32: transformers Trainer", "tiny-32: bare PyTorch loop, sparse head"
    ]  # fmt: skip
    for tokens, slowest, fastest, step, _, peak, ratio in rows.values():
        assert 0 < slowest <= tokens <= fastest
        assert step > 0
        assert peak > 0
        assert ratio > 0
    assert rows["tiny-32: transformers Trainer"][-1] == 1.0
    assert list((tmp_path / "work").iterdir()) == []
