"""How `cloze prepare` is run in small units, and the bytes that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cloze.config import PrepareConfig

UNIT = "40KB"


def config(corpus: Path, output: Path, **more: Any) -> PrepareConfig:
    values: dict[str, Any] = {
        "dataset_name": str(corpus / "data"),
        "tokenizer_name": str(corpus / "tokenizer"),
        "text_field": "answers.text",
        "output": str(output),
        "block_size": 32,
        "unit_size": UNIT,
        "num_proc": 1,
        "tokenizer_backend": "tokenizers",
        "validation_split_percentage": 10,
    }
    return PrepareConfig(**values | more)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
