"""Training on a corpus instead of a prepared folder, on a stream, and on blocks whose documents stay apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from checkpoints import assert_same_checkpoint
from corpus import TINY_MODEL, TINY_MODEL_NO_DROPOUT
from flash_stand_in import NAME, install
from ranks import cloze_ranks, succeed

import cloze.training.prepare_model
from cloze.config import EvaluateConfig, PrepareConfig
from cloze.data.prepare.pipeline import prepare
from cloze.data.prepared.shards import open_prepared
from cloze.evaluation.evaluate import evaluate
from cloze.evaluation.evaluator import Masks, open_subject

BATCH = ["--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"]
BLOCKS = ["--block_size", "32", "--text_field", "answers.text", "--validation_split_percentage", "10"]


def corpus_flags(prepared: Path) -> list[str]:
    """The corpus and tokenizer that `prepared` was made of."""
    return [
        "--dataset_name",
        str(prepared.parent / "corpus.jsonl"),
        "--tokenizer_name",
        str(prepared.parent / "tokenizer"),
    ]


CHANGING = ["--batch_size_warmup_steps", "8", "--batch_size_warmup_start", "2", "--mlm_probability_end", "0.4"]


@pytest.mark.parametrize(
    ("packing", "more"),
    [pytest.param("concat", [], marks=pytest.mark.slow), ("best_fit", [*CHANGING, "--mask_unit", "word"])],
)
def test_a_stream_goes_on_exactly_where_it_was(prepared: Path, tmp_path: Path, packing: str, more: list[str]):
    """Stopped twice, once inside a chunk and once in a later epoch; prefetched steps are not lost."""
    flags = [*TINY_MODEL, *BATCH, *BLOCKS, *corpus_flags(prepared), "--streaming_train", "--unit_size", "20KB"]
    flags += [*more, "--packing", packing, "--max_steps", "45", "--save_steps", "15", "--logging_steps", "5"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    succeed(cloze_ranks(["train", *flags, "--output_dir", str(whole)], 2, "zero1", tmp_path / "a"))
    for checkpoint in (whole / "checkpoint-15", resumed / "checkpoint-30"):
        here = [*flags, "--output_dir", str(resumed), "--resume_from_checkpoint", str(checkpoint)]
        succeed(cloze_ranks(["train", *here], 2, "zero1", tmp_path / "b"))
    assert_same_checkpoint(whole / "checkpoint-45", resumed / "checkpoint-45")
    places = json.loads((whole / "checkpoint-45" / "checkpoint.json").read_text())["stream"]
    assert len(places) == 2
    assert all(place["epoch"] >= 1 for place in places)

    other = [*flags, "--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(whole / "checkpoint-15")]
    outcomes = cloze_ranks(["train", *other], 1, "single", tmp_path / "c")
    assert outcomes[0].code == 2
    assert "world_size 2 -> 1" in outcomes[0].output


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--max_steps", "-1"], "a stream has no known length; give --max_steps"),
        (["--save_strategy", "epoch"], "save and evaluate by steps"),
        (["--unit_size", "1GB"], "2 processes, but the corpus has 1 parts; use a smaller --unit_size"),
        (["--eval_strategy", "steps"], "no validation blocks"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(prepared: Path, tmp_path: Path, more: list[str], expected: str):
    flags = [*TINY_MODEL, *BLOCKS, *corpus_flags(prepared), "--streaming_train", "--unit_size", "20KB"]
    flags += ["--max_steps", "4", "--output_dir", str(tmp_path / "run"), *more]
    outcomes = cloze_ranks(["train", *flags], 2, "ddp", tmp_path / "log")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert expected in outcomes[0].output
    assert not (tmp_path / "run" / "checkpoint-4").exists()


def test_a_corpus_is_prepared_once_and_then_taken_from_the_cache(prepared: Path, tmp_path: Path):
    flags = [*TINY_MODEL, *BATCH, "--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "4"]
    corpus = [*corpus_flags(prepared), *BLOCKS, "--prepared_cache_dir", str(tmp_path / "cache")]
    first, second, direct = tmp_path / "first", tmp_path / "second", tmp_path / "direct"
    outcomes = cloze_ranks(["train", *flags, *corpus, "--output_dir", str(first)], 2, "ddp", tmp_path / "a")
    succeed(outcomes)
    assert "from the cache" not in outcomes[0].output
    folders = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert folders[0].name.startswith("corpus-")
    made = folders[0].stat().st_mtime_ns
    outcomes = cloze_ranks(["train", *flags, *corpus, "--output_dir", str(second)], 2, "ddp", tmp_path / "b")
    succeed(outcomes)
    assert "from the cache" in outcomes[0].output
    assert folders[0].stat().st_mtime_ns == made
    ready = ["--dataset_name", str(prepared), "--output_dir", str(direct)]
    succeed(cloze_ranks(["train", *flags, *ready], 2, "ddp", tmp_path / "c"))
    assert_same_checkpoint(first / "checkpoint-4", second / "checkpoint-4")
    assert_same_checkpoint(first / "checkpoint-4", direct / "checkpoint-4")
    longer = [*corpus[:-4], "--validation_split_percentage", "20", *corpus[-2:]]
    succeed(cloze_ranks(["train", *flags, *longer, "--output_dir", str(tmp_path / "d")], 1, "single", tmp_path / "e"))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


@pytest.fixture(scope="module")
def documents(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of `prepared`, packed with best_fit."""
    output = tmp_path_factory.mktemp("best-fit") / "p"
    prepare(
        PrepareConfig(
            dataset_name=str(prepared.parent / "corpus.jsonl"),
            text_field="answers.text",
            tokenizer_name=str(prepared.parent / "tokenizer"),
            output=str(output),
            block_size=64,
            packing="best_fit",
            validation_split_percentage=10,
        )
    )
    return output


