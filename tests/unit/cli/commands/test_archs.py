"""`cloze archs`: every architecture once, in a table that fits a terminal, and the same as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from cloze.cli.commands.archs import run
from cloze.config import ArchsConfig
from cloze.errors import ConfigError
from cloze.model.archs import (
    BREAKS_GRAPH,
    DOCUMENTS_BY_FLASH_ONLY,
    ENCODER_DECODER,
    FIXED_BLOCK_SIZE,
    GONE,
    NEEDS_CUDA,
    NO_BF16,
    ONE_DOCUMENT_PER_BLOCK,
    POSITIONS_AFTER_PADDING,
    REVERSIBLE,
    UNUSED_PARAMETERS,
    Architecture,
    architectures,
)


def test_the_table_has_every_architecture_once_and_fits_100_columns(tmp_path: Path, capsys):
    run(ArchsConfig(output=str(tmp_path / "archs.json")))
    lines = [line for line in capsys.readouterr().out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 100
    first_words = [line.split()[0] for line in lines if line.strip()]
    names = sorted(config.model_type for config in MODEL_FOR_MASKED_LM_MAPPING)
    assert [word for word in first_words if word in names] == names
    for name, instead in GONE.items():
        assert any(name in line and instead in line for line in lines)
    written = json.loads((tmp_path / "archs.json").read_text())
    assert [Architecture(**row) for row in written["architectures"]] == architectures()
    assert written["gone"] == GONE


def test_facts_are_about_architectures_that_there_are():
    names = {config.model_type for config in MODEL_FOR_MASKED_LM_MAPPING}
    facts = (BREAKS_GRAPH, DOCUMENTS_BY_FLASH_ONLY, ENCODER_DECODER, FIXED_BLOCK_SIZE, NEEDS_CUDA, NO_BF16)
    for fact in (*facts, ONE_DOCUMENT_PER_BLOCK, POSITIONS_AFTER_PADDING, REVERSIBLE, UNUSED_PARAMETERS):
        assert fact <= names
    assert not names & GONE.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("roberta", (True, True, True, True, True, True, True, "offset positions")),
        ("albert", (True, True, True, False, True, True, True, "")),
        ("layoutlm", (True, False, False, True, True, True, True, "unused weights; no best_fit")),
        ("deberta", (False, False, False, True, False, True, True, "no best_fit")),
    ],
)
def test_a_row_says_what_transformers_and_our_runs_say(name: str, expected: tuple, capsys):
    assert architectures(name) == [Architecture(name, *expected)]
    run(ArchsConfig(model_type=name))
    output = capsys.readouterr().out
    (row,) = (line.split(maxsplit=8) for line in output.splitlines() if line.split()[:1] == [name])
    assert [cell == "yes" for cell in row[1:8]] == list(expected[:7])
    assert "mega" not in output


@pytest.mark.parametrize(
    ("name", "hint"),
    [("mega", GONE["mega"]), ("rberta", "did you mean roberta?"), ("gpt2", "the types are: albert, bart, bert")],
)
def test_an_architecture_that_there_is_not_is_one_line(name: str, hint: str):
    with pytest.raises(ConfigError, match=f"--model_type: no masked language model of type {name}; {hint}"):
        run(ArchsConfig(model_type=name))
