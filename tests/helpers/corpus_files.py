"""Small files of a corpus, and what is read from them or said against them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloze.config import SourceConfig
from cloze.data.corpus.sources import open_corpus
from cloze.errors import DataError

TEXTS = [f"Text number {number} of some." for number in range(60)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)


def texts_of(name: Path | str, **more: str) -> list[str]:
    return [document.text for document in open_corpus(SourceConfig(dataset_name=str(name), **more)).documents()]


def refused(name: Path | str, **more: str) -> str:
    with pytest.raises(DataError) as caught:
        texts_of(name, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(path: Path, text: str = LINES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
