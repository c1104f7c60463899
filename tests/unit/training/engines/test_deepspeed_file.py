"""A DeepSpeed configuration that was written for another tool: honoured, or one line that says what to change."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from repository import ROOT

from cloze.config import TrainConfig
from cloze.errors import ConfigError
from cloze.training.engines import deepspeed_file
from cloze.training.engines.deepspeed import fit_sizes
from cloze.training.engines.deepspeed_file import (
    KNOWN,
    asked_settings,
    check_settings,
    engine_settings,
    rounding_settings,
    settings_file,
)
from cloze.training.engines.deepspeed_schema import schema

TRAINER = {  # as in transformers' documentation
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def check(**changed: Any) -> list[str]:
    return check_settings(TRAINER | changed, "ds.json", TrainConfig(output_dir="out"))


def test_a_file_of_transformers_trainer_without_optimizer_and_scheduler_is_taken():
    assert check() == []
    assert check(train_micro_batch_size_per_gpu=8, train_batch_size=8, gradient_clipping=1.0) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "ds.json: optimizer: is set by Cloze itself"),
        ({"scheduler": {"type": "WarmupLR"}}, "ds.json: scheduler: is set by Cloze itself; take it out, and"),
        ({"gradient_clipping": 0.5}, "ds.json: gradient_clipping: is 0.5, and --max_grad_norm is 1.0; write"),
        ({"train_micro_batch_size_per_gpu": 4}, "is 4, and --per_device_train_batch_size is 8"),
        ({"train_batch_size": 64}, "train_batch_size: is 64, and the flags give 8 blocks a step"),
        ({"amp": {"enabled": True}}, "ds.json: amp: is set by Cloze itself"),
        ({"pipeline": {}}, "ds.json: pipeline: is not supported"),
        ({"zero_optimisation": {"stage": 3}}, "is not a setting of DeepSpeed; did you mean zero_optimization?"),
        ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op: cannot be "sum": another one changes the gradient'),
        (
            {"zero_optimization": {"stage": 2, "reduce_buckets": 1}},
            "reduce_buckets: is not a setting of DeepSpeed",
        ),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "reduce_bucket_size: cannot be -1"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "Cloze needs the norm"),
        (
            {"zero_optimization": {"stage": 0, "overlap_comm": 1}},
            "overlap_comm: cannot be 1",
        ),
        ({"zero_optimization": {"stage": 3, "prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2}}, "twice"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"ratio": 0.5}}},
            "DeepSpeed refuses",
        ),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor: cannot be 0"),
        ({"gradient_clipping": True}, "gradient_clipping: cannot be true"),
        (
            {"tensorboard": {"enabled": True, "x": 1}},
            "take it out, and use --report_to",
        ),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "Cloze keeps weights and optimizer"),
        ({"flops_profiler": {"profile_step": 10**500}}, "cannot be a number of more than 60 digits"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_one_line(changed: dict[str, Any], expected: str):
    with pytest.raises(ConfigError) as caught:
        check(**changed)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_has_no_effect_is_named():
    assert check(activation_checkpointing={}) == ["activation_checkpointing (use --gradient_checkpointing)"]


def test_a_section_that_is_switched_off_is_no_reason_to_refuse():
    assert check(tensorboard={"enabled": False}, amp={"enabled": False}, elasticity={"enabled": False}) == []


def places(kind: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The path of each setting, sections included."""
    yield path
    for name, inner in kind.items() if isinstance(kind, dict) else ():
        yield from places(inner, (*path, name))


@pytest.mark.parametrize("key", sorted(KNOWN))
def test_whatever_a_setting_is_deepspeed_takes_it_or_it_is_one_line(tmp_path: Path, key: str):
    odd = (True, False, 0, -1, 1.5, 5e8, math.nan, math.inf, 10**30, "auto", "x", None, [], [1], {}, {"x": 1})
    for path in places(schema().get(key), (key,)):
        for value in odd:
            settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
            section = settings
            for name in path[:-1]:
                section = section.setdefault(name, {})
            section[path[-1]] = value
            (tmp_path / "ds.json").write_text(json.dumps(settings))
            try:
                read = asked_settings(str(tmp_path / "ds.json"))
                check_settings(read or {}, "ds.json", TrainConfig(output_dir="out"))
            except ConfigError:  # always one line
                continue
            given = engine_settings(str(tmp_path / "ds.json")) or {}
            batch = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}
            given["zero_optimization"].pop("reduce_bucket_size", None)  # accelerate replaces "auto"
            deepspeed = DeepSpeedConfig.__new__(DeepSpeedConfig)
            deepspeed._initialize_params(given | batch)
            assert isinstance(deepspeed.zero_config.stage, int)


