"""Blocks are the concatenated tokens, cut; nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cloze.data.packing import Packer


@given(st.lists(st.integers(0, 300), max_size=30), st.integers(1, 64))
def test_blocks_are_the_stream_cut_every_block_size_tokens(lengths: list[int], block_size: int):
    stream = np.arange(sum(lengths), dtype=np.int32)
    packer = Packer(block_size)
    parts = [packer.add(part) for part in np.split(stream, np.cumsum(lengths)[:-1])] if lengths else []
    blocks = np.concatenate(parts) if parts else np.empty((0, block_size), np.int32)
    full = len(stream) // block_size
    assert blocks.shape == (full, block_size)
    assert (blocks.reshape(-1) == stream[: full * block_size]).all()
    assert packer.left_over == len(stream) - full * block_size < block_size
