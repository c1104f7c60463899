"""`cloze submit` (slurm/submit): submit a recipe as a chain of SLURM jobs, or show it."""

from __future__ import annotations

import shlex
from pathlib import Path

from cloze.config import SubmitConfig
from cloze.tools.launch.slurm_chain import Job, chain, check, command, recipes, submit
from cloze.utils.foreign.paths import MAX_TEXT_BYTES, read_text
from cloze.utils.terminal.console import say, show


def run(config: SubmitConfig) -> None:
    """Submit the chain, or show it; print how to watch and cancel it."""
    check(config)
    train, prepare = recipes(config)
    logs = Path(train.output_dir) / "slurm"
    jobs = chain(config, train, prepare)
    if config.dry_run:
        _show(config, jobs, logs)
        return
    logs.mkdir(parents=True, exist_ok=True)
    ids = submit(config, jobs, logs)
    for job, number in zip(jobs, ids, strict=True):
        say("submit", f"{number:>10}  {job.name:<9} {shlex.join([job.script, *job.words])}")
    say("watch", f"squeue --jobs {','.join(ids)}; tail -F {shlex.quote(str(logs))}/*.out")
    say("cancel", f"scancel {' '.join(ids)}")


def _show(config: SubmitConfig, jobs: list[Job], logs: Path) -> None:
    for number, job in enumerate(jobs):
        before = f"<{jobs[number - 1].name}>" if number else None
        say("dry run", shlex.join(command(config, job, logs, before)).replace(f"'{before}'", str(before)))
    for script in dict.fromkeys(job.script for job in jobs):
        show(f"\n### {script}\n{read_text(script, MAX_TEXT_BYTES, typed=True).rstrip()}")
