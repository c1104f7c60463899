"""Read a run's folder from a program or a notebook.

run = cloze.Run("runs/mine")        # also for a run of the command line
run.metrics[-1]["loss"]
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloze.errors import ConfigError
from cloze.utils import run_files
from cloze.utils.foreign.json_yaml import read_json_lines, read_mapping


@dataclass(frozen=True)
class Run:
    """A run's folder, accepted wherever a path is: `cloze.fill(run, ...)`, `open(run / "run.json")`.

    Raises ConfigError if `folder` holds no run.
    """

    folder: Path

    def __init__(self, folder: str | os.PathLike[str]):
        object.__setattr__(self, "folder", Path(folder))
        if not (self.folder / run_files.CONFIG).is_file():
            raise ConfigError("holds no run", where=self.folder, hint="give the output_dir of `cloze.train`")

    def __fspath__(self) -> str:
        return str(self.folder)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, for example for `pandas.DataFrame`: `step` with `loss` (nats),
        `learning_rate`, `grad_norm`, `tokens_per_second`, ..., or with `eval_loss`, `eval_perplexity`, ..."""
        return read_metrics(self.folder)

    @property
    def status(self) -> str:
        """Return `running`, `finished`, `stopped` (resume it with resume_from_checkpoint="auto") or `failed`."""
        return str(self._said().get("status", "running"))

    @property
    def checkpoints(self) -> list[Path]:
        """Return the folders of its checkpoints, oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def _said(self) -> dict[str, Any]:
        return read_mapping(self.folder / run_files.STATUS)

    def __repr__(self) -> str:
        parts = [f"{str(self.folder)!r}: {self.status}"]
        metrics = self.metrics
        losses = [line for line in metrics if line.get("loss") is not None]
        measured = [line for line in metrics if line.get("eval_perplexity") is not None]
        if metrics:
            parts.append(f"step {metrics[-1]['step']:,}")
        if losses:
            parts.append(f"loss {losses[-1]['loss']:.4f}")
        if measured:
            step = measured[-1]["step"]
            at = "" if step == metrics[-1]["step"] else f" at step {step:,}"
            parts.append(f"perplexity {measured[-1]['eval_perplexity']:.4f}{at}")
        return f"Run({', '.join(parts)})"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without damaged ones, which are reported; [] if the file is missing."""
    path = run_dir / run_files.METRICS
    return read_json_lines(path, "step")[0] if path.exists() else []
