"""How the options of one command depend on each other: which have no effect beside others, which contradict others.

    for line in ignored_options(config): say("ignored", line)       # "--eval_steps 5 (--eval_strategy is no)"
    check_relations(config)                                         # ConfigError: give one of them
    effective_values(TrainConfig, values)                           # values without those that have no effect

The tables hold everything that follows from the options alone. What depends on data or on the machine is checked where
those are known.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cloze.config.data import BlocksConfig, PrepareConfig, SourceConfig, TokenizerConfig
from cloze.config.machines import BenchConfig, SubmitConfig, prepare_recipe
from cloze.config.plan import PlanConfig
from cloze.config.ranges import MAX_BATCH, Ranged
from cloze.config.train import NOT_ADAM, ModelConfig, TrainConfig
from cloze.config.use import EvaluateConfig, PushConfig
from cloze.errors import ConfigError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Unused:
    """`options` have no effect if `when` holds; `why` gives the reason."""

    options: tuple[str, ...]
    when: Callable[[Values], bool]
    why: str


@dataclass(frozen=True)
class Conflict:
    """`when` must not hold; `where`, `what` and `hint` are the error's."""

    when: Callable[[Values], Any]
    where: str
    what: str
    hint: str | None = None


_SPLITTING = tuple(
    field.name
    for field in dataclasses.fields(BlocksConfig)
    if field.name not in ("dataset_name", "token", "cache_dir", "trust_remote_code")
)
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that record them
_HUB = ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision", "hub_token")
_SAVING = ("save_total_limit", "async_save", "on_save_error", "ema_decay")
_BENCH = {  # option -> the measurements that use it
    "dataset_name": ("prepare",),
    "tokenizer_name": ("prepare",),
    "megabytes": ("prepare",),
    "num_proc": ("prepare",),
    "block_size": ("prepare", "loader", "memory"),
    "num_blocks": ("loader",),
    "per_device_train_batch_size": ("loader", "train", "step", "memory"),
    "sizes": ("train", "step", "memory"),
    "packing": ("train", "step"),
    "rounds": ("train", "step"),
    "gpu": ("train", "step", "memory"),
    "model_type": ("save",),
    "config_overrides": ("save",),
}

