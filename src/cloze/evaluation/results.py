"""What the functions of `cloze.api` give: small values that say what they are.

run = cloze.Run("runs/mine")        # also of a run that was made on the command line
run.metrics[-1]["loss"]
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cloze.errors import ConfigError
from cloze.utils.foreign.json_yaml import read_json_lines, read_mapping


class Answer(NamedTuple):
    """One word for a mask. `score`: its probability; `text`: the text with `token` in the place of its mask."""

    score: float
    token: str
    text: str


@dataclass(frozen=True)
class Run:
    """A run's folder, which stands for the run wherever a path does: `cloze.fill(run, ...)`, `open(run
    / ...)`.

    Raises ConfigError where `folder` holds no run.
    """

    folder: Path

    def __init__(self, folder: str | os.PathLike[str]):
        object.__setattr__(self, "folder", Path(folder))
        if not (self.folder / "config.yaml").is_file():
            raise ConfigError("holds no run", where=self.folder, hint="give the output_dir of `cloze.train`")

    def __fspath__(self) -> str:
        return str(self.folder)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, as `pandas.DataFrame` takes them: `step` with `loss` (nats), `learning_rate`,
        `grad_norm`, `tokens_per_second`, ..., or with `eval_loss`, `eval_perplexity`, ..."""
        path = self.folder / "metrics.jsonl"
        return read_json_lines(path, "step")[0] if path.is_file() else []

    @property
    def status(self) -> str:
        """`running`, `finished`, `stopped` (go on with resume_from_checkpoint="auto") or `failed`."""
        return str(self._said().get("status", "running"))

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of its checkpoints, the oldest first."""
        found = [path for path in self.folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def _said(self) -> dict[str, Any]:
        return read_mapping(self.folder / "status.json")

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


@dataclass(frozen=True)
class Evaluation:
    """What `cloze.evaluate` measured. `values`: all of eval.json.

    `perplexity` is exp(mean loss in nats) of the masked tokens, of sentences the pseudo-perplexity.
    """

    values: dict[str, Any]

    @property
    def perplexity(self) -> float:
        """Perplexity, or pseudo-perplexity where sentences were scored."""
        return float(self.values["perplexity" if "perplexity" in self.values else "pseudo_perplexity"])

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the checkpoints whose weights were measured; () if that is not recorded."""
        lineage = self.values.get("lineage")
        return tuple(lineage["steps"]) if isinstance(lineage, dict) else ()

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the perplexity is with 95 % confidence; None of sentences."""
        found = self.values.get("perplexity_interval")
        return None if found is None else (float(found[0]), float(found[1]))

    @property
    def masked_accuracy(self) -> float | None:
        """Share of masked tokens that are predicted right; None of sentences."""
        return self.values.get("masked_accuracy")

    def __repr__(self) -> str:
        if self.interval is None:
            return f"Evaluation(pseudo-perplexity {self.perplexity:.4f}, {self.values['tokens']:,} tokens)"
        low, high = self.interval
        return (
            f"Evaluation(perplexity {self.perplexity:.4f} (95 %: {low:.4f} to {high:.4f}), masked accuracy "
            f"{self.masked_accuracy:.4f}, {self.values['masked_tokens']:,} masked tokens)"
        )
