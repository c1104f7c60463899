"""What a run will take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cloze.config.ranges import MAX_BLOCK_SIZE, MAX_COUNT, MAX_NODES, Ge, Gt, Le, Ranged


@dataclass(kw_only=True)
class PlanConfig(Ranged):
    """Estimate what a run of `cloze train` needs, in seconds, without its weights, a GPU or the network.

    That is: memory of a GPU for DDP, every ZeRO stage and offload, and FSDP2, with and without activation
    checkpointing; the largest micro-batch that fits; host memory, bytes on wire and disk; an estimate of speed and
    days; and which choice to take. As in
    `cloze plan launch/recipes/distilroberta-eli5.yaml --gpus 8xH100-80GB --nodes 2`, or
    `cloze plan my.yaml --gpus A10G --train_flags '--gradient_accumulation_steps 4' --write launch/mine`.

    Recommended is the fastest choice that fits with a tenth of the memory to spare; of those within 5 % of it the
    least partitioned one, and one without offload and recomputation if one fits.
    """

    recipe: str
    """the recipe of `cloze train`, a YAML file; RECIPE.prepare.yaml beside it says how its blocks are made"""
    gpus: str | None = None
    """GPUs of each node: `8xH100-80GB`, `A10G` (default: those of this machine; without a GPU its CPU)"""
    nodes: Annotated[int, Ge(1), Le(MAX_NODES)] = 1
    """number of nodes with these GPUs"""
    network_gbit: Annotated[float, Gt(0), Le(MAX_COUNT)] = 100.0
    """Gbit/s between two nodes"""
    host_memory_gib: Annotated[float | None, Gt(0), Le(MAX_COUNT)] = None
    """GiB of host memory of each node; choices that need more are left out (default: this machine's where --gpus is
    not given, else there is no limit)"""
    block_size: Annotated[int | None, Ge(1), Le(MAX_BLOCK_SIZE)] = None
    """tokens per block (default: those of the prepared folder, else as RECIPE.prepare.yaml says)"""
    vocab_size: Annotated[int | None, Ge(1), Le(MAX_COUNT)] = None
    """tokens of the vocabulary, for a model from scratch whose tokenizer is not here"""
    tokens: Annotated[float | None, Gt(0), Le(1e18)] = None
    """tokens that the run reads, such as 10e9 (default: by the recipe's epochs or max_steps)"""
    train_flags: str = ""
    """flags of `cloze train` that win over the recipe: `--max_steps 1000 --bf16`"""
    choose: str | None = None
    """take this choice instead of the recommended one: ddp, zero2, zero3+offload, fsdp2, ... and `+checkpointing`"""
    write: str | None = None
    """make this folder, with files for DeepSpeed and `accelerate launch --config_file` of the choice"""
    json: str | None = None
    """write all that was worked out to this file too"""
