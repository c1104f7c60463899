"""The results of `cloze.evaluate` and `cloze.fill`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """One prediction for a mask. `score`: its probability; `text`: the text with `token` in place of its mask."""

    score: float
    token: str
    text: str


@dataclass(frozen=True)
class Evaluation:
    """The result of `cloze.evaluate`. `values`: all of eval.json.

    `perplexity` is exp(mean loss in nats) of the masked tokens; for sentences the pseudo-perplexity.
    """

    values: dict[str, Any]

    @property
    def perplexity(self) -> float:
        """Return the perplexity, or for sentences the pseudo-perplexity."""
        return float(self.values["perplexity" if "perplexity" in self.values else "pseudo_perplexity"])

    @property
    def steps(self) -> tuple[int, ...]:
        """Return the steps of the checkpoints whose weights were measured; () if not recorded."""
        lineage = self.values.get("lineage")
        return tuple(lineage["steps"]) if isinstance(lineage, dict) else ()

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the perplexity; None for sentences."""
        found = self.values.get("perplexity_interval")
        return None if found is None else (float(found[0]), float(found[1]))

    @property
    def masked_accuracy(self) -> float | None:
        """Return the share of masked tokens that are predicted right; None for sentences."""
        return self.values.get("masked_accuracy")

    def __repr__(self) -> str:
        if self.interval is None:
            return f"Evaluation(pseudo-perplexity {self.perplexity:.4f}, {self.values['tokens']:,} tokens)"
        low, high = self.interval
        return (
            f"Evaluation(perplexity {self.perplexity:.4f} (95 %: {low:.4f} to {high:.4f}), masked accuracy "
            f"{self.masked_accuracy:.4f}, {self.values['masked_tokens']:,} masked tokens)"
        )
