"""Tell a batch job where its run's folder is, and whether to start it once more.

    python -m cloze.tools.launch.slurm_job folder --config RECIPE.yaml [flags] # prints OUTPUT_DIR
    python -m cloze.tools.launch.slurm_job batch --processes 8 --config RECIPE.yaml [flags] # blocks of a step
    python -m cloze.tools.launch.slurm_job start --max_restarts 3 --config RECIPE.yaml [flags] # the same, and counts

`start` counts starts that found no newer checkpoint than the one before did, in OUTPUT_DIR/slurm/starts.json. Exit
code 2 if the flags are wrong; 1 after too many starts. A run that is preempted saves a checkpoint, so
a thousand preemptions are no problem; a node that breaks every run in its first minute is.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cloze.checkpoint.format import list_checkpoints
from cloze.config import TrainConfig
from cloze.config.parser import parse
from cloze.errors import ClozeError
from cloze.utils.atomic_files import write_json
from cloze.utils.environment import processes
from cloze.utils.foreign.json_yaml import read_mapping
from cloze.utils.foreign.lenient_read import is_number
from cloze.utils.terminal.console import show

STARTS = Path("slurm") / "starts.json"


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint in a run's folder, by its name; 0 without a checkpoint."""
    newest = list_checkpoints(run)[-1:]
    return int(newest[0].name.removeprefix("checkpoint-")) if newest else 0


def count_start(run: Path, max_restarts: int) -> bool:
    """Note one more start of a run; False if `max_restarts` starts after the first brought no new checkpoint."""
    step, starts = newest_step(run), 0
    noted = read_mapping(run / STARTS)
    if is_number(noted.get("starts")) and is_number(noted.get("step")) and noted["step"] >= step:
        starts = int(noted["starts"])
    if starts > max_restarts:
        (run / STARTS).unlink()  # who submits it again has mended something
        return False
    (run / STARTS).parent.mkdir(parents=True, exist_ok=True)
    write_json(run / STARTS, {"step": step, "starts": starts + 1})
    return True


def blocks_a_step(config: TrainConfig, processes: int) -> int:
    """Return the global batch of a run on `processes` processes."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * processes


def main(words: list[str]) -> int:
    """Print the run's folder, or its global batch; the exit code."""
    what, *flags = words
    number = 0
    if what in ("start", "batch"):
        number, flags = int(flags[1]), flags[2:]
    try:
        config = parse(["train", *flags])[1]
        run = Path(config.output_dir)
        if what == "batch":
            show(str(config.global_batch_size or blocks_a_step(config, number)))
            return 0
        if what == "start" and not count_start(run, number):
            job = processes.slurm_job() or ""
            show(
                f"cloze: error: {run}: {number + 1} starts ended without a checkpoint after step "
                f"{newest_step(run)}, so job {job} gives up; see its logs in {run / 'slurm'}",
                sys.stderr,
            )
            return 1
    except ClozeError as error:
        show(f"cloze: error: {error}", sys.stderr)
        return error.exit_code
    print(run)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
