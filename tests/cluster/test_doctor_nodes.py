"""`srun cloze doctor` on two real nodes: fit to train on, and not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from slurm import Cluster


def examine(cluster: Cluster, workplace: Path) -> str:
    """What it printed, and its exit code."""
    path = f"{sys.prefix}/bin:{cluster.env['PATH']}"
    words = "srun --nodes=2 --ntasks-per-node=1 cloze doctor --output_dir . --timeout 30"
    return cluster.run("bash", "-c", f"{words} 2>&1; echo exit code $?", cwd=workplace, PATH=path)


@pytest.mark.slow
def test_two_nodes_that_fit_together_and_a_folder_that_they_do_not_share(cluster: Cluster, workplace: Path):
    printed = examine(cluster, workplace)
    assert "exit code 0" in printed, printed
    assert "GB/s" in printed
    cluster.tool("on", "node2", "mount", "-t", "tmpfs", "none", str(workplace))
    try:
        printed = examine(cluster, workplace)
    finally:
        cluster.tool("on", "node2", "umount", str(workplace))
    assert "exit code 2" in printed, printed
    assert any("BAD" in line and "node2" in line for line in printed.splitlines()), printed
