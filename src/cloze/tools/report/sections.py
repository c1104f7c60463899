"""The sections of a report that are tables: headline, data, machines, checkpoints, configuration.

headline(runs), data_section(runs), machines_section(runs)      # Html
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from cloze.config import BlocksConfig, TrainConfig
from cloze.data.prepared.text_report import report_lines, warnings_of
from cloze.tools.report.curves import computed_on
from cloze.tools.report.gather import Run, data_name, model_name
from cloze.tools.report.markup import Html, element, facts, joined, key, note, number, section, short, size, table
from cloze.utils.foreign.lenient_read import interval_of, is_number, part
from cloze.utils.terminal.console import duration

BLOCK_FLAGS = {field.name for field in dataclasses.fields(BlocksConfig)} - {"dataset_name"}


def headline(runs: Sequence[Run]) -> Html:
    """Return the figures one looks for first: tiles of one run, a table of several."""
    if len(runs) == 1:
        tiles = [
            element("div", joined([element("dt", name), element("dd", joined([value, element("small", more)]))]))
            for name, value, more in _tiles(runs[0])
            if value is not None
        ]
        return element("dl", joined(tiles), class_="tiles")
    rows = []
    for at, run in enumerate(runs):
        perplexity, _ = _perplexity(run)
        rate = _tokens_per_second(run)
        row = [key(at, run.name, True), perplexity, number(run.last("loss")), f"{run.last_step:,}"]
        row += [short(run.tokens_seen), _spent(run), short(rate), f"{len(run.restarts)}", run.status]
        rows.append(row)
    head = ["run", "perplexity", "training loss", "steps", "tokens", "time", "tokens/s", "restarts", "status"]
    return section("At a glance", table(head, rows, numbers=range(1, 8)))


def _tiles(run: Run) -> list[tuple[str, str | None, str]]:
    perplexity, how = _perplexity(run)
    scores = run.scores if use_scores(run) else {}
    accuracy = scores.get("masked_accuracy", run.last("eval_masked_accuracy"))
    top5 = scores.get("masked_accuracy_top5")
    restarts = len(run.restarts)
    rate = _tokens_per_second(run)
    learning_rate = run.config.get("learning_rate")
    peak = run.last("memory_gib")
    best = f"{top5:.1%} among the best five".replace("%", " %") if is_number(top5) else "of masked tokens"
    return [
        ("Perplexity", perplexity, how),
        ("Masked accuracy", f"{accuracy:.1%}".replace("%", " %") if is_number(accuracy) else None, best),
        ("Training loss", number(run.last("loss")), "last logged, nats"),
        ("Steps", f"{run.last_step:,}", f"peak rate {learning_rate:g}" if is_number(learning_rate) else ""),
        ("Tokens seen", short(run.tokens_seen), _epochs(run)),
        ("Time", _spent(run), "no restart" if not restarts else f"{restarts} restart{'s' * (restarts > 1)}"),
        ("Throughput", short(rate), "tokens per second"),
        ("Memory", f"{peak:.2f} GiB" if peak is not None else None, "at its highest, on rank 0"),
    ]


def _epochs(run: Run) -> str:
    epochs = run.last("epoch")
    return "" if epochs is None else f"{epochs:.3g} epoch{'s' * (epochs != 1)}"


def _perplexity(run: Run) -> tuple[str | None, str]:
    """Return the perplexity of eval.json, or that of the last evaluation of training if newer, and its source."""
    if not use_scores(run):
        at = run.last_step_of("eval_perplexity")
        return number(run.last("eval_perplexity")), "last evaluation of training" + (
            "" if at is None else f", step {at:,}"
        )
    interval = interval_of(run.scores, "perplexity")
    notes = [f"95 %: {number(interval[0])} to {number(interval[1])}"] if interval else []
    notes += [str(run.measured)] if run.measured else []
    return number(run.scores["perplexity"]), "; ".join(notes)


def use_scores(run: Run) -> bool:
    """Return whether eval.json is at least as new as the last evaluation of training."""
    if not is_number(run.scores.get("perplexity")):
        return False
    measured, trained = run.measured, run.last_step_of("eval_perplexity")
    return measured is None or measured.step is None or trained is None or measured.step >= trained


def _spent(run: Run) -> str | None:
    return duration(run.seconds) if run.seconds else None


def _tokens_per_second(run: Run) -> float | None:
    """Return the mean over the time of training."""
    timed = [
        (seconds, rate)
        for line in run.lines
        if (rate := line.get("tokens_per_second")) is not None
        and is_number(rate)
        and is_number(seconds := line.get("seconds"))
    ]
    total = sum(seconds for seconds, _ in timed)
    return sum(seconds * rate for seconds, rate in timed) / total if total else None


def data_section(runs: Sequence[Run]) -> Html:
    """Return the training data by the manifest of the blocks, once for runs on the same blocks."""
    parts: list[Html] = []
    for runs_alike in _groups(runs, lambda run: run.data.get("checksum") or id(run)):
        shown = facts(_data_facts(runs_alike[0].data))
        if shown:
            parts += [_of(runs_alike, runs), shown]
    return section("Data", element("div", joined(parts), class_="stack") if parts else "")


def _data_facts(data: dict[str, Any]) -> dict[str, Any]:
    source, tokenizer = part(data, "source"), part(data, "tokenizer")
    train, held_out = part(part(data, "splits"), "train"), part(part(data, "splits"), "validation")
    words = tokenizer.get("vocab_size")
    checksum = data.get("checksum")
    return {
        "source": ", ".join(str(source[k]) for k in ("dataset_name", "dataset_config_name", "split") if source.get(k))
        or None,
        "revision": source.get("revision"),
        "text": source.get("text_field"),
        "tokenizer": f"{tokenizer.get('name')}, {words:,} tokens" if is_number(words) else tokenizer.get("name"),
        "training": _split_line(train),
        "validation": _split_line(held_out),
        **{f"text, {side}": line for side, line in report_lines(part(data, "text_report")).items()},
        "warning": "; ".join(warnings_of(part(data, "text_report"))) or None,
        "blocks": ", ".join(
            text
            for text in (
                f"{data.get('block_size')} tokens" if data.get("block_size") else "",
                str(data.get("packing") or ""),
            )
            if text
        )
        or None,
        "checksum": checksum[:16] if isinstance(checksum, str) else None,
    }


def _split_line(split: dict[str, Any]) -> str | None:
    notes = [f"{split[name]:,} {name}" for name in ("documents", "tokens", "blocks") if is_number(split.get(name))]
    return ", ".join(notes) or None


def machines_section(runs: Sequence[Run]) -> Html:
    """Return a table of all starts of each run: first step, devices, versions."""
    rows = []
    for at, run in enumerate(runs):
        for session in run.sessions:
            versions = part(session, "versions")
            notes = ", ".join(f"{name} {version}" for name, version in versions.items())
            first = [key(at, run.name, True)] if len(runs) > 1 else []
            rows.append([*first, f"step {session['first_step'] + 1:,}", computed_on(session), notes])
    head = [*(["run"] if len(runs) > 1 else []), "from", "computed on", "versions"]
    return section("Hardware and versions", table(head, rows) if rows else "")


def checkpoints_section(runs: Sequence[Run]) -> Html:
    """Return the checkpoints that are there, and the perplexity that was measured at their step."""
    rows = []
    for at, run in enumerate(runs):
        measured = {
            line["step"]: line["eval_perplexity"] for line in run.lines if is_number(line.get("eval_perplexity"))
        }
        for one in run.checkpoints:
            first = [key(at, run.name, True)] if len(runs) > 1 else []
            rows.append([*first, f"checkpoint-{one.step}", size(one.num_bytes), number(measured.get(one.step))])
    at = 1 if len(runs) > 1 else 0
    head = [*(["run"] if len(runs) > 1 else []), "checkpoint", "size", "perplexity"]
    return section("Checkpoints", table(head, rows, numbers=(at + 1, at + 2)) if rows else "")


def configuration_section(runs: Sequence[Run]) -> Html:
    """Return what differs between runs, then what is not at its default, then everything; no paths of the machine."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    keys = list(dict.fromkeys(name for run in runs for name in run.config))
    if not keys:
        return Html("")
    if not any(run.data.get("streamed") for run in runs):
        keys = [name for name in keys if name not in BLOCK_FLAGS]  # they do not affect a run on prepared blocks
    changed = [name for name in keys if any(run.config.get(name) != defaults.get(name) for run in runs)]
    rest = [name for name in keys if name not in changed]
    parts: list[Any] = []
    if len(runs) > 1:
        parts.append(note("Shaded: where the runs differ."))
    parts.append(_config_table(changed, runs))
    if rest:
        inner = joined([element("summary", f"{len(rest)} options at their defaults"), _config_table(rest, runs)])
        parts.append(element("details", inner))
    return section("Configuration", *parts)


