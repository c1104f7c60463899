"""Checkpoints of other tools, written and converted."""

from __future__ import annotations

import os
from pathlib import Path

import foreign
import torch
from ranks import run_ranks, succeed
from transformers import AutoModelForMaskedLM

from cloze.cli.commands import consolidate
from cloze.config import ConsolidateConfig

DECODER, EMBEDDINGS = "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"


def written(function, folder: Path, world_size: int, **how) -> Path:
    """The folder with what another tool wrote."""
    succeed(run_ranks(function, world_size, folder / "log", folder=str(folder / "theirs"), **how))
    return folder / "theirs"


def convert(checkpoint: Path, output: Path, tokenizer: Path | None = None, config: Path | None = None, **more) -> None:
    names = {"config_name": config, "tokenizer_name": tokenizer}
    given = {name: str(path) for name, path in names.items() if path is not None}
    consolidate.run(ConsolidateConfig(checkpoint=str(checkpoint), output=str(output), **given, **more))


def assert_trained(model_folder: Path, theirs: Path) -> None:
    """Every weight is the one training ended with, to the bit."""
    truth = torch.load(theirs / "truth.pt")
    weights = AutoModelForMaskedLM.from_pretrained(model_folder).state_dict()
    assert truth.keys() & weights.keys() >= {EMBEDDINGS, foreign.FROZEN, "lm_head.bias"}
    for name, tensor in truth.items():
        if name in weights:  # the embeddings have a buffer that is not stored
            assert torch.equal(weights[name], tensor), name


class Attack:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)
