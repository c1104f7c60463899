"""Cloze: distributed training of masked language models.

    import cloze

    prepared = cloze.prepare(dataset_name="corpus.jsonl", text_field="answers.text",
                             tokenizer_name="roberta-base", output="prepared/mine")
    run = cloze.train(dataset_name=prepared, model_type="roberta", output_dir="runs/mine", max_steps=100)
    cloze.evaluate(run, prepared).perplexity
    cloze.fill(run, "The Milky Way is a <mask> galaxy.")[0].token

See `cloze.tools.api.functions` for these, and `launch/examples/with_trainer.py` for the parts that work with
transformers' Trainer.
`import cloze` loads nothing: torch and the rest come with the first use.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # typing takes longer to import than this package
if TYPE_CHECKING:
    from typing import Any

    from cloze.checkpoint.run_folder import Run
    from cloze.data.batches.collator import MaskingCollator
    from cloze.data.prepared.shards import Prepared
    from cloze.data.prepared.torch_dataset import PackedDataset
    from cloze.errors import ClozeError, Stopped
    from cloze.evaluation.results import Answer, Evaluation
    from cloze.model.sparse_loss import documents_apart, sparse_head
    from cloze.tools.api.functions import consolidate, evaluate, fill, prepare, push, tokenizer, train

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
    **dict.fromkeys(
        ("consolidate", "evaluate", "fill", "prepare", "push", "tokenizer", "train"), "cloze.tools.api.functions"
    ),
    **dict.fromkeys(("Answer", "Evaluation"), "cloze.evaluation.results"),
    **dict.fromkeys(("ClozeError", "Stopped"), "cloze.errors"),
    "MaskingCollator": "cloze.data.batches.collator",
    "PackedDataset": "cloze.data.prepared.torch_dataset",
    "Run": "cloze.checkpoint.run_folder",
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
