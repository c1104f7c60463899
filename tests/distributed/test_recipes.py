"""Every recipe for training: its model has the published size, and a narrow one of its kind trains as it says."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from ranks import cloze_ranks, succeed
from repository import ROOT
from transformers import AutoModelForMaskedLM, PretrainedConfig

from cloze.cli.commands import plan
from cloze.config import PrepareConfig, TrainConfig
from cloze.config.parser import parse
from cloze.model.load import read_config
from cloze.tools.bench.sizes import Size, make_data

RECIPES = ROOT / "launch/recipes"
# Parameters of the MLM model and tokens of its vocabulary, as published: the papers' round numbers in millions, or,
# where the Hub shows them, all digits.
PUBLISHED = {
    "roberta-base": (124_697_433, 50265),
    "roberta-large": (355_412_057, 50265),
    "bert-large": (335_174_458, 30522),
    "modernbert-base": (149_655_232, 50368),
    "modernbert-large": (395_881_664, 50368),
    "deberta-v2-xlarge": (900e6, 128100),
    "deberta-v2-xxlarge": (1.5e9, 128100),
    "xlm-roberta-xl": (3.5e9, 250880),
    "xlm-roberta-xxl": (10.7e9, 250880),
    "esm2-3b": (2.84e9, 33),
    "bigbird-base": (128e6, 50358),
    "longformer-base": (149e6, 50265),
}
LONGER = {"modernbert-base-8192": "modernbert-base", "modernbert-large-8192": "modernbert-large"}
FROM_HUB = {"distilroberta-eli5", "roberta-eli5-full"}  # begin with a published model, which is not here
# What makes each kind of model narrow and shallow, and leaves how it works.
NARROW = "hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=96"
ALWAYS = {"modernbert-base", "deberta-v2-xxlarge"}


def read(recipe: str) -> tuple[TrainConfig, PrepareConfig]:
    _, config = parse(["train", "--config", str(RECIPES / f"{recipe}.yaml")])
    _, prepare = parse(["prepare", "--config", str(RECIPES / f"{recipe}.prepare.yaml")])
    return config, prepare


class Vocabulary:
    """As much of a tokenizer as a configuration from scratch asks for."""

    pad_token_id, bos_token_id, eos_token_id, sep_token_id, cls_token_id, mask_token_id = 1, 0, 2, 2, 0, 4

    def __init__(self, size: int):
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.size)}


def full_size(recipe: str) -> PretrainedConfig:
    config, prepare = read(recipe)
    return read_config(config, Vocabulary(PUBLISHED[recipe][1]), prepare.block_size)  # type: ignore[arg-type]


def test_all_recipes_are_looked_at():
    found = {path.stem for path in RECIPES.glob("*.yaml") if not path.stem.endswith(".prepare")}
    assert found == PUBLISHED.keys() | LONGER.keys() | FROM_HUB


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_model_has_the_published_number_of_parameters(recipe: str):
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(full_size(recipe))
    number, published = sum(p.numel() for p in model.parameters()), PUBLISHED[recipe][0]
    if isinstance(published, int):
        assert number == published
    else:
        assert number == pytest.approx(published, rel=0.05)
    text = (RECIPES / f"{recipe}.yaml").read_text()
    assert any(f"{number / unit:.{digits}f} {name}" in text for unit, digits, name in ((1e6, 0, "M"), (1e9, 1, "G")))


PLANNED = re.compile(
    r"Planned, not measured: (\S+), ([\d.]+) GiB of (\S+) of each of (\d+) GPUs in passes of (\d+) blocks"
)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*PUBLISHED, *LONGER])
def test_the_memory_that_a_recipe_names_is_what_cloze_plan_says_of_its_command(recipe: str, tmp_path: Path):
    text = (RECIPES / f"{recipe}.yaml").read_text()
    found = PLANNED.search(text.replace("\n#", ""))
    assert found, "Planned, not measured: ..."
    assert found.groups() == planned(recipe, tmp_path)


def planned(recipe: str, folder: Path) -> tuple[str, ...]:
    """Choice, memory at its highest, that of a GPU, GPUs, and blocks of a pass: as planned by the recipe's command."""
    text = (RECIPES / f"{recipe}.yaml").read_text()
    command = re.search(rf"^#   cloze plan launch/recipes/{recipe}.yaml (.*)$", text, re.MULTILINE)
    assert command, "cloze plan ..."
    words = shlex.split(command[1])
    base = LONGER.get(recipe, recipe)
    words += ["--vocab_size", str(PUBLISHED[base][1]), "--json", str(folder / "plan.json")]
    if recipe in LONGER:  # the model that it goes on from
        full_size(base).save_pretrained(folder / "model")
        words += ["--train_flags", f"--model_name_or_path {folder}/model"]
    _, config = parse(["plan", str(RECIPES / f"{recipe}.yaml"), *words])
    plan.run(config)
    told = json.loads((folder / "plan.json").read_text())
    choice = next(one for one in told["choices"] if one["name"] == told["recommended"])
    memory = f"{choice['memory']['peak'] / 2**30:.1f}", f"{told['gpu']['memory'] / 2**30:.1f}"
    return choice["name"], *memory, str(told["ranks"]), str(choice["micro_batch"])


