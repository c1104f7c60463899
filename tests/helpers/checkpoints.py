"""Checkpoints compared."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """Weights, optimizer state and the probe's answers are the same bytes."""
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(files) >= 3
    assert files == sorted(path.name for path in other.glob("*.safetensors"))
    for name in files:
        assert filecmp.cmp(one / name, other / name, shallow=False), name
    manifests = [json.loads((folder / "checkpoint.json").read_text()) for folder in (one, other)]
    for key in ("position", "parameters", "optimizer", "pieces"):
        assert manifests[0][key] == manifests[1][key], key


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(checkpoint.glob("rank-*.safetensors")):
        tensors |= {f"{file.name}:{name}": value for name, value in load_file(file).items()}
    return tensors
