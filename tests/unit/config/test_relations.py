"""Options that have no effect beside others are reported; options that contradict each other are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from cloze.checkpoint.identity import check_same_run, run_identity
from cloze.cli import command_line
from cloze.config import EvaluateConfig, PrepareConfig, PushConfig, SubmitConfig, TokenizerConfig, TrainConfig
from cloze.config.parser import overridden, parse
from cloze.config.ranges import MAX_BATCH
from cloze.config.relations import CONFLICTS, UNUSED, check_relations, effective_values, ignored_options
from cloze.errors import CheckpointError, ConfigError

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


def config(**values: Any) -> TrainConfig:
    return TrainConfig(output_dir="out", **values)


@pytest.mark.parametrize(
    ("values", "ignored"),
    [
        ({"max_steps": 5, "num_train_epochs": 9.0}, "--num_train_epochs 9.0 (--max_steps is given)"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "--adam_beta1 0.5 (the optimizer is not Adam; see --optim_args)"),
        ({"eval_steps": 5}, "--eval_steps 5 (--eval_strategy is not steps)"),
        ({"save_strategy": "epoch", "save_steps": 5}, "--save_steps 5 (--save_strategy is not steps)"),
        ({"save_strategy": "no", "async_save": True}, "--async_save True (--save_strategy is no)"),
        ({"hub_token": "hf_secret"}, "--hub_token *** (without --push_to_hub)"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 9}, "--warmup_steps 9 (--lr_scheduler_type is constant)"),
        ({"project": "mine"}, "--project mine (--report_to is none)"),
        (
            {"model_name_or_path": "x", "config_name": "y"},
            "--config_name y (--model_name_or_path brings its configuration)",
        ),
        (
            {"model_name_or_path": "x", "model_type": "bert"},
            "--model_type bert (--model_name_or_path brings its configuration)",
        ),
        ({"document": "full"}, "--document full (it is for a --preset)"),
        (
            {"model_name_or_path": "/", "model_revision": "v1"},
            "--model_revision v1 (no model of the Hub is named)",
        ),
        (
            {"streaming_train": True, "prepared_cache_dir": "x"},
            "--prepared_cache_dir x (--streaming_train keeps nothing)",
        ),
        ({"streaming_train": True, "num_proc": 2}, "--num_proc 2 (--streaming_train prepares nothing)"),
    ],
    ids=str,
)
def test_an_option_without_effect_is_named_with_the_reason(values: dict[str, Any], ignored: str):
    assert ignored_options(config(**values)) == [ignored]


def test_the_least_frequency_has_no_effect_on_unigram_pieces():
    unigram = TokenizerConfig(dataset_name="x", output="y", kind="unigram", min_frequency=5)
    assert ignored_options(unigram) == ["--min_frequency 5 (--kind unigram chooses tokens by likelihood)"]
    assert ignored_options(TokenizerConfig(dataset_name="x", output="y", min_frequency=5)) == []


def test_options_of_a_chain_without_effect_are_named(tmp_path: Path):
    def ignored(**values: Any) -> list[str]:
        config = SubmitConfig(recipe=str(tmp_path / "recipe.yaml"), **values)
        return [line.split()[0] for line in ignored_options(config)]

    assert ignored(prepare_tasks=2, prepare_tasks_at_once=1) == ["--prepare_tasks", "--prepare_tasks_at_once"]
    assert ignored(cpu_partition="cpu") == ["--cpu_partition"]
    assert ignored(cpu_partition="cpu", push_to="a/b") == []
    (tmp_path / "recipe.prepare.yaml").write_text("")
    assert ignored(prepare_tasks=4, prepare_tasks_at_once=3, cpu_partition="cpu", nodes=2, min_nodes=1) == []
    assert ignored(prepare_tasks_at_once=8, nodes=2, min_nodes=2) == ["--min_nodes", "--prepare_tasks_at_once"]


def test_options_with_an_effect_are_not_reported():
    assert ignored_options(config(num_train_epochs=9.0, adam_beta1=0.5, model_type="bert", warmup_steps=9)) == []
    assert ignored_options(config(eval_strategy="steps", eval_steps=5, save_steps=5, save_total_limit=1)) == []
    assert ignored_options(EvaluateConfig(model="x", data="y", draws=3, split="train")) == []


def test_options_of_blocks_are_reported_beside_a_prepared_folder(tmp_path: Path):
    (tmp_path / "manifest.json").write_text("{}")
    found = ignored_options(config(dataset_name=str(tmp_path), text_field="a", tokenizer_name="b", num_proc=2))
    assert [line.split()[0] for line in found] == ["--text_field", "--num_proc", "--tokenizer_name"]
    assert ignored_options(config(dataset_name=str(tmp_path.parent), text_field="a", tokenizer_name="b")) == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_set_no_option_without_effect(recipe: Path):
    command = "prepare" if recipe.name.endswith(".prepare.yaml") else "train"
    assert ignored_options(parse([command, "--config", str(recipe)])[1]) == []


NEEDED: dict[type, dict[str, str]] = {
    PrepareConfig: {"dataset_name": "x", "tokenizer_name": "x", "output": "x"},
    TrainConfig: {"output_dir": "out"},
    SubmitConfig: {"recipe": "x"},
    PushConfig: {"path": "x", "repo": "x"},
}
CONFLICTING = (
    (PrepareConfig, {"num_shards": 2, "shard_index": 2}, "--shard_index: must be below --num_shards"),
    (TrainConfig, {"global_batch_size": 8, "gradient_accumulation_steps": 2}, "follows from --global_batch_size"),
    (
        TrainConfig,
        {"torch_compile": True, "torch_compile_mode": "reduce-overhead", "gradient_accumulation_steps": 2},
        "CUDA graphs lose gradients",
    ),
    (TrainConfig, {"per_device_train_batch_size": MAX_BATCH, "gradient_accumulation_steps": 2}, "not be above"),
    (TrainConfig, {"gradient_checkpointing_every_n_layers": 2}, "needs --gradient_checkpointing"),
    (TrainConfig, {"batch_size_warmup_steps": 2}, "give both or none"),
    (TrainConfig, {"batch_size_warmup_start": 2}, "give both or none"),
    (TrainConfig, {"mask_replace_prob": 0.6, "random_replace_prob": 0.5}, "must not be above 1 together"),
    (TrainConfig, {"num_train_epochs": 0.0}, "nothing to train"),
    (SubmitConfig, {"nodes": 2, "min_nodes": 3}, "must not be above --nodes"),
    (PushConfig, {"create_pr": True, "tag": "v1"}, "--create_pr: takes no --revision and no --tag"),
    (PushConfig, {"create_pr": True, "revision": "dev"}, "--create_pr: takes no --revision and no --tag"),
)


@pytest.mark.parametrize(("config", "values", "line"), CONFLICTING)
def test_options_that_contradict_each_other_are_refused(config: type, values: dict[str, Any], line: str):
    with pytest.raises(ConfigError, match=line):
        check_relations(config(**NEEDED[config], **values))


def test_every_rule_of_contradiction_has_an_example():
    for config, rules in CONFLICTS.items():
        examples = [vars(config(**NEEDED[config], **values)) for kind, values, _ in CONFLICTING if kind is config]
        assert all(any(rule.when(values) for values in examples) for rule in rules)


def test_rules_name_options_that_exist_and_have_a_default():
    for owner, rules in UNUSED.items():
        fields = {field.name: field for field in dataclasses.fields(owner)}
        for rule in rules:
            assert all(fields[name].default is not dataclasses.MISSING for name in rule.options), rule
    assert all(rule.where.startswith("--") for rules in CONFLICTS.values() for rule in rules)


def test_effective_values_of_two_runs_are_equal_if_only_options_without_effect_differ():
    one = effective_values(TrainConfig, {"max_steps": 5, "num_train_epochs": 3.0, "seed": 1, "data": "abc"})
    assert one == effective_values(TrainConfig, {"max_steps": 5, "num_train_epochs": 7.0, "seed": 1, "data": "abc"})
    other = effective_values(TrainConfig, {"max_steps": -1, "num_train_epochs": 7.0, "seed": 1, "data": "abc"})
    assert other["num_train_epochs"] == 7.0


def test_an_option_given_again_with_another_value_is_named():
    line = ["train", "--seed", "1", "--output_dir=a", "--seed=2", "--output_dir", "a", "--bf16", "--bf16", "false"]
    assert overridden(line) == ["--seed 1 (given again: 2)", "--bf16 true (given again: false)"]
    assert overridden(["report", "a", "b", "--config", "x", "--config", "y"]) == []


def test_the_command_line_reports_ignored_options_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command_line.main(
            ["train", "--output_dir", "out", "--dataset_name", "x", "--eval_steps", "3", "--eval_steps", "5"]
        )
    lines = capsys.readouterr().err.splitlines()
    expected = "ignored: --eval_steps 3 (given again: 5); --eval_steps 5 (--eval_strategy is not steps)"
    assert lines[0] == f"cloze: warning: {expected}"


def test_an_empty_value_is_refused():
    with pytest.raises(ConfigError, match=r"^--output_dir: is empty; give a value"):
        parse(["train", "--output_dir", "", "--dataset_name", "x"])
    assert parse(["submit", "x.yaml", "--train_flags", ""])[1].train_flags == ""


def test_a_run_resumes_if_only_options_without_effect_differ(tmp_path: Path):
    manifest = {"checksum": "abc"}

    def identity(**values: Any) -> dict[str, Any]:
        return run_identity(config(model_type="bert", **values), 8, manifest)

    for here in ({"num_train_epochs": 9.0}, {"optim": "sgd", "adam_beta1": 0.5}):
        common = {"max_steps": 5, "optim": here.get("optim", "adamw_torch_fused")}
        check_same_run(tmp_path, identity(**common), identity(**common | here))
    with pytest.raises(CheckpointError, match=r"another run \(adam_beta1 0.9 -> 0.5\)"):
        check_same_run(tmp_path, identity(max_steps=5), identity(max_steps=5, adam_beta1=0.5))
    with pytest.raises(CheckpointError, match=r"num_train_epochs 3\.0 -> 9\.0"):
        check_same_run(tmp_path, identity(), identity(num_train_epochs=9.0))
