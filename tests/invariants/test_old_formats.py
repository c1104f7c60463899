"""What commit 246b5ea wrote is still read, and means the same.

`written_by_246b5ea.tar.xz` holds a corpus, the folder prepared from it, a run of four steps with a moving average
and its evaluation, made with the commands in `MADE_WITH` by that commit. Files of its formats exist outside of this
repository.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from ranks import cloze_ranks, succeed

from cloze.checkpoint.format import EMA, WEIGHT, read_manifest, verify_checkpoint
from cloze.checkpoint.reader import PieceReader
from cloze.data.prepared.verified import verify_prepared

ARCHIVE = Path(__file__).with_name("written_by_246b5ea.tar.xz")
MADE_WITH = """
cloze tokenizer --dataset_name corpus.jsonl --vocab_size 280 --output tok
cloze prepare --dataset_name corpus.jsonl --tokenizer_name tok --block_size 32 --output prepared
cloze train --dataset_name prepared --model_type roberta --config_overrides hidden_size=8,num_hidden_layers=1,\
num_attention_heads=2,intermediate_size=8,max_position_embeddings=34,\
hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0 --output_dir run --max_steps 4 --save_steps 2 \
--eval_strategy steps --eval_steps 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 \
--logging_steps 1 --learning_rate 1e-2 --ema_decay 0.9 --seed 1
cloze consolidate run --output model
cloze evaluate model --data prepared --output eval.json
"""
TRAIN = MADE_WITH.splitlines()[3].split()[1:]
TOLERANCE = 1e-3  # relative, as in test_golden.py


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_prepared_folder_is_read_and_made_again_to_the_byte(old: Path):
    verify_prepared(old / "prepared")
    command = ["prepare", "--dataset_name", "corpus.jsonl", "--tokenizer_name", "prepared/tokenizer"]
    succeed(cloze_ranks([*command, "--block_size", "32", "--output", "again"], 1, "ddp", old / "log"))
    for split in ("train", "validation"):
        shard = f"{split}/data-00000-of-00001.arrow"
        assert (old / "again" / shard).read_bytes() == (old / "prepared" / shard).read_bytes()


def test_a_checkpoint_holds_weights_moments_and_the_moving_average(old: Path):
    folder = old / "run" / "checkpoint-4"
    manifest = verify_checkpoint(folder)
    assert manifest == read_manifest(folder)
    assert manifest["position"]["global_step"] == 4
    with PieceReader(folder, manifest) as pieces:
        for name in manifest["parameters"]:
            assert pieces.keys(name) == [EMA, "exp_avg", "exp_avg_sq"]
            assert pieces.numbers(name) == {"step": 4.0}
            assert pieces.read(name, WEIGHT).isfinite().all()


@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 1), ("zero2", 2)])
def test_a_run_resumes_as_if_it_had_never_stopped(old: Path, engine: str, world_size: int):
    before = metrics_of(old / "run")
    shutil.rmtree(old / "run" / "checkpoint-4")
    split = ["--gradient_accumulation_steps", str(2 // world_size), "--resume_from_checkpoint", "auto"]
    succeed(cloze_ranks([*TRAIN, *split], world_size, engine, old / "log"))
    after = metrics_of(old / "run")
    assert [line["step"] for line in after] == [line["step"] for line in before]
    for was, now in zip(before, after, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_masked_accuracy"):
            assert (key in was) == (key in now)
            assert now.get(key, 0.0) == pytest.approx(was.get(key, 0.0), rel=TOLERANCE), (was["step"], key)


def test_a_run_is_consolidated_evaluated_reported_and_described(old: Path):
    expected = json.loads((old / "eval.json").read_text())["perplexity"]
    log = old / "log"
    succeed(cloze_ranks(["consolidate", "run", "--output", "model"], 1, "ddp", log))
    succeed(cloze_ranks(["consolidate", "run", "--weights", "ema", "--output", "average"], 1, "ddp", log))
    succeed(cloze_ranks(["evaluate", "model", "--data", "prepared", "--output", "now.json"], 1, "ddp", log))
    assert json.loads((old / "now.json").read_text())["perplexity"] == pytest.approx(expected, rel=TOLERANCE)
    succeed(cloze_ranks(["report", "run", "--output", "report.html"], 1, "ddp", log))
    assert "roberta" in (old / "report.html").read_text()
    assert (old / "model" / "README.md").is_file()
    succeed(cloze_ranks(["replay", "run", "--step", "3"], 1, "ddp", log))
