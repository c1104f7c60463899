"""Every architecture under ZeRO-3 begins with the weights of every other engine, to the bit, buffers too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, BERT, TINY
from ranks import cloze_ranks, succeed


def compared() -> None:
    """In a rank: after the engine is ready, compare it with the model that a process alone makes."""
    from small_models import build_plainly

    from cloze.training import setup
    from cloze.training.engines.deepspeed import DeepSpeedEngine

    build, prepare, alone = setup.build_run_model, DeepSpeedEngine.prepare, []

    def remembering(config, data):
        alone.append((config, data))
        return build(config, data)

    def comparing(*arguments):
        engine = prepare(*arguments)
        again = build_plainly(*alone[0])
        weights, buffers = dict(again.named_parameters()), dict(again.named_buffers())
        here = dict(engine.module.named_parameters())
        assert here.keys() == weights.keys()
        assert all(hasattr(parameter, "ds_id") for parameter in here.values())
        for name, parameter in here.items():
            whole = engine.whole(parameter)
            assert torch.equal(whole, weights[name]), name
        for name, buffer in engine.module.named_buffers():
            assert torch.equal(buffer, buffers[name]), name
        line = f"rank {os.environ['RANK']}: all {len(here)} are the same\n"
        os.write(1, line.encode())  # what others print is not shown
        return engine

    setup.build_run_model, DeepSpeedEngine.prepare = remembering, comparing


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_architecture_begins_with_the_same_bits_under_zero3(prepared: Path, tmp_path: Path, model_type: str):
    overrides = TINY.get(model_type, BERT) + (",hash_seed=0" if model_type == "reformer" else "")
    argv = ["train", "--model_type", model_type, "--config_overrides", overrides, "--max_steps", "1"]
    argv += ["--save_strategy", "no", "--dataset_name", str(prepared), "--output_dir", str(tmp_path / "run")]
    outcomes = cloze_ranks(argv, 2, "zero3", tmp_path / "log", compared)
    succeed(outcomes)
    assert all("are the same" in outcome.output for outcome in outcomes)
