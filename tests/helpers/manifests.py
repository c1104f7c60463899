"""Manifests that are accepted."""

from __future__ import annotations

from typing import Any

from cloze.checkpoint.format import FORMAT_VERSION
from cloze.data.prepared.shards import FORMAT_VERSION as DATA_VERSION

SHA = "0" * 64
CHECKPOINT: dict[str, Any] = {
    "format_version": FORMAT_VERSION,
    "position": {"global_step": 1, "samples_seen": 2, "tokens_seen": 3},
    "optimizer": {"class": "AdamW", "groups": [{"params": ["a"], "lr": 0.1}]},
    "parameters": {"a": {"shape": [2, 3], "trained": True, "scalars": {"step": 1.0}}},
    "tied": {},
    "stream": None,
    "run": {"seed": 1},
    "config": {"seed": 1},
    "precision": "no",
    "loss_scale": None,
    "evaluation_pending": False,
    "pieces": [{"name": "a", "key": "weight", "offset": 0, "length": 6, "file": "r.safetensors", "sum": -5}],
    "files": {"r.safetensors": {"bytes": 3, "sha256": SHA}, "model/config.json": {"bytes": 2, "sha256": SHA}},
}
PREPARED: dict[str, Any] = {
    "format_version": DATA_VERSION,
    "block_size": 8,
    "tokenizer": {"name": "t", "mask_token_id": 4, "special_token_ids": [0, 1]},
    "splits": {"train": {"blocks": 1, "shards": [{"file": "d.arrow", "blocks": 1, "bytes": 3, "sha256": SHA}]}},
}
