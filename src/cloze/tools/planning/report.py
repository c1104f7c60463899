"""A plan as a table on a terminal, as plain lines elsewhere, and as JSON.

show(plan, row, notes)          # to stdout
as_json(plan, row, notes)       # what --json writes: bytes, seconds, tokens per second
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from typing import Any

from rich import box
from rich.table import Table

from cloze.tools.planning.choose import Plan, Row
from cloze.utils.terminal.console import say, show_table

ESTIMATE = "speed is an estimate from data sheets; three models were measured on one H200 (docs/gpu.md of Cloze)"
_COLUMNS = ("choice", "fits", "micro-batch\n(largest)", "peak", "para-\nmeters", "gra-\ndients", "opti-\nmizer",
            "activa-\ntions", "logits\n(dense)", "buffers", "host,\na node", "sent a\nstep", "tokens/s", "MFU, %",
            "days")  # fmt: skip
_EVERY = list(range(len(_COLUMNS)))
# How wide a terminal must be for one table, and for two; narrower ones get lines.
_LAYOUTS = [(170, [_EVERY]), (118, [_EVERY[:10], [0, *_EVERY[10:]]])]


def size(value: float | None) -> str:
    """Return bytes in GiB, or MiB below one: `12.3G`, `456M`; `?` if unknown."""
    if value is None:
        return "?"
    return f"{value / 2**30:.1f}G" if value >= 2**30 else f"{value / 2**20:.0f}M"


def days(plan: Plan, row: Row) -> tuple[float, float] | None:
    """Return the days until the run has read its tokens: fast, slow; None if unknown."""
    if plan.tokens is None or row.pace is None:
        return None
    slow, fast = row.pace.tokens_per_second
    return plan.tokens / fast / 86400, plan.tokens / slow / 86400


def _count(value: float) -> str:
    for unit, scale in (("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def _span(pair: tuple[float, float] | None, show: Any) -> str:
    return "?" if pair is None else f"{show(pair[0])}-{show(pair[1])}"


def cells(plan: Plan, row: Row) -> list[str]:
    """Return one row in the order of the columns."""
    memory, pace = row.memory, row.pace
    largest = "?" if row.largest is None else str(row.largest)
    return [
        row.choice.name,
        "?" if row.largest is None else "no" if row.problem else "yes",
        f"{row.blocks} ({largest})",
        *(size(value) for value in (memory.peak, memory.parameters, memory.gradients, memory.optimizer)),
        size(memory.activations),
        f"{size(memory.logits)} ({size(memory.logits_dense)})",
        size(memory.buffers),
        size(row.host_node),
        size(row.wire),
        _span(None if pace is None else pace.tokens_per_second, _count),
        _span(None if pace is None else pace.mfu, lambda share: f"{100 * share:.0f}"),
        _span(days(plan, row), lambda value: f"{value:.2g}"),
    ]


def show(plan: Plan, row: Row | None, notes: list[str]) -> None:
    """Print a table in a terminal, else a line for each choice."""
    facts, gpu = plan.facts, plan.gpu
    say("plan", f"{facts.model_class}, {facts.elements / 1e6:.1f}M parameters, {facts.trained / 1e6:.1f}M trained")
    precision = {"no": "fp32"}.get(plan.precision, plan.precision)
    where = f"{plan.ranks} x {gpu.name} ({gpu.memory / 2**30:.1f} GiB) on {plan.nodes} node{'s' * (plan.nodes > 1)}"
    say("plan", f"{where}, {precision}, {plan.global_batch:,} blocks of {plan.block_size} a step")
    amount = "an unknown number of" if plan.tokens is None else f"{plan.tokens:,.0f}"
    say("plan", f"{amount} tokens to read; a checkpoint is {size(plan.checkpoint)} on disk")
    for note in notes:
        say("note", note)
    parts = [columns for wide, columns in _LAYOUTS if shutil.get_terminal_size().columns >= wide]
    if sys.stdout.isatty() and parts:
        for columns in parts[0]:
            show_table(_table(plan, row, columns))
    else:
        _lines(plan)
    if any(one.pace is not None for one in plan.rows):
        say("note", ESTIMATE)
    if plan.recommended is not None:
        say("recommended", f"{plan.recommended.choice.name}: {plan.reason}")
    else:
        say("recommended", f"none: {plan.reason}")
    if row is not None:
        say("flags", " ".join(row.flags))


def _table(plan: Plan, chosen: Row | None, columns: list[int]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="memory of one GPU; G is GiB, M is MiB")
    for number in columns:
        shown.add_column(_COLUMNS[number], justify="right" if number else "left", no_wrap=True)
    for row in plan.rows:
        style, texts = "bold" if row is chosen else "dim" if row.problem else None, cells(plan, row)
        shown.add_row(*(texts[number] for number in columns), style=style)
    return shown


def _lines(plan: Plan) -> None:
    names = [name.replace("-\n", "").replace("\n", " ") for name in _COLUMNS]
    for row in plan.rows:
        say("choice", row.choice.name)
        for name, cell in zip(names[1:], cells(plan, row)[1:], strict=True):
            say("", f"{name} {cell}")


def as_json(plan: Plan, row: Row | None, notes: list[str]) -> dict[str, Any]:
    """Return all of it, in bytes, seconds, tokens per second and shares of one; null is not known."""
    facts = plan.facts
    return {
        "gpu": dataclasses.asdict(plan.gpu),
        "ranks": plan.ranks,
        "nodes": plan.nodes,
        "precision": plan.precision,
        "model": facts.model_class,
        "parameters": facts.elements,
        "trained_parameters": facts.trained,
        "forward_flops_a_block": facts.flops,
        "blocks_a_step": plan.global_batch,
        "block_size": plan.block_size,
        "tokens": plan.tokens,
        "checkpoint_bytes": plan.checkpoint,
        "recommended": None if plan.recommended is None else plan.recommended.choice.name,
        "reason": plan.reason,
        "chosen": None if row is None else row.choice.name,
        "untraced": plan.untraced,
        "notes": notes,
        "speed": ESTIMATE,
        "choices": [
            {
                "name": one.choice.name,
                "zero_stage": one.choice.stage,
                "offload": one.choice.offload,
                "activation_checkpointing": one.choice.checkpointing,
                "fits": None if one.largest is None else one.problem is None,
                "problem": one.problem,
                "micro_batch": one.blocks,
                "gradient_accumulation_steps": one.accumulation,
                "largest_micro_batch": one.largest,
                "memory": dataclasses.asdict(one.memory),
                "host_memory_a_node": one.host_node,
                "bytes_sent_a_step": one.wire,
                "pace": None if one.pace is None else dataclasses.asdict(one.pace),
                "days": days(plan, one),
                "flags": one.flags,
            }
            for one in plan.rows
        ],
    }
