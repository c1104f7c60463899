"""Read the tensors of a checkpoint written by any engine on any number of ranks.

    with PieceReader(folder, read_manifest(folder)) as pieces:
        weight = pieces.read("lm_head.bias", WEIGHT)

Pieces are found by parameter name and offset; files are mapped, so reading a slice loads only that slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cloze.checkpoint.checksum import add_sums
from cloze.checkpoint.format import FROZEN, HINT, NUMBERS, WEIGHT
from cloze.errors import CheckpointError
from cloze.utils.foreign.safetensors_header import map_tensors


class PieceReader:
    """Reads any run of elements of any stored tensor. Use it as a context manager: files are mapped, not loaded."""

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self._files: dict[str, Any] = {}
        self._pieces: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._numbers: dict[str, dict[str, dict[str, Any]]] = {}
        for piece in manifest["pieces"]:
            if piece["key"] in NUMBERS:  # older versions stored those of parameters of shape [] as tensors
                self._numbers.setdefault(piece["name"], {})[piece["key"]] = piece
                continue
            self._pieces.setdefault((piece["name"], piece["key"]), []).append(piece)

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def sums(self) -> dict[tuple[str, str], int]:
        """Return the checksum of every stored tensor, by parameter name and key."""
        return {key: add_sums(piece["sum"] for piece in found) for key, found in self._pieces.items()}

    def keys(self, name: str) -> list[str]:
        """Return the optimizer's tensors stored for a parameter."""
        return sorted(key for other, key in self._pieces if other == name and key != WEIGHT)

    def numbers(self, name: str) -> dict[str, float]:
        """Return the optimizer's single numbers for a parameter.

        Older versions did not store those of parameters of shape [1]: they are taken from another parameter, since
        all parameters have taken the same steps.
        """
        parameters = self.manifest["parameters"]
        own = dict(parameters[name]["scalars"])
        for key, piece in self._numbers.get(name, {}).items():
            own[key] = float(self._open(piece["file"]).get_tensor(f"{name}:{key}"))
        if own or math.prod(parameters[name]["shape"]) != 1 or not self.keys(name):
            return own
        return dict(next((facts["scalars"] for facts in parameters.values() if facts["scalars"]), {}))

    def pieces(self, name: str, key: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the pieces of a tensor in the order of the files: (offset, elements [n], mapped and not loaded)."""
        for piece in self._pieces.get((name, key), []):
            yield piece["offset"], self._tensor(piece["file"], f"{name}:{key}")

    def read(self, name: str, key: str, offset: int = 0, length: int | None = None) -> torch.Tensor:
        """Return elements [offset, offset + length) of a tensor, [length] on the CPU. CheckpointError if some are
        missing."""
        numel = math.prod(self.manifest["parameters"][name]["shape"])
        end = numel if length is None else offset + length
        out: torch.Tensor | None = None
        covered = 0
        if end == offset:  # of a parameter without elements
            return torch.empty(0)
        for piece in self._pieces.get((name, key), []):
            first, last = max(offset, piece["offset"]), min(end, piece["offset"] + piece["length"])
            if first >= last:
                continue
            source = self._tensor(piece["file"], f"{name}:{key}", "get_slice")
            part = source[first - piece["offset"] : last - piece["offset"]]
            if last - first == end - offset:
                return part
            if out is None:
                out = torch.empty(end - offset, dtype=part.dtype)
            out[first - offset : last - offset] = part
            covered += last - first
        if out is None or covered != end - offset:
            raise CheckpointError(
                f"{covered} of {end - offset} elements of {name}:{key} are there",
                where=self.folder,
                hint="it is damaged: use another checkpoint",
            )
        return out

    def frozen(self, name: str) -> torch.Tensor:
        """Return a buffer, or a parameter that was not trained."""
        return self._tensor(FROZEN, name)

    def frozen_names(self) -> list[str]:
        """Return names of the buffers and untrained parameters."""
        return sorted(self._open(FROZEN).keys())

    def _tensor(self, file: str, key: str, method: str = "get_tensor") -> Any:
        try:
            return getattr(self._open(file), method)(key)
        except SafetensorError:
            raise CheckpointError(f"has no {key}", where=self.folder / file, hint=HINT) from None

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = map_tensors(self.folder / file, folder=self.folder)
        return self._files[file]
