"""ZeRO-3 with and without offload, the sparse head, and recomputation, in every combination: one curve."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from test_offload import settings
from test_options import SHORT, curve, train


@pytest.fixture(scope="module")
def plain(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    folder = tmp_path_factory.mktemp("plain")
    return curve(train(prepared, folder, "ddp", 2, *SHORT))


HEADS = {"sparse": [], "dense": ["--sparse_head", "false"]}
KEPT = {"kept": [], "recomputed": ["--gradient_checkpointing"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "head", "activations"), product(["zero3", "zero3_offload", "zero3_nvme"], HEADS, KEPT)
)
def test_every_combination_gives_the_curve_of_plain_training(
    prepared, tmp_path: Path, plain, engine, head, activations
):
    more = ["--deepspeed", settings(engine, tmp_path), *HEADS[head], *KEPT[activations]]
    lines = train(prepared, tmp_path, "ddp", 2, *SHORT, *more)
    np.testing.assert_allclose(curve(lines), plain, rtol=1e-5)