UNUSED: dict[type, tuple[Unused, ...]] = {
    SourceConfig: (
        Unused(("document",), lambda v: v["preset"] is None, "it is for a --preset"),
        Unused(
            ("dataset_revision",),
            lambda v: v["dataset_name"] is not None and os.path.exists(v["dataset_name"]),
            "--dataset_name is a local path",
        ),
        Unused(
            ("dataset_config_name",),
            lambda v: os.path.exists(v["dataset_name"] or "") and not os.path.exists(f"{v['dataset_name']}/README.md"),
            "--dataset_name is a local path without README.md",
        ),
    ),
    BlocksConfig: (
        Unused(
            ("validation_split_percentage",),
            lambda v: v["validation_split"] is not None,
            "--validation_split is given",
        ),
    ),
    TokenizerConfig: (
        Unused(("new_tokens",), lambda v: v["extend"] is None, "without --extend"),
        Unused(
            ("min_frequency",),
            lambda v: v["kind"] == "unigram" and v["extend"] is None,
            "--kind unigram chooses tokens by likelihood",
        ),
        Unused(
            ("vocab_size", "do_lower_case", "strip_accents", "model_max_length"),
            lambda v: v["extend"] is not None,
            "--extend keeps those of the tokenizer",
        ),
    ),
    ModelConfig: (
        Unused(
            ("model_type", "config_name"),
            lambda v: v["model_name_or_path"] is not None,
            "--model_name_or_path brings its configuration",
        ),
        Unused(
            ("model_type",),
            lambda v: v["model_name_or_path"] is None and v["config_name"] is not None,
            "--config_name says it",
        ),
        Unused(
            ("model_revision",),
            lambda v: os.path.isdir(v["model_name_or_path"] or v["config_name"] or "."),
            "no model of the Hub is named",
        ),
    ),
    TrainConfig: (
        Unused((*_SPLITTING, "prepared_cache_dir"), lambda v: _is_prepared(v), "--dataset_name is prepared already"),
        Unused(("tokenizer_name",), lambda v: _is_prepared(v), "the prepared folder has its own"),
        Unused(
            ("prepared_cache_dir",),
            lambda v: v["streaming_train"] and v["validation_split"] is None,
            "--streaming_train keeps nothing",
        ),
        Unused(
            ("num_proc",),
            lambda v: v["streaming_train"] and v["validation_split"] is None,
            "--streaming_train prepares nothing",
        ),
        Unused(("num_train_epochs",), lambda v: v["max_steps"] > 0, "--max_steps is given"),
        Unused(
            ("adam_beta1", "adam_beta2", "adam_epsilon"),
            lambda v: v["optim"] in NOT_ADAM,
            "the optimizer is not Adam; see --optim_args",
        ),
        Unused(("warmup_steps",), lambda v: v["lr_scheduler_type"] == "constant", "--lr_scheduler_type is constant"),
        Unused(("tf32",), lambda v: v["use_cpu"], "--use_cpu is given"),
        Unused(("torch_compile_mode",), lambda v: v["torch_compile"] is False, "--torch_compile is false"),
        Unused(("eval_steps",), lambda v: v["eval_strategy"] != "steps", "--eval_strategy is not steps"),
        Unused(
            ("per_device_eval_batch_size",),
            lambda v: v["eval_strategy"] == "no" and not v["eval_on_start"],
            "--eval_strategy is no",
        ),
        Unused(("save_steps",), lambda v: v["save_strategy"] != "steps", "--save_strategy is not steps"),
        Unused(_SAVING, lambda v: v["save_strategy"] == "no", "--save_strategy is no"),
        Unused(_HUB, lambda v: not v["push_to_hub"], "without --push_to_hub"),
        Unused(("run_name", "project"), lambda v: v["report_to"] in ("none", ""), "--report_to is none"),
    ),
    SubmitConfig: (
        Unused(("min_nodes",), lambda v: v["min_nodes"] == v["nodes"], "--nodes is the same"),
        Unused(
            ("prepare_tasks", "prepare_tasks_at_once"),
            lambda v: not _has_prepare_recipe(v),
            "without RECIPE.prepare.yaml nothing is prepared",
        ),
        Unused(
            ("prepare_tasks_at_once",),
            lambda v: (v["prepare_tasks_at_once"] or 0) >= v["prepare_tasks"],
            "all may run",
        ),
        Unused(
            ("cpu_partition",),
            lambda v: not _has_prepare_recipe(v) and v["push_to"] is None,
            "nothing is prepared or pushed",
        ),
    ),
    PlanConfig: (Unused(("network_gbit",), lambda v: v["nodes"] == 1, "there is one node"),),
    EvaluateConfig: (
        Unused(("mlm_probability", "seed", "draws"), lambda v: v["metric"] != "perplexity", "it masks every token"),
        Unused(("split",), lambda v: v["sentences"] is not None, "--sentences has no splits"),
    ),
    BenchConfig: tuple(
        Unused((option,), lambda v, of=of: v["what"] not in of, f"it is for {', '.join(of)}")  # type: ignore[misc]
        for option, of in _BENCH.items()
    ),
}


def records_graphs(values: Values) -> bool:
    """Return whether the backbone is compiled, if at all, into CUDA graphs."""
    return bool(values["torch_compile"]) and values["torch_compile_mode"] in CUDA_GRAPHS


