"""ZeRO-3 with offload to disk, the sparse head and recomputation give the same curve in every combination.

tests/pairwise covers the other engines and offload to memory.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from offload import settings
from short_runs import SHORT, curve, train

# DeepSpeed leaves tensors below 1 MiB in memory, whatever the settings say: of the model of the other tests nothing
# would reach the disk. Half of a matrix of this one is 1.2 MB; they are more than there are buffers for them.
MATRIX = 768 * 768
MODEL = ["--config_overrides", "hidden_size=768,num_hidden_layers=2,num_attention_heads=4,intermediate_size=768,"]
MODEL[1] += "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
MATRICES = 2 * 6 + 1  # of two layers and of the head
HEADS = {"sparse": [], "dense": ["--sparse_head", "false"]}
KEPT = {"kept": [], "recomputed": ["--gradient_checkpointing"]}


@pytest.fixture(scope="module")
def plain(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return curve(train(prepared, tmp_path_factory.mktemp("plain"), "ddp", 2, *SHORT, *MODEL))


def swapped_bytes(folder: Path) -> dict[str, int]:
    """What one rank has on the disk: parameters, fp32 weights with their moments, gradients."""
    found = {"params": 0, "moments": 0, "weights": 0, "gradients": 0}
    for file in folder.rglob("rank0/*.swp"):
        if file.parent.parent.name == "float32params":
            kind = "params"
        elif "gradient" in file.name:
            kind = "gradients"
        else:
            kind = "moments" if file.name.startswith("exp_avg") else "weights"
        found[kind] += file.stat().st_size
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("head", "activations"), product(HEADS, KEPT))
def test_every_combination_gives_the_curve_of_plain_training(prepared, tmp_path: Path, plain, head, activations):
    more = ["--deepspeed", settings("zero3_nvme", tmp_path), *MODEL, *HEADS[head], *KEPT[activations]]
    lines = train(prepared, tmp_path, "ddp", 2, *SHORT, *more)
    np.testing.assert_allclose(curve(lines), plain, rtol=1e-5)
    on_disk, matrices = swapped_bytes(tmp_path / "disk"), 4 * MATRICES * MATRIX // 2
    assert on_disk["params"] == on_disk["gradients"] == matrices
    assert on_disk["weights"] >= matrices
    assert on_disk["moments"] == 2 * on_disk["weights"]