@pytest.mark.parametrize("value", [True, 5, {"enabled": True}, "x"], ids=str)
@pytest.mark.parametrize("key", sorted(deepspeed_file.WITHOUT_EFFECT))
def test_deepspeed_is_not_given_what_has_no_effect(tmp_path: Path, key: str, value: Any):
    (tmp_path / "ds.json").write_text(json.dumps({key: value, "steps_per_print": 5}))
    assert engine_settings(str(tmp_path / "ds.json")) == {"zero_optimization": {"stage": 0}, "steps_per_print": 5}


def test_settings_of_the_launcher_beside_a_file_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    assert check() == [
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=cpu (the file says it)",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE=3 (the file says it)",
    ]
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert engine_settings(None) == {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


def test_a_file_in_the_environment_counts_only_if_the_launcher_asks_for_deepspeed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json")
    assert settings_file(None) is None
    assert settings_file("mine.json") == "mine.json"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert settings_file(None) == "ds.json"


def test_the_old_name_of_bf16_counts(tmp_path: Path):
    (tmp_path / "ds.json").write_text('{"bfloat16": {"enabled": true}}')
    assert asked_settings(str(tmp_path / "ds.json")) == {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 0},
    }


@pytest.mark.parametrize(
    "text",
    [
        *(
            "[2]",
            "{",
            '{"bf16": true}',
            '{"fp16": {"enabled": "yes"}}',
            '{"zero_optimization": {"stage": true}}',
            "\xff",
        ),
        *("\xff", '{"bf16": {}, "bf16": {}}', '{"zero_optimization": null}', '{"bf16": {}, "bfloat16": {}}'),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, text: str):
    (tmp_path / "ds.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"ds\.json: ") as caught:
        asked_settings(str(tmp_path / "ds.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_our_own_files_are_honoured_as_a_whole(file: Path):
    settings = asked_settings(str(file))
    assert settings is not None
    assert check_settings(settings, str(file), TrainConfig(output_dir="out")) == []


def test_every_setting_that_the_installed_deepspeed_reads_is_known():
    """Keys are noted while DeepSpeed reads a configuration; a new one must be put into one of the lists."""
    read: set[str] = set()

    class Noting(dict):  # type: ignore[type-arg]
        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            read.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            return self  # so that `in settings.keys()` is noted, too

    settings = Noting(json.loads((ROOT / "ds_configs" / "zero2.json").read_text()))
    settings |= {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    settings |= {"gradient_clipping": 1.0, "bf16": {"enabled": False}, "fp16": {"enabled": False}}
    DeepSpeedConfig.__new__(DeepSpeedConfig)._initialize_params(settings)
    assert {"zero_optimization", "optimizer", "steps_per_print"} <= read
    assert read - KNOWN == set()
    assert deepspeed_file.HONOURED.isdisjoint(deepspeed_file.UNSUPPORTED)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype=bf16"]),
        ({"communication_data_type": "fp16"}, ["communication_data_type=fp16"]),
        ({"prescale_gradients": True}, ["prescale_gradients=True"]),
        ({"gradient_predivide_factor": 3.0}, ["gradient_predivide_factor=3.0"]),
        ({"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": None}, []),
        ({"gradient_predivide_factor": 1.0}, []),
    ],
)
def test_settings_that_round_gradients_are_named(settings: dict, named: list[str]):
    assert rounding_settings(settings) == named


@pytest.mark.parametrize(
    ("config", "left"), [({}, {}), ({"hidden_sizes": [4]}, {"stage3_prefetch_bucket_size": "auto"})]
)
def test_sizes_that_accelerate_cannot_work_out_are_left_to_deepspeed(config: dict, left: dict):
    model = torch.nn.Linear(3, 2)
    model.config = SimpleNamespace(**config)
    zero = {"stage3_prefetch_bucket_size": "auto", "reduce_bucket_size": 10**9}
    fit_sizes(zero, model)
    assert zero == {"reduce_bucket_size": 8, **left}  # no bucket is larger than the model
