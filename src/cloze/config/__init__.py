"""One dataclass per command: options, defaults and their meaning.

A value comes from the default, then from the YAML file given with --config, then from the flags. Names are
`transformers.TrainingArguments`' where they mean the same, and `run_mlm.py`'s for model and data. `cloze.cli` turns
these classes into command lines; the docstring under a field is its help text.
"""

from __future__ import annotations

from cloze.config.data import BlocksConfig, InspectConfig, PrepareConfig, SourceConfig, TokenizerConfig
from cloze.config.grow import GrowConfig
from cloze.config.machines import BenchConfig, CompletionConfig, DemoConfig, DoctorConfig, InitConfig, SubmitConfig
from cloze.config.plan import PlanConfig
from cloze.config.report import ReportConfig
from cloze.config.train import ModelConfig, TrainConfig
from cloze.config.use import (
    ArchsConfig,
    CompareConfig,
    ConsolidateConfig,
    EvaluateConfig,
    FillConfig,
    MeasureConfig,
    PushConfig,
    ReplayConfig,
)

__all__ = [
    "ArchsConfig",
    "BenchConfig",
    "BlocksConfig",
    "CompareConfig",
    "CompletionConfig",
    "ConsolidateConfig",
    "DemoConfig",
    "DoctorConfig",
    "EvaluateConfig",
    "FillConfig",
    "GrowConfig",
    "InitConfig",
    "InspectConfig",
    "MeasureConfig",
    "ModelConfig",
    "PlanConfig",
    "PrepareConfig",
    "PushConfig",
    "ReplayConfig",
    "ReportConfig",
    "SourceConfig",
    "SubmitConfig",
    "TokenizerConfig",
    "TrainConfig",
]
