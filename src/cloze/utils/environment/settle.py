"""Apply the table to an environment: refuse, or remove with a message, what would change a run behind its options.

    for line in settle(os.environ):
        warn(line)

Called before anything reads these variables: before the model is built, and again by `cloze.distributed.world.start`.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from cloze.errors import LaunchError
from cloze.utils.environment.no_effect import NO_EFFECT
from cloze.utils.environment.processes import (
    LOCAL_RANK,
    LOCAL_WORLD_SIZE,
    MASTER_ADDR,
    MASTER_PORT,
    RANK,
    WORLD_SIZE,
    device_index,
    integer,
    local_rank,
    slurm_tasks,
)
from cloze.utils.environment.requests import (
    DEEPSPEED_DEVICE,
    MIXED_PRECISION,
    OFFLOAD_DEVICES,
    USE_CPU,
    USE_DEEPSPEED,
    USE_FSDP,
    ZERO_STAGE,
    is_true,
)
from cloze.utils.environment.table import FAMILIES, MPI, OFF, Rule, rule_for

_HOW_TO_START = "start with `accelerate launch`, torchrun, launch/multi_node or slurm/submit, which set all of them"
_MPI_SIZES = (
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE"),
    *("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
)
# One above 0 shows that there are several processes, also if their number is not set.
_MPI_RANKS = (
    *("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK"),
    *("PALS_RANKID", "FLUX_TASK_RANK"),
    *("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
)
_VALUES = {
    MIXED_PRECISION: ("no", "fp16", "bf16", "fp8"),
    DEEPSPEED_DEVICE: ("cpu", "cuda"),
    ZERO_STAGE: ("0", "1", "2", "3"),
    **dict.fromkeys(OFFLOAD_DEVICES, ("none", "cpu", "nvme")),
}
# Libraries read some of these as "true" alone, and others as "1" or "yes" too.
_SWITCHES = (USE_DEEPSPEED, USE_FSDP, USE_CPU)


def settle(environment: MutableMapping[str, str]) -> list[str]:
    """Remove what is ignored, and return a line for each reason to mention it.

    Raises LaunchError for a variable that is refused, for an incomplete or impossible set of processes, and for
    several processes of SLURM or MPI that no launcher joins.
    """
    check_processes(environment)
    for name, allowed in _VALUES.items():
        value = environment.get(name)
        if value is not None and value.lower() not in allowed:
            raise LaunchError(
                f"must be one of {', '.join(allowed)}", where=_shown(name, value), hint="or leave it out"
            )
    for name in _SWITCHES:
        value = environment.get(name)
        if is_true(value):
            environment[name] = "true"
        elif value is not None and value.strip().lower() not in OFF:
            raise LaunchError("must be true or false", where=_shown(name, value))
    said: dict[str, list[str]] = {}
    for name in sorted(environment):
        if name in NO_EFFECT:
            continue
        rule, value = rule_for(name), environment[name]
        if rule is None:
            if name.startswith(FAMILIES):
                del environment[name]
                if value.lower() not in OFF:
                    said.setdefault("not used: Cloze does not know it", []).append(_shown(name, value))
            continue
        if rule.kind == "honoured" or name.startswith(MPI):
            continue
        speaks = value.strip().lower() not in rule.quiet and _is_read(rule, environment)
        if rule.kind == "refused" and speaks:
            raise LaunchError("cannot be used with Cloze", where=_shown(name, value), hint=rule.text)
        if speaks:
            said.setdefault(rule.text, []).append(_shown(name, value))
        if rule.kind == "ignored" and not rule.keep:
            del environment[name]
    return [f"{', '.join(names)}: {text}" for text, names in said.items()]


def own_device(visible: int) -> int:
    """Return the index of this process's GPU among the `visible` ones. Raises LaunchError if there are too few."""
    try:
        return device_index(local_rank(), visible)
    except LookupError as error:
        hint = "start one process for each GPU (--num_processes, --processes_per_node)"
        raise LaunchError(str(error), where="CUDA_VISIBLE_DEVICES", hint=hint) from None


def _is_read(rule: Rule, environment: Mapping[str, str]) -> bool:
    return rule.only_with is None or is_true(environment.get(rule.only_with))


def _shown(name: str, value: str) -> str:
    return f"{name}={value[:100]}"


def check_processes(environment: MutableMapping[str, str]) -> None:
    """Check that the variables describe one whole set of processes, and that this is one of them.

    MPI's and PMI's variables are removed from a process that a launcher started: libraries take one or the other.
    Raises LaunchError.
    """
    for name in (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_PORT):
        value = environment.get(name)
        if value is not None and not (value.strip().isdecimal() and value.isascii()):
            raise LaunchError("is not a number", where=_shown(name, value), hint=_HOW_TO_START)
    size, rank = integer(WORLD_SIZE, 1, environment), integer(RANK, 0, environment)
    needed = (WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)
    if size > 1 or rank > 0 or integer(LOCAL_RANK, 0, environment) > 0:
        missing = [name for name in needed if not environment.get(name)]
        if missing:
            what = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
            given = [name for name in (WORLD_SIZE, RANK, LOCAL_RANK) if name in environment]
            where = ", ".join(f"{name} is {environment[name][:100]}" for name in given)
            raise LaunchError(what, where=where, hint=_HOW_TO_START)
    if size < 1 or rank >= size:
        raise LaunchError(f"{RANK} must be below {WORLD_SIZE}", where=f"{RANK}={rank}, {WORLD_SIZE}={size}")
    local, own = integer(LOCAL_WORLD_SIZE, size, environment), integer(LOCAL_RANK, 0, environment)
    if not own < local <= size:
        where = f"{LOCAL_RANK}={own}, {LOCAL_WORLD_SIZE}={local}, {WORLD_SIZE}={size}"
        raise LaunchError("these do not go together", where=where, hint=_HOW_TO_START)
    if MASTER_PORT in environment and not integer(MASTER_PORT, 0, environment) < 65536:
        raise LaunchError("is no port", where=_shown(MASTER_PORT, environment[MASTER_PORT]), hint="use 1 to 65535")
    if WORLD_SIZE in environment and RANK in environment:
        for name in [name for name in environment if name.startswith(MPI)]:
            del environment[name]
        return
    _check_tasks(environment)


def _check_tasks(environment: Mapping[str, str]) -> None:
    """Refuse several tasks of SLURM or MPI that no launcher joins: each would train alone, into the same folder."""
    for names, alone in ((_MPI_SIZES, 1), (_MPI_RANKS, 0)):
        for name in names:
            value = environment.get(name, "").strip()
            if value and not (value.isdecimal() and value.isascii()):
                raise LaunchError("is not a number", where=_shown(name, value), hint=_HOW_TO_START)
            if value and int(value[:20]) > alone:
                raise LaunchError(
                    "several processes were started by MPI, and no launcher joins them; each would run alone",
                    where=_shown(name, value),
                    hint="start `accelerate launch` or torchrun once on each machine, or set RANK, WORLD_SIZE and the "
                    "like",
                )
    tasks = slurm_tasks(environment)
    if tasks > 1:
        raise LaunchError(
            f"SLURM has {tasks} tasks here, and no launcher joins them; each would run alone",
            where="SLURM_NTASKS",
            hint="submit with slurm/submit RECIPE.yaml, or run one process: srun --ntasks=1 cloze ...",
        )
