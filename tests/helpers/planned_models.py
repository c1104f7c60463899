"""A small model to plan for, on the meta device and as facts, and the plan of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.cli.commands import plan as command
from cloze.config import PlanConfig
from cloze.tools.planning.model_shapes import ModelFacts, Weight
from cloze.tools.planning.settings import Choice

SMALL = {
    "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
# The first is an embedding, in no layer; the next three are a layer; the last is frozen.
WEIGHTS = [Weight(75, 600, True, 0), Weight(8, 64, True, 1), Weight(1, 8, True, 1), Weight(9, 9, True, 1)]
FACTS = ModelFacts("M", [[600, 64, 8], [9]], 10, 2, [], 8, 2, (1e6, 1e5), True, [*WEIGHTS, Weight(5, 10, False, 0)])
FSDP2 = Choice(None, fully_sharded=True)


def twin(model_type: str = "roberta", dtype: torch.dtype = torch.float32, checkpointing: bool = False, **more) -> Any:
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **(SMALL | more))
        model = AutoModelForMaskedLM.from_config(config, dtype=dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def recipe_file(folder: Path, **more: Any) -> str:
    overrides = ",".join(f"{name}={value}" for name, value in SMALL.items())
    values = {"model_type": "roberta", "dataset_name": str(folder / "nowhere"), "output_dir": "out", "block_size": 64}
    values |= {"config_overrides": overrides, "max_steps": 10}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**values, **more}))
    return str(file)


def run_plan(folder: Path, recipe: dict[str, Any] | None = None, **flags: Any) -> dict[str, Any]:
    target = folder / "plan.json"
    command.run(PlanConfig(recipe=recipe_file(folder, **(recipe or {})), json=str(target), **flags))
    return json.loads(target.read_text())
