"""Submit a recipe as a chain of SLURM jobs, as `cloze submit` (slurm/submit) does.

What is submitted is worked out first, as a list of jobs; then they go to sbatch one after the other, each waiting for
the one before. Where sbatch refuses one, those before it are cancelled.
"""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloze.config import PrepareConfig, SubmitConfig, TrainConfig
from cloze.config.machines import prepare_recipe
from cloze.config.parser import parse
from cloze.data.corpus.local_files import is_local, local_splits
from cloze.data.manifest import MANIFEST
from cloze.errors import ConfigError, LaunchError
from cloze.utils.terminal.console import say


@dataclass(frozen=True)
class Job:
    """One job: flags for sbatch, the script and what it is given; `after`: how it depends on the job before it."""

    name: str
    script: str
    words: list[str]
    sbatch: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    after: str = "afterok"


def check(config: SubmitConfig) -> None:
    """Raise ConfigError for what sbatch would refuse, or worse, take."""
    for path in ("slurm/train.sbatch", config.recipe, config.ds_config):
        if not Path(path).is_file():
            raise ConfigError(
                "no such file",
                where=path,
                hint="submit from the repository root, or from a folder that `cloze init` filled",
            )


def recipes(config: SubmitConfig) -> tuple[TrainConfig, PrepareConfig | None]:
    """Return the recipe's settings with --train_flags on top, and those of its RECIPE.prepare.yaml if there is one.

    Raises ConfigError if a value is invalid, or they do not fit together; DataError if the corpus is missing.
    """
    train = parse(["train", "--config", config.recipe, *shlex.split(config.train_flags)])[1]
    beside = prepare_recipe(config.recipe)
    if not beside.is_file():
        if config.prepare_flags:
            raise ConfigError(
                "the recipe for preparing does not exist", where=beside, hint="write it, or leave out --prepare_flags"
            )
        return train, None
    prepare = parse(["prepare", "--config", str(beside), *shlex.split(config.prepare_flags)])[1]
    if is_local(prepare.dataset_name):
        local_splits(
            prepare.dataset_name, prepare.dataset_config_name
        )  # rejects a missing path now instead of in a job that starts in an hour
    if train.dataset_name != prepare.output:
        raise ConfigError(
            f"trains on {train.dataset_name}, but {beside} makes {prepare.output}",
            where=config.recipe,
            hint="use the same value in both, or in --train_flags and --prepare_flags",
        )
    return train, prepare


def chain(config: SubmitConfig, train: TrainConfig, prepare: PrepareConfig | None) -> list[Job]:
    """Return the jobs in their order."""
    cpu = _flags(partition=config.cpu_partition or config.partition, cpus_per_task=config.cpus_per_task)
    jobs = []
    if prepare is not None and (Path(prepare.output) / MANIFEST).is_file():
        say("submit", f"{prepare.output} is prepared already: no job prepares, with or without --prepare_flags")
    elif prepare is not None:
        words = [str(prepare_recipe(config.recipe)), *shlex.split(config.prepare_flags)]
        at_once = f"%{config.prepare_tasks_at_once}" if config.prepare_tasks_at_once else ""
        array = [f"--array=0-{config.prepare_tasks - 1}{at_once}"]
        jobs.append(Job("prepare", "slurm/prepare.sbatch", words, cpu + array))
        join = [*words, "--num_shards", str(config.prepare_tasks), "--finalize"]
        jobs.append(Job("join", "slurm/prepare.sbatch", join, cpu))
    array = [f"--array=1-{config.seeds}"] if config.seeds else []
    least = config.min_nodes or config.nodes
    nodes = str(config.nodes) if least == config.nodes else f"{least}-{config.nodes}"
    gpus = _flags(partition=config.partition, gpus_per_node=config.gpus_per_node or None)
    shape = _flags(nodes=nodes, cpus_per_task=config.cpus_per_task, time=config.time)
    environment = {"DS_CONFIG": config.ds_config, "MAX_RESTARTS": str(config.max_restarts)}
    if least < config.nodes:
        environment["FULL_NODES"] = str(config.nodes)
    if config.processes_per_node:
        environment["PROCESSES_PER_NODE"] = str(config.processes_per_node)
    words = [config.recipe, *shlex.split(config.train_flags)]
    jobs.append(Job("train", "slurm/train.sbatch", words, gpus + shape + array, environment))
    after = "aftercorr" if config.seeds else "afterok"
    if prepare is not None or (Path(str(train.dataset_name)) / MANIFEST).is_file():
        words = [train.output_dir, str(train.dataset_name)]
        one = _flags(partition=config.partition, gpus_per_node=min(config.gpus_per_node, 1) or None)
        one += _flags(cpus_per_task=config.cpus_per_task)
        jobs.append(Job("evaluate", "slurm/evaluate.sbatch", words, one + array, after=after))
    elif config.push_to:
        raise ConfigError(
            "only a model that was evaluated is pushed, and evaluation needs prepared blocks",
            where="--push_to",
            hint=f"prepare first: write {prepare_recipe(config.recipe)}",
        )
    if config.push_to:
        words = [train.output_dir, config.push_to]
        jobs.append(
            Job(
                "push",
                "slurm/push.sbatch",
                words,
                _flags(partition=config.cpu_partition or config.partition) + array,
                after=after,
            )
        )
    return jobs


def _flags(**values: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def command(config: SubmitConfig, job: Job, logs: Path, before: str | None) -> list[str]:
    """Return the sbatch command of a job that waits for the job `before`."""
    number = "%A_%a" if any(flag.startswith("--array") for flag in job.sbatch) else "%j"
    words = ["sbatch", "--parsable", f"--job-name=cloze-{job.name}", f"--output={logs}/{job.name}-{number}.out"]
    words += _flags(account=config.account)
    if before is not None:  # cancel a job whose dependency can never be satisfied, instead of leaving it pending
        words += [f"--dependency={job.after}:{before}", "--kill-on-invalid-dep=yes"]
    if job.environment:
        exported = ",".join(f"{name}={value}" for name, value in job.environment.items())
        words.append(f"--export=ALL,{exported}")
    return [*words, *job.sbatch, *shlex.split(config.sbatch_flags), job.script, *job.words]


def submit(config: SubmitConfig, jobs: list[Job], logs: Path) -> list[str]:
    """Submit the jobs with sbatch; return their ids. Raises LaunchError, with no job left, if sbatch refuses."""
    ids: list[str] = []
    for job in jobs:
        words = command(config, job, logs, ids[-1] if ids else None)
        try:
            done = subprocess.run(words, capture_output=True, text=True)
            problem = done.stderr.strip().removeprefix("sbatch: error: ") if done.returncode else None
        except FileNotFoundError:
            problem = "this machine has no sbatch"
        if problem is not None:
            if ids:
                subprocess.run(["scancel", *ids], capture_output=True)
            hint = "use a login node of the cluster" if "no sbatch" in problem else "see sinfo, and --help"
            raise LaunchError(" ".join(problem.split()), where=f"the job {job.name}", hint=hint)
        ids.append(done.stdout.strip().split(";")[0])
    return ids
