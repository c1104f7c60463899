"""A corpus of several units, and what one undisturbed process makes of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from prepare_units import config, contents

from cloze.config import TokenizerConfig
from cloze.data.prepare.pipeline import prepare
from cloze.data.prepared.verified import verify_prepared
from cloze.data.tokenizer_training.train import train_tokenizer
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.select_encoder import choose_encoder
from cloze.tools.demo.corpus import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of threads in several files: lines, a packed file, an array; about 15 units."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "all.jsonl", num_threads=600)
    lines = (folder / "all.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl").write_bytes(b"".join(lines[:200]))
    (folder / "data" / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[200:400]), mtime=0))
    array = json.dumps([json.loads(line) for line in lines[400:590]])
    (folder / "data" / "c.json").write_text(array)
    for number, line in enumerate(lines[590:]):
        (folder / "data" / f"d{number}.jsonl").write_bytes(line)
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Path:
    source = {"dataset_name": str(corpus / "all.jsonl"), "text_field": "answers.text"}
    train_tokenizer(TokenizerConfig(**source, output=str(corpus / "tokenizer"), vocab_size=500))
    return corpus / "tokenizer"


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def expected(request: pytest.FixtureRequest, corpus: Path, tokenizer: Path) -> tuple[str, dict[str, bytes]]:
    """What one process makes of the corpus without being disturbed."""
    output = corpus / f"expected-{request.param}"
    prepare(config(corpus, output, packing=request.param))
    verify_prepared(output)
    return request.param, contents(output)


@pytest.fixture
def chosen_before(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of a backend takes longer than all the rest here; without it, kills hit the work."""
    spec = choose_encoder(load_tokenizer(str(tokenizer)), "tokenizers", False, [])
    monkeypatch.setattr("cloze.data.prepare.pipeline.choose_encoder", lambda *_: spec)
