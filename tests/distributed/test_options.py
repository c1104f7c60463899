"""Options of a run: epochs, evaluation, saving, trackers, and values at the ends of their ranges."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from corpus import TINY_MODEL_NO_DROPOUT
from ranks import cloze_ranks, succeed
from short_runs import SHORT, train

from cloze.config import TrainConfig, ranges
from cloze.data.prepared.shards import open_prepared


def test_an_epoch_is_every_block_once_and_its_end_evaluates_and_saves(prepared: Path, tmp_path: Path):
    blocks = len(open_prepared(prepared).blocks("train"))
    more = ["--num_train_epochs", "2", "--per_device_train_batch_size", "24", "--save_total_limit", "2"]
    more += ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--eval_on_start"]
    lines = train(prepared, tmp_path, "ddp", 2, *more)
    evaluated = [line["step"] for line in lines if "eval_perplexity" in line]
    per_epoch, total = -(-blocks // 48), -(-2 * blocks // 48)
    assert evaluated == [0, per_epoch, total]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == sorted(
        [f"checkpoint-{per_epoch}", f"checkpoint-{total}"]
    )
    manifest = json.loads((tmp_path / "run" / f"checkpoint-{total}" / "checkpoint.json").read_text())
    assert manifest["position"] == {
        "global_step": total, "samples_seen": 2 * blocks, "tokens_seen": 2 * blocks * 32
    }  # fmt: skip


def test_only_the_newest_checkpoints_are_kept(prepared: Path, tmp_path: Path):
    train(prepared, tmp_path, "zero1", 2, "--max_steps", "6", "--save_steps", "1", "--save_total_limit", "2")
    left = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert left == ["checkpoint-5", "checkpoint-6"]


def test_tensorboard_gets_the_names_of_trainer(prepared: Path, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--report_to", "tensorboard", "--eval_strategy", "steps", "--eval_steps", "2"]
    lines = train(prepared, tmp_path, "ddp", 2, *SHORT, *more)
    events = sorted((tmp_path / "run").rglob("events.out.tfevents.*"))
    scalars: dict[str, list[float]] = {}
    for event in events:
        reader = EventAccumulator(str(event))
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend(point.value for point in reader.Scalars(tag))
    np.testing.assert_allclose(scalars["train/loss"], [line["loss"] for line in lines if "loss" in line], rtol=1e-6)
    assert len(scalars["eval/perplexity"]) == 2


def test_the_resolved_configuration_is_kept_without_the_token(prepared: Path, tmp_path: Path):
    train(prepared, tmp_path, "single", 1, *SHORT, "--token", "hf_secret_token")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["learning_rate"], config["weight_decay"], config["max_steps"]) == (1e-3, 0.0, 4)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"hf_secret_token" not in path.read_bytes(), path


def test_training_goes_on_from_a_consolidated_model(prepared: Path, tmp_path: Path):
    """`--model_name_or_path FOLDER` starts with that model's weights, on any number of ranks."""
    from cloze.cli.commands import consolidate
    from cloze.config import ConsolidateConfig

    more = ["--max_steps", "8", "--learning_rate", "1e-2", "--eval_strategy", "steps", "--eval_steps", "8"]
    first = train(prepared, tmp_path, "zero3", 2, *more)
    consolidate.run(ConsolidateConfig(checkpoint=str(tmp_path / "run")))
    argv = ["train", "--model_name_or_path", str(tmp_path / "run" / "model"), "--dataset_name", str(prepared)]
    argv += ["--output_dir", str(tmp_path / "second"), "--max_steps", "1", "--eval_on_start", "--save_strategy", "no"]
    succeed(cloze_ranks(argv, 2, "zero3", tmp_path / "log"))
    second = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[0])
    trained = next(line for line in first if "eval_perplexity" in line)
    assert second["step"] == 0
    np.testing.assert_allclose(second["eval_perplexity"], trained["eval_perplexity"], rtol=1e-6)


def at_bounds() -> list[tuple[str, float]]:
    """Each number of `cloze train` at both ends of its declared range."""
    found = []
    for name, allowed in ranges.allowed_values(TrainConfig).items():
        for bound in allowed.bounds if float in allowed.kinds or int in allowed.kinds else ():
            step = 1 if isinstance(bound, ranges.Gt) else -1
            is_open = isinstance(bound, ranges.Gt | ranges.Lt)
            inside = bound.bound + step if int in allowed.kinds else math.nextafter(bound.bound, step * math.inf)
            found.append((name, inside if is_open else bound.bound))
    return [(name, value) for name, value in found if name not in AMOUNTS or value <= 1]


AMOUNTS = (  # their upper ends cost nothing but time and memory
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "batch_size_warmup_start",
    "block_size",
    "max_steps",
)
BESIDE = {  # what an option has an effect with
    "mlm_probability_end": ["--mlm_probability", "0.5"],
    "batch_size_warmup_steps": ["--batch_size_warmup_start", "2"],
    "batch_size_warmup_start": ["--batch_size_warmup_steps", "2"],
    "gradient_checkpointing_every_n_layers": ["--gradient_checkpointing"],
    "per_device_eval_batch_size": ["--eval_strategy", "steps"],
    "eval_steps": ["--eval_strategy", "steps"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), at_bounds())
def test_a_number_at_the_end_of_its_range_trains_or_is_refused_in_one_line(
    prepared: Path, tmp_path: Path, name: str, value: float
):
    run = tmp_path / "run"
    argv = ["train", *TINY_MODEL_NO_DROPOUT, "--dataset_name", str(prepared), "--output_dir", str(run)]
    argv += ["--logging_steps=1", "--save_steps=2", "--max_steps=2", *BESIDE.get(name, []), f"--{name}={value!r}"]
    outcome = cloze_ranks(argv, 1, "single", tmp_path / "log")[0]
    if outcome.code == 2:
        assert [line for line in outcome.output.splitlines() if line.startswith("cloze: error: ")]
        assert "Traceback" not in outcome.output
        return
    assert outcome.code in (0, 75), outcome.output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if line.get("loss") is not None]  # null: no token was masked
    assert all(math.isfinite(loss) for loss in found)