def _config_table(names: Sequence[str], runs: Sequence[Run]) -> Html:
    rows = []
    for name in names:
        values = [_value(run.config.get(name)) for run in runs]
        cells = [Html(f'<th scope="row" class="config">{name_cell}</th>') for name_cell in [element("span", name)]]
        cells += [element("td", value, class_="config") for value in values]
        differs = ' class="differs"' if len(set(values)) > 1 else ""
        rows.append(Html(f"<tr{differs}>{joined(cells)}</tr>"))
    several = len(runs) > 1
    names_row = joined(
        [element("th", "option"), *(element("th", key(at, run.name, True)) for at, run in enumerate(runs))]
    )
    head = element("thead", element("tr", names_row)) if several else Html("")
    body = element("tbody", joined(rows))
    whole = element("table", joined([head, body]), **({} if several else {"class_": "facts"}))
    return Html(f'<div class="scroll" tabindex="0" role="region" aria-label="configuration">{whole}</div>')


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def _groups(runs: Sequence[Run], by: Any) -> list[list[Run]]:
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(by(run), []).append(run)
    return list(found.values())


def _of(some: Sequence[Run], runs: Sequence[Run]) -> Html:
    """Return the names of a table's runs if it does not cover all of them."""
    return note(", ".join(run.name for run in some)) if len(some) < len(runs) else Html("")


def lead(runs: Sequence[Run]) -> str:
    """Return one line with model, data and state."""
    line = ", ".join(dict.fromkeys(model_name(run) for run in runs))
    sizes = {run.parameters for run in runs}
    if len(sizes) == 1 and (parameters := sizes.pop()):
        line += f" of {short(parameters)} parameters"
    corpora = dict.fromkeys(name for run in runs if (name := data_name(run)))
    line += f", trained on {', '.join(corpora)}" if corpora else ""
    states = {run.status for run in runs if run.status}
    return f"{line}; {states.pop()}" if len(states) == 1 else line
