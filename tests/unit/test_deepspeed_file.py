"""A DeepSpeed configuration that was written for another tool: honoured, or one line that says what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from cloze.config import TrainConfig
from cloze.errors import ConfigError
from cloze.train import deepspeed_file
from cloze.train.deepspeed_file import KNOWN, asked_settings, check_settings

ROOT = Path(__file__).resolve().parents[2]
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
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: changes the gradient"),
        ({"zero_optimization": {"stage": 2, "reduce_buckets": 1}}, "DeepSpeed refuses reduce_buckets"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "DeepSpeed refuses reduce_bucket_size"),
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


@pytest.mark.parametrize(
    "text",
    ["[2]", "{", '{"bf16": true}', '{"fp16": {"enabled": "yes"}}', '{"zero_optimization": {"stage": true}}', "\xff"],
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
