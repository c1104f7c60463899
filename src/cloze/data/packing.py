"""From token streams to blocks of one size.

Documents are laid end to end and cut every `block_size` tokens, exactly: nothing is padded, no document is dropped or
shortened, and only what is left over at the end of the whole corpus, less than one block, is not used. These are the
blocks of the Hugging Face tutorial's `group_texts`, without the tails that it drops every thousand documents.

    packer = Packer(block_size=128)
    blocks = packer.add(tokens)         # [n, 128] int32, n >= 0
    packer.left_over                    # tokens waiting for more
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Packer:
    """Keeps the tokens that do not fill a block yet, and hands on blocks as soon as they are full."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self._rest: NDArray[np.int32] = np.empty(0, np.int32)

    @property
    def left_over(self) -> int:
        """How many tokens wait for a block, less than block_size."""
        return len(self._rest)

    def add(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """Append tokens [n] of any number of documents; return the blocks that are full now, [m, block_size]."""
        stream = np.concatenate([self._rest, tokens]) if len(self._rest) else tokens
        full = len(stream) // self.block_size
        self._rest = stream[full * self.block_size :].copy()
        return stream[: full * self.block_size].reshape(full, self.block_size)
