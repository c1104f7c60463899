"""What Cloze does with each environment variable that accelerate and DeepSpeed read and that can change a run.

A variable is honoured (by Cloze, or by the library that reads it), ignored with a message (and removed, so that no
library reads it), or refused with a reason. A test scans the source of the installed accelerate and DeepSpeed, and
fails if they read a variable that is neither here nor in NO_EFFECT.

A name that ends in `*` stands for all variables that begin so. torch's and NCCL's own variables (TORCH_*, NCCL_*,
GLOO_*, OMP_*, CUDA_*) are left to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cloze.utils.environment.requests import OFFLOAD_DEVICES, OFFLOAD_FOLDERS

OFF = frozenset({"", "no", "none", "false", "0", "off", "n", "f", "null"})


@dataclass(frozen=True)
class Rule:
    """What happens to a variable. `text`: how it is honoured, what is said if it is ignored, or why it is refused and
    what to do. `quiet`: values, in small letters, with which there is nothing to say. `only_with`: the switch without
    which no library reads it. `keep`: an ignored variable stays, for the libraries' sake."""

    kind: Literal["honoured", "ignored", "refused"]
    text: str
    quiet: frozenset[str] = OFF
    only_with: str | None = None
    keep: bool = False


def _honoured(text: str) -> Rule:
    return Rule("honoured", text)


def _ignored(text: str, *quiet: str, only_with: str | None = None, keep: bool = False) -> Rule:
    return Rule("ignored", text, OFF | set(quiet), only_with, keep)


def _refused(text: str, only_with: str | None = None) -> Rule:
    return Rule("refused", text, only_with=only_with)


_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
_PARALLEL, _MEGATRON = "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_MEGATRON_LM"
_COMPILE = "not used: --torch_compile and --torch_compile_mode say what is compiled"
_RECIPE = "not used: Cloze computes fp8 with torchao, with settings of its own"
_FSDP1 = "not used: it is a setting of FSDP version 1"
_WRAP = "not used: Cloze divides every architecture by its layers"

_ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": _honoured("the precision, unless --precision, --bf16 or --fp16 is given"),
    "ACCELERATE_USE_CPU": _honoured("the CPU is used; refused with DeepSpeed, and with a GPU without --use_cpu"),
    _DEEPSPEED: _honoured("DeepSpeed is used"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": _honoured("the DeepSpeed configuration, unless --deepspeed is given"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": _honoured("the ZeRO stage without a DeepSpeed configuration"),
    **dict.fromkeys((*OFFLOAD_DEVICES, *OFFLOAD_FOLDERS), _honoured("offload without a DeepSpeed configuration")),
    "ACCELERATE_CONFIG_DS_FIELDS": _honoured("variables that a DeepSpeed configuration replaces are reported"),
    # Launchers always set it; the model is complete before accelerate reads it, so that it has no effect.
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": _ignored("not used: the first weights do not depend on it", "true", keep=True),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": _ignored("not used: checkpoints hold fp32 weights"),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": _refused("Cloze has no mixture of experts; leave it out"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": _ignored("not used: --gradient_accumulation_steps says it", "1", "auto"),
    "ACCELERATE_GRADIENT_CLIPPING": _ignored("not used: --max_grad_norm says it", "auto"),
    "ACCELERATE_DYNAMO_*": _ignored(_COMPILE, "default"),
    "ACCELERATE_FP8_*": _ignored(_RECIPE, "ao"),
    _FSDP: _honoured("FSDP2 is used"),
    _MEGATRON: _refused("Cloze does not train with Megatron-LM; use DeepSpeed or FSDP2 (launch/accelerate)"),
    "MEGATRON_LM_*": _refused("Cloze does not train with Megatron-LM", only_with=_MEGATRON),
    _PARALLEL: _refused("leave parallelism_config out: Cloze divides the data, and the weights among all ranks"),
    "PARALLELISM_CONFIG_*": _refused("leave parallelism_config out", only_with=_PARALLEL),
    "ACCELERATE_ALLOW_CP_STANDALONE": _refused("leave parallelism_config out", only_with=_PARALLEL),
    "ACCELERATE_TORCH_DEVICE": _refused("leave it out; --use_cpu and CUDA_VISIBLE_DEVICES choose the device"),
    "ACCELERATE_USE_SAGEMAKER": _refused("Cloze does not train with SageMaker's own library; start with torchrun"),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": _refused("start with torchrun", only_with="ACCELERATE_USE_SAGEMAKER"),
    "ACCELERATE_CPU_AFFINITY": _honoured("by accelerate: processes are bound to cores"),
    "ACCELERATE_DEBUG_MODE": _honoured("by accelerate: it checks the operands of its collectives"),
    "FORK_LAUNCHED": _honoured("by accelerate: set by its notebook_launcher"),
}
_FSDP_SETTINGS = {
    "FSDP_VERSION": _honoured("only 2 is accepted"),
    "FSDP_RESHARD_AFTER_FORWARD": _honoured("whether layers are gathered again for the backward pass"),
    "FSDP_OFFLOAD_PARAMS": _refused("use ZeRO with offload (launch/accelerate/zero3_offload.yaml)", _FSDP),
    "FSDP_ACTIVATION_CHECKPOINTING": _refused("use the option --gradient_checkpointing", _FSDP),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": _refused("use the option --gradient_checkpointing", _FSDP),
    "FSDP_IGNORED_MODULES": _refused("leave it out: all modules are divided", _FSDP),
    "FSDP_AUTO_WRAP_POLICY": _ignored(_WRAP, "transformer_based_wrap", "no_wrap", only_with=_FSDP),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": _ignored(_WRAP, only_with=_FSDP),
    "FSDP_MIN_NUM_PARAMS": _ignored(_WRAP, "100000000", only_with=_FSDP),
    "FSDP_SHARDING_STRATEGY": _ignored(_FSDP1, "full_shard", "1", only_with=_FSDP),
    "FSDP_BACKWARD_PREFETCH": _ignored(_FSDP1, "backward_pre", "no_prefetch", only_with=_FSDP),
    "FSDP_FORWARD_PREFETCH": _ignored(_FSDP1, only_with=_FSDP),
    "FSDP_USE_ORIG_PARAMS": _ignored(_FSDP1, "true", only_with=_FSDP),
    "FSDP_SYNC_MODULE_STATES": _ignored(_FSDP1, "true", only_with=_FSDP),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": _ignored("not used: every rank loads the model", "true", only_with=_FSDP),
    "FSDP_STATE_DICT_TYPE": _ignored(
        "not used: checkpoints have Cloze's own format", "sharded_state_dict", only_with=_FSDP
    ),
}
_DEEPSPEED_SETTINGS = {
    "DS_ACCELERATOR": _honoured("cpu or cuda, as the run has it; anything else is refused"),
    "DEEPSPEED_TIMEOUT": _ignored("not used: --ddp_timeout says it", "30"),
    "DS_ALLOW_DEPRECATED_FP16": _honoured("by DeepSpeed: fp16 on GPUs that it does not support any more"),
    "DS_SDMA_ALLGATHER*": _honoured("by DeepSpeed: how AMD GPUs exchange weights"),
    "MORI_ENABLE_SDMA": _honoured("by DeepSpeed: how AMD GPUs exchange weights"),
    "DS_PIN_MEMORY_*": _honoured("by DeepSpeed: how host memory is pinned"),
    "DS_ENV_FILE": _honoured("by DeepSpeed's launcher, which hands the variables in that file to the ranks"),
}
_PROCESSES = {
    **dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), _honoured("the processes")),
    **dict.fromkeys(("LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_*"), _honoured("the processes")),
    **dict.fromkeys(
        ("OMPI_COMM_WORLD_*", "PMI_*", "MV2_COMM_WORLD_*", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        _refused("several processes that only MPI has started are refused; else removed: see check_processes"),
    ),
    "SLURM_*": _honoured("the job's number and end; several tasks without a launcher are refused"),
    **dict.fromkeys(("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"), _honoured("by DeepSpeed, on clusters of its own")),
    **dict.fromkeys(("NPROC", "NODE_RANK"), _honoured("by accelerate's notebook_launcher")),
    "CUDA_VISIBLE_DEVICES": _honoured("the GPUs; a process that sees one GPU uses it, for any local rank"),
}
RULES: dict[str, Rule] = {**_ACCELERATE, **_FSDP_SETTINGS, **_DEEPSPEED_SETTINGS, **_PROCESSES}
# MPI's rules are applied by `check_processes`, which knows whether there is a launcher between MPI and the process.
MPI = ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_", "MPI_LOCAL")
FAMILIES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")


def rule_for(name: str) -> Rule | None:
    """Return the rule of a variable, or None if the table does not list it."""
    if name in RULES:
        return RULES[name]
    return next((rule for key, rule in RULES.items() if key.endswith("*") and name.startswith(key[:-1])), None)
