"""A model from whatever names one: a run's folder, a checkpoint, a consolidated folder, a name on the Hub.

found = resolve_model("runs/mine/checkpoint-500")      # see cloze.model_path
model = load_model(found.folder)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.errors import CheckpointError
from cloze.foreign.pretrained import from_config, from_pretrained
from cloze.model.load import load_pretrained
from cloze.train.checkpoint_files import still_there, verify_checkpoint
from cloze.train.restore import PieceReader
from cloze.train.state import WEIGHT


def load_model(folder: str, trust_remote_code: bool = False) -> Any:
    """Return the model of a checkpoint, a model folder or a name, in fp32 on the CPU, in evaluation mode."""
    if (Path(folder) / "checkpoint.json").is_file():
        return load_checkpoint(Path(folder))
    return load_pretrained(folder, trust_remote_code)


@torch.no_grad()
def load_checkpoint(folder: Path) -> Any:
    """The model of a whole checkpoint, whatever engine and number of ranks wrote it: read weight by weight.

    Raises CheckpointError where its weights are not those of its configuration.
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
