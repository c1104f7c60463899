"""What checkpoint.json must hold, beyond its checksum, before a file of the checkpoint is opened.

check_manifest(manifest)        # ValueError: pieces[3].file cannot be '../x'
"""

from __future__ import annotations

import math
from typing import Any

from cloze.utils.foreign.schema import COUNT, FILE, NUMBER, PATH, SHA256, TEXT, Each, check, optional

MAX_ELEMENTS = 1 << 63
_PRECISIONS = ("no", "fp16", "bf16", "fp8")


def _precision(value: Any) -> bool:
    return value in _PRECISIONS


def _sum(value: Any) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


SHAPE = {
    "position": {"global_step": COUNT, "samples_seen": COUNT, "tokens_seen": COUNT},
    "?world_size": COUNT,
    "optimizer": {"class": TEXT, "groups": [{"params": [TEXT]}]},
    "parameters": Each({"shape": [COUNT], "trained": bool, "scalars": Each(object)}),
    "tied": Each(TEXT),
    "?stream": optional((dict, list)),
    "run": Each(object),
    "config": Each(object),
    "?versions": dict,
    "?engine": TEXT,
    "precision": _precision,
    "?loss_scale": optional(Each(optional(NUMBER))),  # older versions write null for fields that a fixed scale lacks
    "?evaluation_pending": bool,
    "pieces": [{"name": TEXT, "key": TEXT, "offset": COUNT, "length": COUNT, "file": FILE, "sum": _sum}],
    "files": Each({"bytes": COUNT, "sha256": SHA256}, PATH),
}


def check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError if a value has a wrong type, a file is named that is not in the checkpoint's list of files, or
    a piece exceeds its parameter."""
    check(manifest, SHAPE)
    parameters, files = manifest["parameters"], manifest["files"]
    sizes = {name: math.prod(facts["shape"]) for name, facts in parameters.items()}
    if any(size >= MAX_ELEMENTS or len(parameters[name]["shape"]) > 64 for name, size in sizes.items()):
        raise ValueError("a parameter is larger than any memory")
    for piece in manifest["pieces"]:
        if piece["file"] not in files:
            raise ValueError(f"a piece of {piece['name']} is in a file that is not listed")
        if piece["offset"] + piece["length"] > sizes.get(piece["name"], -1):
            raise ValueError(f"a piece of {piece['name']} lies outside of it")
    for group in manifest["optimizer"]["groups"]:
        if any(name not in parameters for name in group["params"]):
            raise ValueError("the optimizer has a parameter that the model has not")
