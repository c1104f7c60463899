"""Presets for the common forms of ELI5: their Hub names and fields.

    config = with_preset(SourceConfig(preset="eli5_category", document="full"))

A preset sets only options that are not given: a local copy is `--preset eli5 --dataset_name my/eli5`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from cloze.config import SourceConfig

Config = TypeVar("Config", bound=SourceConfig)


@dataclass(frozen=True)
class Preset:
    """`answers`: the fields with the answers; `question`: the fields before them in a full document."""

    dataset_name: str
    answers: str
    question: str
    id_field: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None


PRESETS = {
    "eli5": Preset("eli5", "answers.text", "title,selftext", "q_id"),
    "eli5_category": Preset(
        "dany0407/eli5_category",
        "answers.text",
        "title,selftext",
        "q_id",
        dataset_revision="refs/convert/parquet",
    ),
    "eli5_kilt": Preset("facebook/kilt_tasks", "output.answer", "input", "id", dataset_config_name="eli5"),
    "eli5_pairs": Preset("sentence-transformers/eli5", "answer", "question"),
}


def with_preset(config: Config) -> Config:
    """Return the configuration with its preset's values for options that are not given."""
    if config.preset is None:
        return config
    preset = PRESETS[config.preset]
    text = preset.answers if config.document == "answers" else f"{preset.question},{preset.answers}"
    values: dict[str, Any] = {"text_field": config.text_field or text, "id_field": config.id_field or preset.id_field}
    if config.dataset_name is None:
        values |= {
            "dataset_name": preset.dataset_name,
            "dataset_config_name": config.dataset_config_name or preset.dataset_config_name,
            "dataset_revision": config.dataset_revision or preset.dataset_revision,
        }
    return dataclasses.replace(config, **values)
