"""Open a model by a run's folder, a checkpoint, a consolidated folder or a name on the Hub.

found = resolve_model_path("runs/mine/checkpoint-500")      # see cloze.checkpoint.model_path
tokenizer = open_tokenizer(found)
model = load_model(found.folder, tokenizer)             # ModelError if the two do not belong together
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.checkpoint.format import WEIGHT, is_checkpoint_name, still_there, verify_checkpoint
from cloze.checkpoint.model_path import ModelPath
from cloze.checkpoint.reader import PieceReader
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.own_tokenizer import check_pair
from cloze.errors import CheckpointError
from cloze.model.load import load_pretrained
from cloze.utils import run_files
from cloze.utils.foreign.pretrained import from_config, from_pretrained


def open_tokenizer(found: ModelPath, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model. Raises CheckpointError if training has deleted its checkpoint meanwhile, and as
    `load_tokenizer` does."""
    with _unless_deleted(found.folder):
        return load_tokenizer(found.tokenizer, trust_remote_code)


def _unless_deleted(folder: str) -> AbstractContextManager[None]:
    """Report in one line that a checkpoint has been deleted; of other folders and of names nothing is known."""
    return still_there(Path(folder)) if is_checkpoint_name(Path(folder).name) else nullcontext()


def load_model(folder: str, tokenizer: Any, trust_remote_code: bool = False) -> Any:
    """Return the model of a checkpoint, a model folder or a name, in fp32 on the CPU, in evaluation mode. Raises
    ModelError if `tokenizer`, which is to write its inputs, has other ids; CheckpointError if it is damaged."""
    with _unless_deleted(folder):
        is_ours = (Path(folder) / run_files.CHECKPOINT).is_file()
        model = load_checkpoint(Path(folder)) if is_ours else load_pretrained(folder, trust_remote_code)
    check_pair(folder, model.config, tokenizer)
    return model


@torch.no_grad()
def load_checkpoint(folder: Path) -> Any:
    """Return the model of a checkpoint written by any engine on any number of ranks, read weight by weight.

    Raises CheckpointError if its weights are not those of its configuration.
    """
    with still_there(folder):
        return _load_checkpoint(folder)


def _load_checkpoint(folder: Path) -> Any:
    manifest = verify_checkpoint(folder, contents=False)
    config = from_pretrained(AutoConfig, folder / "model")
    model = from_config(AutoModelForMaskedLM, config, dtype=torch.float32)
    here = dict(model.named_parameters())
    different = sorted(here.keys() ^ manifest["parameters"].keys())
    if different:
        raise CheckpointError(
            f"{different[0]} is in only one of checkpoint and model",
            where=folder,
            hint="it was written for another version of this architecture: use the transformers that trained it",
        )
    buffers = dict(model.named_buffers())
    with PieceReader(folder, manifest) as pieces:
        for name, facts in manifest["parameters"].items():
            values = pieces.read(name, WEIGHT) if facts["trained"] else pieces.frozen(name)
            here[name].copy_(values.view(here[name].shape))
        for name in pieces.frozen_names():
            if name in buffers:
                buffers[name].copy_(pieces.frozen(name))
    return model.eval()
