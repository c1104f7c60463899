"""A model from whatever names one: a run's folder, a checkpoint, a consolidated folder, a name on the Hub.

model, tokenizer_dir = open_model("runs/mine/checkpoint-500")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from cloze.errors import CheckpointError, ModelError
from cloze.model.load import load_pretrained
from cloze.train.checkpoint_files import find_checkpoint, list_checkpoints, verify_checkpoint
from cloze.train.restore import PieceReader
from cloze.train.state import WEIGHT


def model_folder(name: str) -> str:
    """A run's folder stands for the model in it; anything else is taken as it is.

    Raises ModelError for a run that has not been consolidated yet, and for a local path without a model.
    """
    path = Path(name)
    if (path / "model" / "config.json").is_file():
        return str(path / "model")
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "config.yaml").is_file() or (path / "checkpoint.json").is_file():
            raise ModelError("there is no model here yet", where=name, hint=f"run `cloze consolidate {name}` first")
        raise ModelError(
            "not a model folder: there is no config.json",
            where=name,
            hint="give a run, a model folder or a name on the Hub",
        )
    if not path.exists() and name.startswith((".", "/", "runs/")):
        raise ModelError("no such folder", where=name, hint="give a run, a model folder or a name on the Hub")
    return name


def find_model(name: str) -> tuple[str, str]:
    """What `load_model` is to load, a checkpoint or a model, and where its tokenizer is.

    A run's folder stands for its consolidated `model`, and where there is none yet, for its newest whole checkpoint.
    Raises ModelError, CheckpointError.
    """
    path = Path(name)
    if (path / "checkpoint.json").is_file():
        verify_checkpoint(path)
        return name, str(path / "model")
    if path.is_dir() and not (path / "model" / "config.json").is_file() and list_checkpoints(path):
        found = find_checkpoint(path, "auto")
        assert found is not None  # there are some
        return str(found), str(found / "model")
    folder = model_folder(name)
    return folder, folder


def load_model(found: str, trust_remote_code: bool = False) -> Any:
    """The model that `find_model` found, in fp32 on the CPU, in evaluation mode."""
    path = Path(found)
    return load_checkpoint(path) if (path / "checkpoint.json").is_file() else load_pretrained(found, trust_remote_code)


def open_model(name: str, trust_remote_code: bool = False) -> tuple[Any, str]:
    """Both: the model, and where its tokenizer is."""
    found, tokenizer_dir = find_model(name)
    return load_model(found, trust_remote_code), tokenizer_dir


@torch.no_grad()
def load_checkpoint(folder: Path) -> Any:
    """The model of a whole checkpoint, whatever engine and number of ranks wrote it: read weight by weight.

    Raises CheckpointError where its weights are not those of its configuration.
    """
    manifest = verify_checkpoint(folder, contents=False)
    config = AutoConfig.from_pretrained(folder / "model")
    model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
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
