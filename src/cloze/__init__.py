"""Cloze: distributed training of masked language models.

    import cloze

    prepared = cloze.prepare(dataset_name="corpus.jsonl", text_field="answers.text",
                             tokenizer_name="roberta-base", output="prepared/mine")
    run = cloze.train(dataset_name=prepared, model_type="roberta", output_dir="runs/mine", max_steps=100)
    cloze.evaluate(run, prepared).perplexity
    cloze.fill(run, "The Milky Way is a <mask> galaxy.")[0].token

See `cloze.api` for these, and `launch/examples/with_trainer.py` for the parts that work with transformers' Trainer.
`import cloze` loads nothing: torch and the rest come with the first use.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

TYPE_CHECKING = False  # typing takes longer to import than this package
if TYPE_CHECKING:
    from typing import Any

    from cloze.api import consolidate, evaluate, fill, prepare, push, tokenizer, train
    from cloze.data.batches.collator import MaskingCollator
    from cloze.data.prepared.shards import Prepared
    from cloze.data.prepared.torch_dataset import PackedDataset
    from cloze.errors import ClozeError, Stopped
    from cloze.evaluation.results import Answer, Evaluation, Run
    from cloze.model.sparse_loss import documents_apart, sparse_head

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "ClozeError",
    "Evaluation",
    "MaskingCollator",
    "PackedDataset",
    "Prepared",
    "Run",
    "Stopped",
    "consolidate",
    "documents_apart",
    "evaluate",
    "fill",
    "prepare",
    "push",
    "sparse_head",
    "tokenizer",
    "train",
]

_WHERE = {
    **dict.fromkeys(("consolidate", "evaluate", "fill", "prepare", "push", "tokenizer", "train"), "cloze.api"),
    **dict.fromkeys(("Answer", "Evaluation", "Run"), "cloze.evaluation.results"),
    **dict.fromkeys(("ClozeError", "Stopped"), "cloze.errors"),
    "MaskingCollator": "cloze.data.batches.collator",
    "PackedDataset": "cloze.data.prepared.torch_dataset",
    "Prepared": "cloze.data.prepared.shards",
    "documents_apart": "cloze.model.sparse_loss",
    "sparse_head": "cloze.model.sparse_loss",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'cloze' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallableModule(ModuleType):
    """A module that has the name of a function of the API, and is that function too: `import cloze.training.trainer`
    puts the package `cloze.train` where `cloze.train(...)` was."""

    @property
    def _function(self) -> Any:
        return getattr(importlib.import_module("cloze.api"), self.__name__.rpartition(".")[2])

    def __call__(self, *args: Any, **flags: Any) -> Any:
        return self._function(*args, **flags)

    @property
    def __signature__(self) -> Any:
        return self._function.__signature__

    def __getattr__(self, name: str) -> Any:
        if name == "__qualname__":  # torch's launcher wants to know what it starts
            return self.__name__
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __reduce__(self) -> Any:
        return importlib.import_module, (self.__name__,)


class _Package(ModuleType):
    """This package: the import system sets its modules as attributes (https://docs.python.org/3/reference/import.html,
    "Submodules")."""

    def __setattr__(self, name: str, value: Any) -> None:
        if _WHERE.get(name) == "cloze.api" and type(value) is ModuleType:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