@pytest.mark.parametrize("recipe", LONGER)
def test_a_longer_context_goes_on_from_the_recipe_before(recipe: str):
    (config, prepare), (before, _) = read(recipe), read(LONGER[recipe])
    assert config.model_name_or_path == f"{before.output_dir}/model"
    assert prepare.block_size == 8192
    tokens_a_step = config.global_batch_size * prepare.block_size
    assert tokens_a_step == before.global_batch_size * 1024
    assert config.max_steps * tokens_a_step == pytest.approx(300e9, rel=1e-3)


def narrow(recipe: str, folder: Path) -> list[str]:
    """Flags that make a recipe's model small, its blocks made-up ones of the recipe's length, and its run short."""
    config, prepare = read(recipe)
    given = f"{config.config_overrides},{NARROW}" if config.config_overrides else NARROW
    small = ",".join(dict((one.split("=")[0], one) for one in re.split(r",(?![^\[]*\])", given)).values())
    kind = config.model_type
    if recipe in LONGER:
        start = Size(read(LONGER[recipe])[0].model_type, f"{NARROW},pad_token_id=1", 600, 1024).model_config()
        AutoModelForMaskedLM.from_config(start).save_pretrained(folder / "model")
        kind, small = None, config.config_overrides
    blocks = 12 if prepare.block_size <= 1024 else 6
    size = Size(config.model_type or "roberta", "", 600, prepare.block_size)
    make_data(folder / "blocks", size, prepare.packing, num_tokens=blocks * prepare.block_size)
    words = ["--config_overrides", small, "--dataset_name", str(folder / "blocks")]
    words += ["--output_dir", str(folder / "run"), "--mask_unit", "token"]  # the made-up tokenizer knows no words
    if kind is None:
        words += ["--model_name_or_path", str(folder / "model")]
    if config.batch_size_warmup_steps:
        words += ["--batch_size_warmup_start", "1", "--batch_size_warmup_steps", "2"]
    words += ["--per_device_train_batch_size", "1", "--global_batch_size", "2", "--max_steps", "3"]
    return [*words, "--logging_steps", "1", "--eval_strategy", "no", "--warmup_steps", "1", "--use_cpu"]


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, marks=() if r in ALWAYS else pytest.mark.slow) for r in [*PUBLISHED, *LONGER]]
)
def test_a_recipe_trains_at_reduced_width(recipe: str, tmp_path: Path):
    argv = ["train", "--config", str(RECIPES / f"{recipe}.yaml"), *narrow(recipe, tmp_path)]
    succeed(cloze_ranks(argv, 2, "zero3" if "3b" in recipe or "xl" in recipe else "ddp", tmp_path / "log"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 3
    assert all(abs(loss - math.log(600)) < 1.5 for loss in losses)
    assert (tmp_path / "run/checkpoint-3").is_dir()
