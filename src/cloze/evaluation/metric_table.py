"""The metrics of an evaluation, in the order of eval.json: where each is printed, drawn and published.

    for metric in METRICS:
        values[metric.key] = getattr(scores, metric.key)        # cloze.evaluation.perplexity.Scores

A new metric is a property of `Scores` and a row here. It imports nothing, so that reading results does not load torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One number. `key`: its name in eval.json, a property of `Scores`, with `KEY_interval` beside it if `interval`.

    `column`: its head in the table of a report, in per cent if `share`. `printed`: the words of `cloze evaluate`; None
    for those of its first line. `card`: its name in the results of a model card, None if it is not one of them.
    `chart`: the title of its chart; None if training does not log it (the loss has the chart of the training loss).
    """

    key: str
    column: str
    printed: str | None = None
    card: str | None = None
    chart: str | None = None
    scale: str = "linear"
    share: bool = False
    interval: bool = False


METRICS = (
    Metric(
        "perplexity",
        "perplexity",
        card="Perplexity (fixed masks)",
        chart="Perplexity",
        scale="log",
        interval=True,
    ),
    Metric("loss", "loss", interval=True),
    Metric("masked_accuracy", "right", card="Masked accuracy", chart="Masked accuracy", share=True),
    Metric("masked_accuracy_top5", "in the best 5", printed="right among the five best {:.4f}", share=True),
    Metric("bits_per_byte", "bits per byte", printed="{:.4f} bits per byte", card="Bits per byte"),
)