def test_a_run_on_documents_does_not_depend_on_its_split(documents: Path, tmp_path: Path):
    flags = [*TINY_MODEL_NO_DROPOUT, "--dataset_name", str(documents), "--max_steps", "6", "--logging_steps", "1"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "6", "--learning_rate", "1e-3", "--save_strategy", "no"]
    curves = []
    for ranks, batch, accumulation, engine in ((1, 8, 1, "single"), (2, 2, 2, "ddp"), (2, 4, 1, "zero3")):
        output = tmp_path / f"{engine}-{ranks}"
        split = ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
        succeed(cloze_ranks(["train", *flags, *split, "--output_dir", str(output)], ranks, engine, tmp_path / "log"))
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        curves.append([line.get("loss", line.get("eval_loss")) for line in lines])
    assert len(curves[0]) == 7
    for curve in curves[1:]:
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(curves[0]), rtol=2e-6, atol=0)


def flash_stands_in() -> None:
    """On a rank: flash attention with kernels in plain torch, on a CPU and in fp32."""
    install(pytest.MonkeyPatch())
    for check in ("check_attention", "check_half"):
        setattr(cloze.training.prepare_model, check, lambda *_: None)


@pytest.mark.slow
def test_a_run_with_flash_attention_has_the_curve_of_one_with_masks(documents: Path, tmp_path: Path):
    """Offsets of documents on their way through the loader, DDP or ZeRO-3, recomputation, and the sparse head."""
    flags = [*TINY_MODEL_NO_DROPOUT, "--dataset_name", str(documents), "--max_steps", "6", "--logging_steps", "1"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "6", "--learning_rate", "1e-3", "--save_strategy", "no"]
    curves = []
    for name, engine, more in (("sdpa", "ddp", []), (NAME, "ddp", []), (NAME, "zero3", ["--gradient_checkpointing"])):
        output = tmp_path / f"{name}-{engine}"
        argv = ["train", *flags, *more, "--attn_implementation", name, "--output_dir", str(output)]
        outcomes = cloze_ranks(argv, 2, engine, tmp_path / "log", before=flash_stands_in)
        succeed(outcomes)
        form = "boolean" if name == "sdpa" else "varlen"
        assert f"{name} attention inside documents ({form})" in outcomes[0].output
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        curves.append([line.get("loss", line.get("eval_loss")) for line in lines])
    assert len(curves[0]) == 7
    for curve in curves[1:]:
        torch.testing.assert_close(torch.tensor(curve), torch.tensor(curves[0]), rtol=1e-5, atol=0)


def test_an_architecture_that_cannot_keep_documents_apart_is_refused(documents: Path, tmp_path: Path):
    flags = ["train", "--model_type", "fnet", "--config_overrides", "hidden_size=32,num_hidden_layers=1"]
    flags += ["--dataset_name", str(documents), "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    outcomes = cloze_ranks(flags, 1, "single", tmp_path / "log")
    assert outcomes[0].code == 2
    assert "FNetForMaskedLM with eager attention: cannot keep attention inside documents" in outcomes[0].output
    assert "prepare the corpus with --packing concat" in outcomes[0].output
    assert not (tmp_path / "run").exists()


def test_eager_attention_inside_documents_trains_in_half_precision(documents: Path, tmp_path: Path):
    """DeepSpeed's weights are bf16, and eager attention multiplies no two types."""
    flags = [*TINY_MODEL, "--dataset_name", str(documents), "--attn_implementation", "eager", "--bf16"]
    argv = ["train", *flags, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    succeed(cloze_ranks(argv, 1, "zero1", tmp_path / "log"))


def test_an_evaluation_keeps_documents_apart_as_training_did(documents: Path, tmp_path: Path):
    flags = [*TINY_MODEL_NO_DROPOUT, "--dataset_name", str(documents), "--max_steps", "3", "--learning_rate", "3e-2"]
    flags += ["--eval_strategy", "steps", "--eval_steps", "3", "--output_dir", str(tmp_path / "run")]
    succeed(cloze_ranks(["train", *flags], 1, "single", tmp_path / "log"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    measured = next(line["eval_loss"] for line in map(json.loads, lines) if "eval_loss" in line)
    assert evaluate(EvaluateConfig(model=str(tmp_path / "run"), use_cpu=True))["loss"] == pytest.approx(measured, 1e-6)
    model = open_subject(str(tmp_path / "run"), open_prepared(documents), "validation", Accelerator(cpu=True))
    model.head.documents = None
    whole = model.score_split(open_prepared(documents), "validation", Masks(0.15, 42, 1, 8)).loss
    assert abs(whole / measured - 1) > 1e-5
