"""`cloze plan RECIPE`: estimate memory and speed of a run, and recommend settings."""

from __future__ import annotations

from pathlib import Path

from cloze.config import PlanConfig
from cloze.errors import ConfigError
from cloze.tools.planning.choose import choose, make_plan
from cloze.tools.planning.gpus import parse_gpus, this_machine
from cloze.tools.planning.recipe import read_recipe
from cloze.tools.planning.report import as_json, show
from cloze.tools.planning.write_configs import command_line, write_configs
from cloze.utils.atomic_files import check_writable, write_json
from cloze.utils.memory import free_memory
from cloze.utils.output_file import check_output_file
from cloze.utils.terminal.console import say


def run(config: PlanConfig) -> None:
    """Compute the estimates, print them, and write the requested files. Raises ConfigError, DataError, ModelError,
    DiskError."""
    gpu, count = this_machine() if config.gpus is None else parse_gpus(config.gpus)
    if config.write is not None and Path(config.write).exists():
        raise ConfigError("is there already", where=f"--write {config.write}", hint="give a folder that is not")
    if config.write is not None:
        check_writable(config.write, "give another path")
    output = check_output_file(config.json, "give another path") if config.json is not None else None
    recipe = read_recipe(config)
    host = config.host_memory_gib
    host_memory = host * 2**30 if host is not None else float(free_memory()) if config.gpus is None else None
    plan = make_plan(recipe, gpu, count, config.nodes, config.network_gbit * 1e9 / 8, host_memory)
    row = choose(plan, config.choose)
    notes = recipe.notes + _notes(plan.untraced, plan.facts.unused)
    show(plan, row, notes)
    if output is not None:
        write_json(output, as_json(plan, row, notes))
        say("plan", f"written to {config.json}")
    if config.write is not None:
        if row is None:
            raise ConfigError(
                f"there is nothing to write: {plan.reason}",
                where=f"--write {config.write}",
                hint="see the table above, or take one with --choose",
            )
        write_configs(config.write, row, plan, config)
        say("written", f"{config.write}; {command_line(config.write, row, plan, config)}")


def _notes(untraced: str | None, unused: list[str]) -> list[str]:
    notes = []
    if untraced is not None:
        notes.append(f"activations are left out ('?'): the model cannot be traced without data ({untraced})")
    if unused:
        notes.append(f"{len(unused)} parameters have no part in the output and are not trained, as in {unused[0]}")
    return notes
