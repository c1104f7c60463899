"""A prepared folder as a dataset of torch, for transformers' Trainer or a loop of one's own.

    dataset = PackedDataset("prepared/mine")                # or "validation" blocks: split="validation"
    dataset[7]["input_ids"]                                 # [block_size] int64
    Trainer(model, args, train_dataset=dataset, data_collator=MaskingCollator(dataset.tokenizer))

Blocks are mapped, not read. Where several documents are packed into a block (best_fit), each item says which document
each of its tokens belongs to, and `MaskingCollator` makes of that what the model needs to keep them apart.
"""

from __future__ import annotations

from collections import UserDict
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cloze.data.prepared.shards import Prepared, open_prepared
from cloze.data.prepared.verified import verify_shards
from cloze.data.tokenizers.load import load_tokenizer


class Block(UserDict):
    """One item: `input_ids` [S] int64; `sample`: its number, which decides its mask; where documents are packed,
    `segments` [S] int32, the document of each token.

    No `dict`, of which Trainer would remove all that the model does not take before the collator has seen it.
    """


class PackedDataset(Dataset):
    """The blocks of one split of a prepared folder. Raises DataError if the folder or split is missing."""

    def __init__(self, folder: str | PathLike[str] | Prepared, split: str = "train"):
        self.prepared = folder if isinstance(folder, Prepared) else open_prepared(str(folder))
        self._blocks = self.prepared.blocks(split)
        verify_shards(self.prepared, [split])
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> Block:
        if not -len(self) <= index < len(self):
            raise IndexError(f"blocks are numbered 0 .. {len(self) - 1}")
        at = np.array([index % len(self)])
        found: dict[str, Any] = {"input_ids": torch.from_numpy(self._blocks.read(at)[0].astype(np.int64))}
        found["sample"] = self._epoch * len(self) + int(at[0])
        if self._blocks.has_pieces:
            found["segments"] = torch.from_numpy(self._blocks.read_segments(at)[0])
        return Block(found)

    def set_epoch(self, epoch: int) -> None:
        """Number the samples of an epoch, so that each epoch draws new masks. Trainer and accelerate's data loaders
        call it. Persistent worker processes do not receive it and repeat the masks of the first epoch."""
        self._epoch = epoch

    @property
    def block_size(self) -> int:
        """Return the number of tokens per block."""
        return self.prepared.block_size

    @cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer that the blocks were made with."""
        return load_tokenizer(str(self.prepared.tokenizer_dir))
