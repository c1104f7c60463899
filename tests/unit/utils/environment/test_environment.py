"""Every variable that a launcher or library reads is honoured, ignored with a message, or refused."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cloze
from cloze.errors import LaunchError
from cloze.utils.environment.no_effect import NO_EFFECT
from cloze.utils.environment.processes import device_index
from cloze.utils.environment.settle import settle
from cloze.utils.environment.table import RULES, rule_for

READERS = re.compile(r"(environ\.(get|pop|setdefault)|getenv|_from_env)$")
FAMILY = re.compile(r"(ACCELERATE|FSDP|PARALLELISM_CONFIG|MEGATRON_LM|OMPI_COMM_WORLD|PMI|MV2_COMM_WORLD)_[A-Z0-9_]+")
LAUNCHERS = re.compile(
    r"((ACCELERATE|FSDP|DS|DEEPSPEED|PARALLELISM_CONFIG|MEGATRON_LM|SLURM|TORCHELASTIC|OMPI|PMI|MV2|MPI)_[A-Z0-9_]+"
    r"|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE)"
)
# Reads whose variable the scan cannot name: helpers that are called with the names, which it sees at the calls, and
# loops over names that are looked at for building operations or for accelerators other than CUDA's.
UNNAMED = {
    ("accelerate/utils/environment.py", "e"),
    ("accelerate/utils/environment.py", "key"),
    ("accelerate/utils/launch.py", "env_var_name"),
    ("deepspeed/accelerator/hpu_accelerator.py", "key"),
    ("deepspeed/comm/comm.py", "v"),
    ("deepspeed/compile/profilers/graph_profile.py", "n"),
    ("deepspeed/launcher/runner.py", "visible_devices_env"),
    ("deepspeed/ops/op_builder/evoformer_attn.py", "name"),
    ("deepspeed/ops/op_builder/xpu/builder.py", "var"),
}


def source_of(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def constants(body: list[ast.stmt]) -> dict[str, set[str]]:
    """Names that are assigned a text in a function or a module, with all texts they are assigned."""
    found: dict[str, set[str]] = {}
    for one in (node for statement in body for node in ast.walk(statement)):
        if isinstance(one, ast.Assign) and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
            for target in one.targets:
                found.setdefault(ast.unparse(target), set()).add(one.value.value)
    return found


def names_in(node: ast.expr, known: dict[str, set[str]]) -> set[str] | None:
    """The names that an expression may be; None for one that cannot be read off the source."""
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else None
    if isinstance(node, ast.List | ast.Tuple):
        parts = [names_in(one, known) for one in node.elts]
        return None if None in parts else {name for part in parts for name in part or ()}
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = names_in(node.left, known), names_in(node.right, known)
        return None if left is None or right is None else {a + b for a in left for b in right}
    return known.get(ast.unparse(node))


def reads(node: ast.AST, known: dict[str, set[str]]) -> Iterator[tuple[ast.expr, dict[str, set[str]]]]:
    """What stands where the name of a variable of the environment is read, and the texts that are known there."""
    if isinstance(node, ast.FunctionDef):
        known = known | constants(node.body)
    if isinstance(node, ast.Call) and node.args and READERS.search(ast.unparse(node.func)):
        yield node.args[0], known
    elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
        yield node.slice, known
    elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith(("environ", "environ.keys()")):
        yield node.left, known
    for child in ast.iter_child_nodes(node):
        yield from reads(child, known)


def scan(folder: Path) -> tuple[set[str], set[tuple[str, str]]]:
    """The variables that a package reads, and (file, expression) of reads that cannot be named."""
    found: set[str] = set()
    unnamed = set()
    shared = (
        constants(ast.parse((folder / "constants.py").read_text()).body) if (folder / "constants.py").exists() else {}
    )
    for path in folder.rglob("*.py"):
        if "test_utils" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        if "environ" not in text and "getenv" not in text and "_from_env" not in text:
            continue
        tree = ast.parse(text)
        for node, known in reads(tree, shared | constants([one for one in tree.body if isinstance(one, ast.Assign)])):
            names = names_in(node, known)
            if names is None:
                unnamed.add((path.relative_to(folder.parent).as_posix(), ast.unparse(node)))
            found |= names or set()
        if folder.name == "accelerate":  # also where a name goes through a helper that the scan does not know
            words = (one.value for one in ast.walk(tree) if isinstance(one, ast.Constant))
            found |= {word for word in words if isinstance(word, str) and FAMILY.fullmatch(word)}
    return found, unnamed


@pytest.mark.parametrize("package", ["accelerate", "deepspeed"])
def test_every_variable_that_the_installed_library_reads_is_in_the_table(package: str):
    found, unnamed = scan(source_of(package))
    assert {"accelerate": "ACCELERATE_DYNAMO_BACKEND", "deepspeed": "DS_ACCELERATOR"}[package] in found
    missing = {name for name in found if rule_for(name) is None and name not in NO_EFFECT}
    assert not missing, f"{package} reads {sorted(missing)}: add them to utils/environment/table.py"
    assert not unnamed - UNNAMED, "which variables are read there?"


def test_no_other_code_reads_a_launchers_variables():
    package = Path(cloze.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name == "environment":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                ours = node.value == "DS_CONFIG"  # of slurm/train.sbatch
                assert ours or not LAUNCHERS.fullmatch(node.value), (
                    f"{path.relative_to(package)}:{node.lineno} {node.value}"
                )


def test_every_rule_is_one_of_three_kinds_and_says_why():
    assert {rule.kind for rule in RULES.values()} == {"honoured", "ignored", "refused"}
    assert all(rule.text for rule in RULES.values())
    assert not RULES.keys() & NO_EFFECT.keys()


IGNORED = {
    "ACCELERATE_DYNAMO_BACKEND": ("EAGER", "--torch_compile"),
    "ACCELERATE_DYNAMO_MODE": ("max-autotune", "--torch_compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4", "--gradient_accumulation_steps"),
    "ACCELERATE_GRADIENT_CLIPPING": ("0.5", "--max_grad_norm"),
    "ACCELERATE_FP8_BACKEND": ("MSAMP", "torchao"),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": ("true", "fp32"),
    "DEEPSPEED_TIMEOUT": ("5", "--ddp_timeout"),
    "ACCELERATE_SOMETHING_NEW": ("1", "does not know"),
}


@pytest.mark.parametrize("name", IGNORED)
def test_what_is_ignored_is_removed_with_one_line(name: str):
    value, says = IGNORED[name]
    environment = {name: value, "HOME": "/home/x"}
    lines = settle(environment)
    assert environment == {"HOME": "/home/x"}
    assert len(lines) == 1
    assert lines[0].startswith(f"{name}={value}: ")
    assert says in lines[0]


def test_what_accelerate_launch_sets_by_itself_is_not_mentioned():
    """As `accelerate launch` 1.15 leaves it, with DeepSpeed and with FSDP2."""
    usual = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "no",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
        "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
        "ACCELERATE_USE_CPU": "False",
    }
    deepspeed = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_GRADIENT_CLIPPING": "none",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
    }
    fsdp = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_MIN_NUM_PARAMS": "100000000",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_FORWARD_PREFETCH": "false",
        "FSDP_USE_ORIG_PARAMS": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_SYNC_MODULE_STATES": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    }
    assert settle({**usual, **deepspeed}) == []
    assert settle({**usual, **fsdp}) == []


TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
REFUSED = [
    ({"WORLD_SIZE": "2"}, "^WORLD_SIZE is 2: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
    ({"RANK": "1"}, "^RANK is 1: WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
    ({"LOCAL_RANK": "1"}, "^LOCAL_RANK is 1: WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT are not set"),
    ({**TWO, "MASTER_ADDR": ""}, "^WORLD_SIZE is 2, RANK is 1, LOCAL_RANK is 1: MASTER_ADDR is not set"),
    ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT=http: is not a number"),
    ({**TWO, "MASTER_PORT": "70000"}, "is no port"),
    ({**TWO, "RANK": "2"}, "RANK must be below WORLD_SIZE"),
    ({**TWO, "WORLD_SIZE": "two"}, "is not a number"),
    ({**TWO, "LOCAL_RANK": "-1"}, "is not a number"),
    ({**TWO, "LOCAL_WORLD_SIZE": "1"}, "do not go together"),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, "SLURM has 2 tasks.*slurm/submit"),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "SLURM has 2 tasks"),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "several processes were started by MPI"),
    ({"PMI_SIZE": "4"}, "PMI_SIZE=4: several processes were started by MPI"),
    ({"PMI_RANK": "1"}, "PMI_RANK=1: several processes were started by MPI"),
    ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "x"}, "several processes were started by MPI"),
    ({"FLUX_TASK_RANK": "3"}, "several processes were started by MPI"),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "several processes were started by MPI"),
    ({"OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE=two: is not a number"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config"),
    ({"ACCELERATE_TORCH_DEVICE": "mps"}, "--use_cpu"),
    ({"ACCELERATE_USE_SAGEMAKER": "true"}, "torchrun"),
    ({"ACCELERATE_MIXED_PRECISION": "bfloat16"}, "must be one of no, fp16, bf16, fp8"),
    ({"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "MixtralSparseMoeBlock"}, "mixture of experts"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "zero3_offload"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_IGNORED_MODULES": "embeddings"}, "all modules are divided"),
    ({"DS_ACCELERATOR": "hpu"}, "must be one of cpu, cuda"),
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "two"}, "must be one of 0, 1, 2, 3"),
    ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "disk"}, "must be one of none, cpu, nvme"),
    ({"ACCELERATE_USE_FSDP": "maybe"}, "must be true or false"),
]


@pytest.mark.parametrize(("environment", "says"), REFUSED, ids=lambda value: next(iter(value), "") or None)
def test_what_cannot_be_honoured_is_refused_in_one_line(environment: dict[str, str], says: str):
    with pytest.raises(LaunchError, match=says) as error:
        settle(dict(environment))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"},
        {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**TWO, "SLURM_NTASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0", "MPI_LOCALNRANKS": "1"},
        {**TWO, "PMIX_RANK": "1"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        {"FSDP_OFFLOAD_PARAMS": "true", "PARALLELISM_CONFIG_TP_SIZE": "8"},
    ],
    ids=lambda value: "-".join(value) or "nothing",
)
def test_whole_environments_pass_without_a_word(environment: dict[str, str]):
    assert settle(dict(environment)) == []


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_CPU"])
def test_a_switch_means_the_same_to_all_libraries(name: str):
    """accelerate reads "1" as false here and as true there, and would drop DeepSpeed."""
    for value in ("1", "yes", "True", "on"):
        environment = {name: value}
        assert settle(environment) == []
        assert environment == {name: "true"}


def test_mpi_does_not_contradict_the_launcher_that_it_started():
    """DeepSpeed refuses an MPI rank that differs from LOCAL_RANK, as with one launcher on each machine."""
    environment = {**TWO, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "PMI_RANK": "3"}
    assert settle(environment) == []
    assert environment == TWO


def test_a_process_that_sees_one_gpu_uses_it_and_others_use_their_own():
    assert [device_index(rank, 1) for rank in range(4)] == [0, 0, 0, 0]
    assert [device_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    with pytest.raises(LookupError, match="process 2 of this machine, but 2 GPUs are visible"):
        device_index(2, 2)
