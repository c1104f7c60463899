"""Every masked language model of transformers goes the whole way: train, checkpoint, consolidate, evaluate, fill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from architectures import ALWAYS, ARCHITECTURES, BERT, TINY
from ranks import cloze_ranks, succeed

from cloze.errors import ConfigError
from cloze.evaluation.fill_mask import fill

FLAGS = ["--max_steps", "3", "--logging_steps", "1", "--save_steps", "3", "--learning_rate", "1e-3"]
FLAGS += ["--eval_strategy", "steps", "--eval_steps", "3", "--per_device_train_batch_size", "4"]


def go_all_the_way(model_type: str, prepared: Path, folder: Path, engine: str, world_size: int) -> list[str]:
    """Its output; every part is asserted to have worked."""
    run = folder / "run"
    argv = ["train", "--model_type", model_type, "--config_overrides", TINY.get(model_type, BERT), *FLAGS]
    argv += ["--dataset_name", str(prepared), "--output_dir", str(run)]
    trained = cloze_ranks(argv, world_size, engine, folder / "a")
    succeed(trained)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3
    assert all(4 < loss < 40 for loss in losses)  # ln(600) = 6.4; some begin with large weights
    succeed(cloze_ranks(["consolidate", str(run)], 1, "single", folder / "b"))
    succeed(cloze_ranks(["evaluate", str(run), "--data", str(prepared)], 1, "single", folder / "c"))
    during = next(line["eval_perplexity"] for line in lines if "eval_perplexity" in line)
    after = json.loads((run / "eval.json").read_text())["perplexity"]
    assert math.isclose(during, after, rel_tol=1e-5)
    ((_, probability),) = fill(str(run), "The Milky Way is a <mask> galaxy.", top_k=1)[0]
    assert 0 < probability < 1
    return trained[0].output.splitlines()


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t in ALWAYS else pytest.mark.slow) for t in ARCHITECTURES]
)
def test_an_architecture_goes_all_the_way(prepared: Path, tmp_path: Path, model_type: str):
    output = go_all_the_way(model_type, prepared, tmp_path, "ddp", 2)
    assert not [line for line in output if "all positions go through the head" in line]


def test_what_transformers_no_longer_has_names_a_substitute(prepared: Path, tmp_path: Path):
    from cloze.config import TrainConfig
    from cloze.model.archs import GONE
    from cloze.model.load import build_model

    for name in GONE:
        config = TrainConfig(output_dir=str(tmp_path), model_type=name)
        with pytest.raises(ConfigError, match=f"no masked language model of type {name}; {GONE[name]}"):
            build_model(config, prepared / "tokenizer", 32, 0)
