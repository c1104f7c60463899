"""What the tests on a cluster share. They need root, network namespaces and Debian's SLURM, else they skip."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import NEEDED, Cluster, make_workplace


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster of two nodes; whoever breaks a node mends it."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and Debian's munge slurmctld slurmd slurm-client iproute2; missing: {missing}")
    folder = Path(tempfile.mkdtemp(prefix="ms-", dir="/tmp"))  # short: the path of a socket has 108 bytes at most
    folder.chmod(0o755)  # munged wants to be reached
    found = Cluster(folder)
    try:
        found.up()
        yield found
    finally:
        found.down()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path) -> Path:
    """A folder as the repository's root is, with a recipe for a tiny model and one for its blocks."""
    return make_workplace(tmp_path, prepared)
