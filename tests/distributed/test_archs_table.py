"""What `cloze archs` says of an architecture is what happens: under ZeRO-3, recomputing, in bf16, with all weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, BERT, TINY
from flash_stand_in import NAME, install
from ranks import Outcome, cloze_ranks, succeed
from repository import ROOT
from small_models import without_dropout

from cloze.config import ModelConfig
from cloze.errors import ModelError
from cloze.model import archs
from cloze.model.archs import UNUSED_PARAMETERS, Architecture, architectures
from cloze.model.load import build_model
from cloze.model.packed import document_attention

# In every run of the tests: one that bf16 is refused for, one that cannot recompute.
ALWAYS = {"deberta"}


def without_the_table() -> None:
    """On a rank: train in bf16 whatever the table says."""
    without_dropout()
    archs.NO_BF16.clear()


class Trial:
    """Two steps of training on the same four blocks each, in one way after the other."""

    def __init__(self, model_type: str, prepared: Path, folder: Path):
        self.folder = folder
        overrides = TINY.get(model_type, BERT) + (",hash_seed=0" if model_type == "reformer" else "")
        self.argv = ["train", "--model_type", model_type, "--config_overrides", overrides, "--max_steps", "2"]
        self.argv += ["--logging_steps", "1", "--save_strategy", "no", "--learning_rate", "1e-3"]
        self.argv += ["--dataset_name", str(prepared)]
        # Tiny weights stay whole on every rank unless the threshold is 0: nothing of ZeRO-3 would be tried.
        settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        self.zero3 = folder / "zero3.json"
        self.zero3.write_text(json.dumps(settings))

    def outcomes(self, name: str, *more: str, zero3: int = False, before=without_dropout) -> list[Outcome]:
        world_size = 2 if zero3 else 1
        argv = [*self.argv, "--per_device_train_batch_size", str(4 // world_size), *more]
        argv += ["--output_dir", str(self.folder / name / "run"), *(["--deepspeed", str(self.zero3)] if zero3 else [])]
        return cloze_ranks(argv, world_size, "ddp" if zero3 else "single", self.folder / name / "log", before)

    def curve(self, name: str, *more: str, zero3: bool = False) -> np.ndarray:
        """[2, 2]: loss and norm of the gradient of each step."""
        succeed(self.outcomes(name, *more, zero3=zero3))
        lines = (self.folder / name / "run" / "metrics.jsonl").read_text().splitlines()
        return np.array([[json.loads(line)[key] for key in ("loss", "grad_norm")] for line in lines])

    def is_refused(self, name: str, reason: str, *more: str) -> None:
        outcome = self.outcomes(name, *more)[0]
        assert outcome.code == 2, outcome.output
        assert reason in outcome.output.splitlines()[-1]
        assert "Traceback" not in outcome.output


def check(said: Architecture, trial: Trial, figure) -> None:
    """Every claim of one row that training can show."""
    alone = trial.curve("alone")
    output = (trial.folder / "alone" / "log" / "rank-0.log").read_text()
    assert ("have no part in the output" in output) == (said.model_type in UNUSED_PARAMETERS)
    assert said.sparse_head == ("all positions go through the head" not in output)
    assert said.zero3
    recompute = ["--gradient_checkpointing"] if said.checkpointing else []
    sharded = trial.curve("zero3", *recompute, zero3=True)
    np.testing.assert_allclose(sharded, alone, rtol=1e-5)
    figure(
        "ZeRO-3, recomputing where it can be, against one process, 2 steps: loss and norm",
        abs(sharded / alone - 1).max(),
    )
    if not said.checkpointing:
        trial.is_refused("recompute", "has no gradient checkpointing", "--gradient_checkpointing")
    if said.bf16:
        for zero3 in (False, True):
            half = trial.curve(f"bf16-{zero3}", "--bf16", zero3=zero3)
            np.testing.assert_allclose(half[:, 0], alone[:, 0], rtol=1e-2)
    else:
        trial.is_refused("bf16", f"{said.model_type} cannot be trained in bf16", "--bf16")
        tried = (trial.outcomes(f"try-{zero3}", "--bf16", zero3=zero3, before=without_the_table) for zero3 in (0, 1))
        assert any(outcomes[0].code != 0 for outcomes in tried), "bf16 works: the table is wrong"


EVERY = pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t in ALWAYS else pytest.mark.slow) for t in ARCHITECTURES]
)


@EVERY
def test_what_the_table_says_is_what_happens(prepared: Path, tmp_path: Path, model_type: str, figure):
    (said,) = architectures(model_type)
    check(said, Trial(model_type, prepared, tmp_path), figure)


@EVERY
def test_documents_are_kept_apart_where_the_table_says_so(prepared: Path, model_type: str, monkeypatch):
    """In every way of computing attention that the class has; flash attention with kernels that stand in."""
    (said,) = architectures(model_type)
    config = ModelConfig(model_type=model_type, config_overrides=TINY.get(model_type, BERT))
    model, _ = build_model(config, prepared / "tokenizer", 32, 0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # so that other attention gives clearly other logits
    has = {"eager": True, "sdpa": said.sdpa, "flex_attention": said.flex, install(monkeypatch): said.flash}
    found = {}
    for name in (name for name in has if has[name]):
        if name != model.config._attn_implementation:
            model.set_attn_implementation(name)
        try:
            found[name] = document_attention(model, 32, 600).form
        except ModelError:
            found[name] = None
    forms = {"flex_attention": "flex", NAME: "varlen"}
    if "no best_fit" in said.note:
        assert set(found.values()) == {None}
    elif "best_fit by flash" in said.note:
        assert [name for name, form in found.items() if form is not None] == [NAME]
    else:
        assert all(form == forms.get(name, form) and form is not None for name, form in found.items()), found
