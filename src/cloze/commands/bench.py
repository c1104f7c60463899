"""`cloze bench`: measure Cloze beside its peers."""

from __future__ import annotations

from pathlib import Path

from cloze.bench.loader import bench_loader
from cloze.bench.prepare import bench_prepare
from cloze.config import BenchConfig


def run(config: BenchConfig) -> None:
    """Measure, and print the table."""
    if config.what == "save":
        from cloze.bench.save import bench_save

        table = bench_save(config)
    elif config.what == "train":
        from cloze.bench.train import bench_train

        table = bench_train(config)
    else:
        table = {"prepare": bench_prepare, "loader": bench_loader}[config.what](config)
    table.show(Path(config.output) if config.output else None)
