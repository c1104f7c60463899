"""Fixtures of the comparison with the reference."""

from __future__ import annotations

import pytest

from reference.runs import Corpus, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A small corpus with a tokenizer of each kind."""
    return make_corpus(tmp_path_factory.mktemp("reference"))
