"""A fourth engine is a class and a line in the table; what does not belong to engines does not ask which one runs."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from corpus import TINY_CALL

import cloze
from cloze.checkpoint.format import read_manifest
from cloze.training.engines import choose_engine
from cloze.training.engines.base import Engine, Support
from cloze.training.engines.sharded_state import Fragment

PACKAGE = Path(cloze.__file__).parent
SUPPORT = Support("flat", whole_parameters=False)


class FlatEngine(Engine):
    """Steps one fp32 tensor for each group of the optimizer; the model computes with copies of its parts."""

    support = SUPPORT

    @classmethod
    def requested(cls, deepspeed: str | None) -> bool:
        return True

    @classmethod
    def runs(cls, accelerator: Accelerator) -> bool:
        return True

    @classmethod
    def requested_support(cls, deepspeed: str | None, precision: str) -> Support:
        return SUPPORT

    def wrap(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, layout: object) -> tuple[Any, Any]:
        self._parts = {}
        for group in optimizer.param_groups:
            flat, start = torch.cat([p.detach().reshape(-1) for p in group["params"]]), 0
            for parameter in group["params"]:
                self._parts[parameter] = flat, start
                start += parameter.numel()
            group["params"] = [flat]
        return model, optimizer

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        loss.backward()

    def take_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        norm = self.clip()
        self._stepped = bool(torch.isfinite(norm))
        for parameter, (flat, start) in self._parts.items():
            flat.grad = torch.zeros_like(flat) if flat.grad is None else flat.grad
            flat.grad[start : start + parameter.numel()] = parameter.grad.reshape(-1)
            parameter.grad = None
        if self._stepped:
            self.optimizer.step()
        for parameter, (flat, start) in self._parts.items():
            self.refresh(parameter, flat[start : start + parameter.numel()])
        return norm, torch.tensor(not self._stepped)

    def locate(self, name: str, parameter: Any) -> Fragment:
        flat, start = self._parts[parameter]
        return Fragment(name, self.shape_of(parameter), 0, parameter.numel(), flat, start)

    def bytes_to_come(self, elements: int, moments: int) -> int:
        return 4 * elements * (1 + moments)


def losses(run: cloze.Run) -> list[float]:
    return [line["loss"] for line in run.metrics if "loss" in line]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_engine, "ENGINES", [FlatEngine, *choose_engine.ENGINES])


@pytest.fixture(scope="module")
def by_ddp(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(cloze.train(dataset_name=prepared, output_dir=tmp_path_factory.mktemp("ddp") / "run", **TINY_CALL))


def test_a_fourth_engine_trains_saves_and_restores_with_the_losses_of_ddp(
    prepared: Path, tmp_path: Path, registered: None, by_ddp: list[float], monkeypatch: pytest.MonkeyPatch
):
    flags = {"dataset_name": prepared, "output_dir": tmp_path / "run", "ema_decay": 0.9, **TINY_CALL}
    run = cloze.train(**flags)
    assert read_manifest(tmp_path / "run" / "checkpoint-3")["engine"] == "flat"
    assert losses(run) == pytest.approx(by_ddp, rel=1e-6)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert losses(cloze.train(**flags, resume_from_checkpoint="auto")) == losses(run)
    monkeypatch.undo()  # and DDP resumes from what it wrote
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert losses(cloze.train(**flags, resume_from_checkpoint="auto")) == pytest.approx(by_ddp, rel=1e-6)
    assert read_manifest(tmp_path / "run" / "checkpoint-6")["engine"] == "single process"


# `utils/environment` names the launcher's variables, with which `bench memory` starts what a plan has chosen.
MAY_ASK = ("training/engines/", "tools/planning/", "distributed/", "utils/environment/", "tools/bench/memory.py")
ASKING = re.compile(
    r"fsdp|zero_?stage|^_?ds_(id|tensor|numel|shape|persist)|is_deepspeed|wants_deepspeed|distributed_?type",
    re.IGNORECASE,
)
CLASSES = re.compile(r"cloze\.training\.engines\.(ddp|deepspeed|fsdp2|zero3)\b")


def names_in(tree: ast.Module) -> Iterator[str]:
    """Yield all identifiers, and the names that hasattr and getattr ask for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            yield from (one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str))


def asks(name: str) -> bool:
    return bool(CLASSES.match(name) or ASKING.search(name.rsplit(".", 1)[-1]))


def test_no_other_module_asks_which_engine_is_running():
    found = [
        f"{path}: {name}"
        for path in sorted(file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py"))
        if not path.startswith(MAY_ASK)
        for name in names_in(ast.parse((PACKAGE / path).read_text()))
        if asks(name)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "if is_fsdp(accelerator): pass",
        "engine.zero_stage",
        "hasattr(parameter, 'ds_id')",
        "accelerator.distributed_type == kind",
        "from cloze.training.engines.ddp import DDPEngine",
    ],
)
def test_a_question_for_the_engine_would_be_found(line: str):
    assert any(asks(name) for name in names_in(ast.parse(line)))
