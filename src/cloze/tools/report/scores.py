"""Sections on quality: eval.json of each run, with intervals, by frequency; and filled masks.

section_of_scores(runs)     # an Html
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cloze.evaluation.metric_table import METRICS
from cloze.tools.report.gather import Run
from cloze.tools.report.markup import Html, colour, element, joined, key, note, number, section, table
from cloze.utils.foreign.lenient_read import interval_of, is_number, part

# What two results must share to be compared; see `cloze.evaluation.evaluate`.
MEASURED_ON = ("data_checksum", "split", "mlm_probability", "seed", "draws")
Answers = list[tuple[str, float]]
Filled = dict[
    str, Any
]  # {"run": name, "number": its colour, "text": ..., "before": (what, Answers) or None, "after": Answers}


def section_of_scores(runs: Sequence[Run]) -> Html:
    """Return perplexity with its interval, accuracy, and loss by frequency of the runs that have an eval.json."""
    scored = [(number, run) for number, run in enumerate(runs) if is_number(run.scores.get("perplexity"))]
    if not scored:
        return Html("")
    same = len({tuple(str(run.scores.get(name)) for name in MEASURED_ON) for _, run in scored}) == 1
    if any(run.scores.get(name) is None for _, run in scored for name in MEASURED_ON):
        same = len(scored) == 1  # values that are not recorded cannot be compared
    scores = scored[0][1].scores
    tool, other = element("code", "cloze evaluate"), element("code", "cloze compare")
    words: list[Any] = ["By ", tool, f", on {_measured(scores)}. " if same else ". "]
    words.append("Ranges are 95 % intervals over blocks.")
    if len(scored) > 1 and same:
        words += [" The masks are the same: ", other, " shows in pairs whether a difference is more than chance."]
    if not same:
        words.append(" These were measured on different masks or data, and cannot be compared.")
    notes = [f"{run.name}: {run.scores_note}" for _, run in scored if run.scores_note]
    words += [f" {'; '.join(notes)}."] if notes else []
    return section(
        "Evaluation", note(joined(words)), _stack(_perplexities(scored, len(runs) > 1), _bands(scored, len(runs) > 1))
    )


def _stack(*parts: Html) -> Html:
    return element("div", joined(parts), class_="stack")


def _measured(scores: dict[str, Any]) -> str:
    tokens, blocks = scores.get("masked_tokens"), scores.get("blocks")
    amount = f"{tokens:,} masked tokens of {blocks:,} blocks" if is_number(tokens) and is_number(blocks) else "blocks"
    share = scores.get("mlm_probability")
    masked = f" ({100 * share:g} % of the tokens masked)" if is_number(share) else ""
    return f"{amount} of the split {scores.get('split', 'validation')}{masked}"


def _perplexities(scored: Sequence[tuple[int, Run]], several: bool) -> Html:
    """Return a row for each run: its numbers, and its interval on a scale that all runs share."""
    intervals = [interval_of(run.scores, "perplexity") or [run.scores["perplexity"]] * 2 for _, run in scored]
    low, high = min(one[0] for one in intervals), max(one[1] for one in intervals)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    low, span = low - room, (high - low) + 2 * room
    rows, others = [], [metric for metric in METRICS if metric.key != "perplexity"]
    for (at, run), (from_, to) in zip(scored, intervals, strict=True):
        scores = run.scores
        ends = {"low": from_, "high": to, "at": scores["perplexity"]}
        style = ";".join(f"--{name}:{(value - low) / span:.2%}" for name, value in ends.items())
        picture = Html(f'<span class="range {colour(at)}" style="{style}" aria-hidden="true"><b></b><i></i></span>')
        notes = element("span", f"{number(from_)} to {number(to)}", class_="name") if to > from_ else None
        cells: list[Any] = [key(at, run.name, several), number(scores["perplexity"]), notes, picture]
        values = [(metric, scores.get(metric.key)) for metric in others]
        cells += [_percent(value) if metric.share else number(_finite(value)) for metric, value in values]
        rows.append(cells)
    head = ["run", "perplexity", "95 % interval", "", *(metric.column for metric in others)]
    return table(head, rows, numbers=(1, *range(4, len(head))))


def _bands(scored: Sequence[tuple[int, Run]], several: bool) -> Html:
    """Return bars with the loss of tokens by their frequency, on one scale, and the share predicted correctly."""
    names: list[str] = []
    for _, run in scored:
        names += [name for name in part(run.scores, "bands") if name not in names]
    values: dict[tuple[str, int], tuple[float, Any, Any]] = {}
    for at, run in scored:
        for name in names:
            band = part(part(run.scores, "bands"), name)
            if is_number(found := band.get("loss")):
                values[name, at] = float(found or 0.0), band.get("masked_accuracy"), band.get("masked_tokens")
    most = max([loss for loss, *_ in values.values()], default=0.0)
    if most <= 0:
        return Html("")
    rows = []
    for name in names:
        first = True
        for at, run in scored:
            if (name, at) not in values:
                continue
            loss, accuracy, tokens = values[name, at]
            shown, first = (name if first else ""), False
            bar = Html(
                f'<span class="bar {colour(at)}" style="--to:{loss / most:.2%}" aria-hidden="true"><i></i></span>'
            )
            cells: list[Any] = [shown, key(at, run.name, True), number(loss), bar, _percent(accuracy), number(tokens)]
            rows.append(cells if several else [shown, *cells[2:]])
    head = ["masked tokens by frequency", *(["run"] if several else []), "loss", "", "right", "tokens"]
    loss_at = 2 if several else 1
    return table(head, rows, numbers=(loss_at, loss_at + 2, loss_at + 3))


def section_of_answers(filled: Sequence[Filled], several: bool) -> Html:
    """Return the predictions of each model for the masks, before and after training."""
    if not filled:
        return Html("")
    with_before = any(one["before"] for one in filled)
    rows, shown = [], None
    for one in filled:
        name = [key(one["number"], one["run"], True)] if several else []
        before = one["before"]
        first = [_answers(before[1], before[0]) if before else "not there"] if with_before else []
        text, shown = ("" if one["text"] == shown else one["text"]), one["text"]
        rows.append([text, *name, *first, _answers(one["after"], None)])
    head = ["text", *(["run"] if several else []), *(["before"] if with_before else []), "after"]
    return section("Masks filled", table(head, rows, class_="answers"))


def _answers(answers: Answers, source: str | None) -> Html:
    lines: list[Any] = [
        Html(f"{element('b', word)} {probability:.1%}".replace("%", " %") + "<br>") for word, probability in answers
    ]
    return joined([*lines, *([element("small", source)] if source else [])])


def _percent(value: Any) -> str | None:
    return f"{value:.2%}".replace("%", " %") if is_number(value) else None


def _finite(value: Any) -> float | None:
    return float(value) if is_number(value) and math.isfinite(value) else None