CONFLICTS: dict[type, tuple[Conflict, ...]] = {
    SubmitConfig: (
        Conflict(lambda v: (v["min_nodes"] or 0) > v["nodes"], "--min_nodes", "must not be above --nodes"),
    ),
    PushConfig: (
        Conflict(
            lambda v: v["create_pr"] and (v["revision"] or v["tag"]), "--create_pr", "takes no --revision and no --tag"
        ),
    ),
    PrepareConfig: (
        Conflict(
            lambda v: v["shard_index"] is not None and v["shard_index"] >= v["num_shards"],
            "--shard_index",
            "must be below --num_shards",
        ),
    ),
    TrainConfig: (
        Conflict(
            lambda v: v["global_batch_size"] is not None and v["gradient_accumulation_steps"] != 1,
            "--gradient_accumulation_steps",
            "follows from --global_batch_size",
            "leave one of them out",
        ),
        Conflict(
            lambda v: v["gradient_accumulation_steps"] > 1 and records_graphs(v),
            "--torch_compile_mode",
            "its CUDA graphs lose gradients with --gradient_accumulation_steps above 1",
            "use max-autotune-no-cudagraphs, or a step of one micro-batch",
        ),
        Conflict(
            lambda v: v["per_device_train_batch_size"] * v["gradient_accumulation_steps"] > MAX_BATCH,
            "--per_device_train_batch_size and --gradient_accumulation_steps",
            f"must not be above {MAX_BATCH} together",
        ),
        Conflict(
            lambda v: v["gradient_checkpointing_every_n_layers"] > 1 and not v["gradient_checkpointing"],
            "--gradient_checkpointing_every_n_layers",
            "needs --gradient_checkpointing",
        ),
        Conflict(
            lambda v: (v["batch_size_warmup_steps"] > 0) != (v["batch_size_warmup_start"] is not None),
            "--batch_size_warmup_steps and --batch_size_warmup_start",
            "give both or none",
        ),
        Conflict(
            lambda v: v["mask_replace_prob"] + v["random_replace_prob"] > 1.0,
            "--mask_replace_prob and --random_replace_prob",
            "must not be above 1 together",
        ),
        Conflict(
            lambda v: v["max_steps"] < 1 and v["num_train_epochs"] == 0,
            "--num_train_epochs / --max_steps",
            "nothing to train",
            "set one above 0",
        ),
    ),
}


def ignored_options(config: Ranged) -> list[str]:
    """Return a line for each option that is not at its default and has no effect beside the others."""
    values, defaults = vars(config), _defaults(type(config))
    found: dict[str, str] = {}
    for rule in _rules(UNUSED, type(config)):
        if rule.when(values):
            for name in rule.options:
                if name in defaults and values[name] != defaults[name]:
                    shown = "***" if name.endswith("token") else values[name]
                    found.setdefault(name, f"--{name} {shown} ({rule.why})")
    return list(found.values())


def effective_values(config: type, values: Values) -> dict[str, Any]:
    """Return `values`, some or all of a command's options by name, with options that have no effect set to their
    defaults. Two runs whose effective values are equal compute the same. Names that are not options are kept."""
    defaults = _defaults(config)
    whole = {**defaults, **values}
    unused = {name for rule in _rules(UNUSED, config) if rule.when(whole) for name in rule.options}
    return {name: defaults[name] if name in unused and name in defaults else value for name, value in values.items()}


def check_relations(config: Ranged) -> None:
    """Raise ConfigError for the first options that contradict each other."""
    for rule in _rules(CONFLICTS, type(config)):
        if rule.when(vars(config)):
            raise ConfigError(rule.what, where=rule.where, hint=rule.hint)


def _rules(table: Mapping[type, tuple[Any, ...]], config: type) -> Iterator[Any]:
    """Yield the rules of a class and of its base classes."""
    return (rule for base in config.__mro__ for rule in table.get(base, ()))


def _defaults(config: Any) -> dict[str, Any]:
    return {
        field.name: field.default for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING
    }


def _is_prepared(values: Values) -> bool:
    name = values.get("dataset_name")
    return name is not None and os.path.isfile(os.path.join(name, "manifest.json"))


def _has_prepare_recipe(values: Values) -> bool:
    return os.path.isfile(prepare_recipe(values["recipe"]))
