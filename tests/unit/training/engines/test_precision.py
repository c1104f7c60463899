"""Which precision a run computes in, for every way to ask for one and every kind of machine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from repository import ROOT

from cloze.config import TrainConfig
from cloze.distributed.world import make_deepspeed_plugin
from cloze.errors import ConfigError
from cloze.model.archs import NO_BF16
from cloze.training.engines import precision as precision_module
from cloze.training.engines.deepspeed_file import engine_settings
from cloze.training.engines.precision import choose_precision, left_by_deepspeed, precision_here

VOLTA, TURING, AMPERE, ADA, HOPPER = (7, 0), (7, 5), (8, 0), (8, 9), (9, 0)
ON, OFF, AUTO = {"enabled": True}, {"enabled": False}, {"enabled": "auto"}


def config(**values) -> TrainConfig:
    return TrainConfig(dataset_name="", output_dir="", **values)


def chosen(flags: dict, launcher: str | None, capability: tuple | None, model_type: str, settings: dict) -> str:
    environment = {} if launcher is None else {"ACCELERATE_MIXED_PRECISION": launcher}
    possible = left_by_deepspeed(settings)
    return choose_precision(config(**flags), environment, capability, model_type, possible)[0]


TABLE = [
    # flags, launcher, capability, model, DeepSpeed configuration -> precision
    ({}, None, None, "roberta", {}, "no"),
    ({}, "no", None, "roberta", {}, "no"),
    ({}, None, VOLTA, "roberta", {}, "fp16"),
    ({}, "no", TURING, "roberta", {}, "fp16"),
    ({}, None, AMPERE, "roberta", {}, "bf16"),
    ({}, "no", HOPPER, "roberta", {}, "bf16"),
    ({}, None, AMPERE, "deberta", {}, "no"),
    ({}, None, VOLTA, "deberta", {}, "no"),
    ({}, "bf16", None, "roberta", {}, "bf16"),
    ({}, "bf16", VOLTA, "roberta", {}, "bf16"),
    ({}, "fp16", AMPERE, "roberta", {}, "fp16"),
    ({}, "fp8", HOPPER, "roberta", {}, "fp8"),
    ({"precision": "fp32"}, None, AMPERE, "roberta", {}, "no"),
    ({"precision": "fp32"}, "bf16", AMPERE, "roberta", {}, "no"),
    ({"precision": "bf16"}, None, None, "roberta", {}, "bf16"),
    ({"precision": "fp16"}, "bf16", AMPERE, "roberta", {}, "fp16"),
    ({"precision": "fp8"}, None, ADA, "roberta", {}, "fp8"),
    ({"bf16": True}, None, None, "roberta", {}, "bf16"),
    ({"bf16": True, "precision": "bf16"}, "fp16", VOLTA, "roberta", {}, "bf16"),
    ({"fp16": True}, "bf16", AMPERE, "roberta", {}, "fp16"),
    # "auto" in a DeepSpeed file is filled in; what it fixes, goes
    ({}, None, AMPERE, "roberta", {"bf16": AUTO, "fp16": AUTO}, "bf16"),
    ({}, None, VOLTA, "roberta", {"bf16": AUTO, "fp16": AUTO}, "fp16"),
    ({}, None, None, "roberta", {"bf16": AUTO, "fp16": AUTO}, "no"),
    ({"precision": "fp16"}, None, AMPERE, "roberta", {"bf16": AUTO}, "fp16"),
    ({}, None, None, "roberta", {"bf16": ON}, "bf16"),
    ({}, None, VOLTA, "roberta", {"bf16": ON}, "bf16"),
    ({}, "fp16", AMPERE, "roberta", {"bf16": ON}, "bf16"),
    ({}, None, AMPERE, "roberta", {"fp16": ON}, "fp16"),
    ({}, None, AMPERE, "roberta", {"bf16": OFF, "fp16": OFF}, "no"),
    ({}, None, AMPERE, "roberta", {"bf16": OFF}, "no"),
    ({}, None, VOLTA, "roberta", {"bf16": OFF}, "fp16"),
    ({}, "bf16", None, "roberta", {"bf16": OFF}, "no"),
    ({"precision": "fp8"}, None, HOPPER, "roberta", {"bf16": ON}, "fp8"),
]


@pytest.mark.parametrize(("flags", "launcher", "capability", "model_type", "settings", "expected"), TABLE, ids=str)
def test_precision_is_a_function_of_flags_launcher_machine_and_model(
    flags: dict, launcher: str | None, capability: tuple | None, model_type: str, settings: dict, expected: str
):
    assert chosen(flags, launcher, capability, model_type, settings) == expected


def test_a_precision_that_depends_on_the_architecture_counts_as_none(monkeypatch: pytest.MonkeyPatch):
    for special, expected in (("no", "no"), ("fp16", "no"), ("bf16", "bf16")):
        of_model = lambda config, model_type, special=special: (special if model_type else "bf16", "")  # noqa: E731
        monkeypatch.setattr(precision_module, "precision_here", of_model)
        assert precision_module.precision_of_any_model(TrainConfig(output_dir="out")) == expected


def test_a_launchers_precision_that_the_deepspeed_file_excludes_is_mentioned():
    for launcher, settings, expected in (("fp16", {"bf16": ON}, "bf16"), ("bf16", {"bf16": OFF, "fp16": OFF}, "fp32")):
        why = choose_precision(
            config(), {"ACCELERATE_MIXED_PRECISION": launcher}, AMPERE, "roberta", left_by_deepspeed(settings)
        )[1]
        assert why is not None
        assert why.startswith(f"{expected}, as set by the DeepSpeed configuration; ")
        assert why.endswith(f"ACCELERATE_MIXED_PRECISION={launcher} is not used")
    agreed = choose_precision(config(), {"ACCELERATE_MIXED_PRECISION": "bf16"}, AMPERE, "roberta", ["bf16"])
    assert agreed == ("bf16", None)


REFUSED = [
    ({"bf16": True, "fp16": True}, None, AMPERE, {}, "--bf16 and --fp16: choose one"),
    ({"bf16": True, "precision": "fp32"}, None, AMPERE, {}, "--bf16 and --precision fp32: choose one"),
    ({"fp16": True, "precision": "bf16"}, None, AMPERE, {}, "--fp16 and --precision bf16: choose one"),
    ({"fp16": True}, None, None, {}, "--fp16: fp16 needs a GPU; use bf16 or fp32"),
    ({"precision": "fp16"}, None, None, {}, "--precision: fp16 needs a GPU"),
    ({}, "fp16", None, {}, "ACCELERATE_MIXED_PRECISION: fp16 needs a GPU"),
    ({}, None, None, {"fp16": ON}, "the DeepSpeed configuration: fp16 needs a GPU"),
    ({"precision": "fp8"}, None, None, {}, "--precision: fp8 needs a GPU of compute capability 8.9"),
    ({"precision": "fp8"}, None, AMPERE, {}, "and this one has 8.0; use bf16"),
    ({}, "fp8", AMPERE, {}, "ACCELERATE_MIXED_PRECISION: fp8 needs a GPU"),
    ({"precision": "fp32"}, None, AMPERE, {"bf16": ON}, "--precision: fp32, but the DeepSpeed configuration leaves"),
    ({"bf16": True}, None, AMPERE, {"fp16": ON}, "--bf16: bf16, but the DeepSpeed configuration leaves fp16"),
    ({"bf16": True}, None, AMPERE, {"bf16": OFF}, "--bf16: bf16, but the DeepSpeed configuration leaves fp32"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "launcher", "capability", "settings", "message"), REFUSED, ids=str)
def test_what_contradicts_itself_or_the_machine_is_one_line(
    flags: dict, launcher: str | None, capability: tuple | None, settings: dict, message: str
):
    with pytest.raises(ConfigError) as caught:
        chosen(flags, launcher, capability, "roberta", settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_choice_that_nobody_made_is_said():
    for model_type in ("roberta", *sorted(NO_BF16)):
        precision, why = choose_precision(config(), {}, AMPERE, model_type)
        assert why is not None
        assert why.startswith({"no": "fp32"}.get(precision, precision))
        assert (precision == "no") == (model_type in NO_BF16)
        assert model_type not in NO_BF16 or model_type in why
    assert choose_precision(config(bf16=True), {}, AMPERE, "roberta")[1] is None
    assert choose_precision(config(), {}, None, "roberta")[1] is None


FP16_VALUES = {"fp16": {"loss_scale": 0}}


@pytest.mark.parametrize(
    "settings", [{}, {"bf16": AUTO, "fp16": AUTO}, {"bf16": ON}, {"bf16": OFF}, {"fp16": OFF}, FP16_VALUES]
)
@pytest.mark.parametrize("capability", [None, VOLTA, AMPERE])
def test_deepspeed_takes_what_was_chosen(tmp_path: Path, settings: dict, capability: tuple | None):
    """accelerate fills the choice in, and DeepSpeed's configuration then says nothing else."""
    precision = chosen({}, None, capability, "roberta", settings)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **settings}))
    plugin = make_deepspeed_plugin(engine_settings(str(file)))
    plugin.set_mixed_precision(precision)
    enabled = [name for name in ("bf16", "fp16") if plugin.deepspeed_config[name]["enabled"] is True]
    assert enabled == ([] if precision == "no" else [precision])


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda file: file.stem)
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_shipped_deepspeed_configuration_takes_any_precision(file: Path, precision: str):
    plugin = make_deepspeed_plugin(engine_settings(str(file)))
    plugin.set_mixed_precision(precision)
    enabled = [name for name in ("bf16", "fp16") if plugin.deepspeed_config[name]["enabled"] is True]
    assert enabled == ([] if precision == "no" else [precision])


def test_fp8_without_torchao_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "torchao" else found(name, *more)
    )
    with pytest.raises(ConfigError, match="pip install torchao"):
        precision_here(config(precision="fp8"), "roberta")
    assert precision_here(config(), "roberta")[0] == "bf16"
    assert precision_here(config(use_cpu=True), "roberta")[0] == "no"


def test_the_file_of_the_launcher_is_read_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"bf16": ON}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert precision_here(config(), "roberta") == ("bf16", None)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"ds\.json: not JSON"):
        precision_here(config(), "roberta")
