"""What is done on machines and for them: demo, init, doctor, bench, submit, completion."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cloze.config.ranges import (
    MAX_BATCH,
    MAX_BLOCK_SIZE,
    MAX_COUNT,
    MAX_NODES,
    MAX_SECONDS,
    MAX_STEPS,
    MIN_BLOCK_SIZE,
    TIME,
    Ge,
    Gt,
    Le,
    Ranged,
)


@dataclass(kw_only=True)
class DemoConfig(Ranged):
    """Run the whole main job on the sample corpus: prepare, train, consolidate, evaluate, fill."""

    output_dir: str = "runs/demo"
    """the run's folder"""
    num_processes: Annotated[int | None, Ge(1), Le(1024)] = None
    """number of training processes (default: one per GPU, or 2 on the CPU)"""
    max_steps: Annotated[int, Ge(-1), Le(MAX_STEPS)] = -1
    """optimizer steps (default: enough to learn the sample corpus)"""


@dataclass(kw_only=True)
class InitConfig(Ranged):
    """Write the recipes, the DeepSpeed and accelerate configurations and the SLURM scripts into a folder to start in:
    `launch`, `ds_configs` and `slurm`, as the repository has them."""

    folder: str
    """the folder: `.` for this one"""


@dataclass(kw_only=True)
class DoctorConfig(Ranged):
    """Look whether these machines are fit to train on: versions that differ, GPUs, every pair of ranks over gloo and
    NCCL, the shared folder, disks, clocks, cores, limits, what DeepSpeed can build, the Hub token. It prints a table;
    what is red there stops a run or makes it wrong or many times slower, says what to do, and makes the exit code 2.
    Start it as training is started: `cloze doctor` on one machine, `srun cloze doctor` on the nodes of a job (with the
    tasks and GPUs per node of training), `accelerate launch ... -m cloze doctor`, `torchrun ... -m cloze doctor`."""

    output_dir: str = "."
    """the folder for runs: it is tested for sharing between ranks, free space and speed; test files are removed"""
    timeout: Annotated[float, Gt(0), Le(MAX_SECONDS)] = 60.0
    """seconds to wait until all ranks have reached rank 0"""
    megabytes: Annotated[int, Ge(1), Le(2**16)] = 64
    """MiB that are sent between two ranks, and written to the disk and read; up to 16 ranks each pair is measured
    alone; above, the first rank of each node stands for it, and above 16 nodes several pairs are measured at a time"""
    json: str | None = None
    """write all that was found, and the table, to this file too"""


@dataclass(kw_only=True)
class BenchConfig(Ranged):
    """Measure Cloze beside its peers, in one run on this machine, and print a table."""

    what: Literal["prepare", "loader", "save", "train", "step", "memory"]
    """`prepare`: the tutorial's map and group_texts, tokenizers alone in memory, and `cloze prepare` from three kinds
    of files; `loader`: opening a prepared folder, and masked batches from a cold page cache; `save`: how long training
    waits for a checkpoint; `train`: steps of `cloze train`, of transformers' Trainer and of a bare loop, in pairs;
    `step`: where the time of one step of `cloze train` goes, also under `accelerate launch`; `memory`: what `cloze
    plan` predicts beside what two ranks on the CPU take, or one on a GPU, for 6 architectures under DDP, ZeRO 0 to 3
    and FSDP2"""
    dataset_name: str | None = None
    """prepare: a file of ELI5-shaped records (q_id, answers.text), repeated with shuffled answers up to the size
    (default: the sample corpus)"""
    tokenizer_name: str | None = None
    """prepare: a tokenizer (default: one trained on the sample corpus)"""
    megabytes: Annotated[int, Ge(1), Le(MAX_COUNT)] = 100
    """prepare: size of the corpus as JSON lines"""
    num_proc: Annotated[int | None, Ge(1), Le(4096)] = None
    """prepare: processes for Cloze and for the tutorial (default: one per core)"""
    block_size: Annotated[int, Ge(MIN_BLOCK_SIZE), Le(MAX_BLOCK_SIZE)] = 128
    """tokens per block"""
    num_blocks: Annotated[int, Ge(1), Le(MAX_STEPS)] = 10_000_000
    """loader: blocks in the folder"""
    per_device_train_batch_size: Annotated[int | None, Ge(1), Le(MAX_BATCH)] = None
    """loader, train, step: blocks per batch (default: 32 for the loader, 8 for training on a CPU; with --gpu, the
    batch at which each loop is fastest)"""
    gpu: bool = False
    """train, step, memory: measure the GPU, in bf16 (default: the CPU, in fp32)"""
    sizes: str | None = None
    """train, step: which of distilroberta-128, distilroberta-512, roberta-base-512, roberta-large-512,
    modernbert-base-1024, tiny-32, separated by commas (default: the first one; `train --gpu`: all but the last);
    memory: which of roberta, bert, modernbert, deberta-v2, electra, xlm-roberta-xl (default: all)"""
    packing: Literal["concat", "best_fit"] = "concat"
    """train, step: how documents are packed into the blocks"""
    rounds: Annotated[int | None, Ge(1), Le(MAX_COUNT)] = None
    """train, step: pairs of turns per loop (default: 15; train --gpu: 6; an interval needs at least 6)"""
    model_type: str = "roberta"
    """save: the architecture"""
    config_overrides: str = "hidden_size=1024,num_hidden_layers=24,num_attention_heads=16,intermediate_size=4096"
    """save: its size (default: RoBERTa-large's)"""
    work_dir: str | None = None
    """folder for temporary files (default: a temporary folder)"""
    output: str | None = None
    """write the table as JSON too"""


@dataclass(kw_only=True)
class SubmitConfig(Ranged):
    """Submit a recipe to SLURM as a chain of jobs: prepare (an array) -> train -> consolidate and evaluate (-> push).

    Run it in the repository root, on a machine that has `sbatch`. A job starts after the previous one has succeeded,
    and is cancelled if that can no longer happen. The scripts are in slurm/; each also works alone with sbatch.
    """

    recipe: str
    """the recipe of `cloze train`, a YAML file; RECIPE.prepare.yaml beside it says how its blocks are made"""
    nodes: Annotated[int, Ge(1), Le(MAX_NODES)] = 1
    """nodes to train on"""
    min_nodes: Annotated[int | None, Ge(1), Le(MAX_NODES)] = None
    """continue on this many nodes if no more are available (default: --nodes); samples, masks and global batch do not
    change"""
    gpus_per_node: Annotated[int, Ge(0), Le(1024)] = 0
    """GPUs of each node, with one process for each; 0: request none"""
    processes_per_node: Annotated[int | None, Ge(1), Le(4096)] = None
    """processes of each node (default: one for each GPU, or one without a GPU)"""
    cpus_per_task: Annotated[int, Ge(1), Le(4096)] = 8
    """CPU cores of each node, or of each task that prepares"""
    time: Annotated[str, TIME] = "24:00:00"
    """time limit of one start of the training job; a longer run is requeued and resumes"""
    partition: str | None = None
    """the partition to train in (default: the cluster's)"""
    cpu_partition: str | None = None
    """the partition for preparing and pushing, which need no GPU (default: --partition)"""
    account: str | None = None
    """the account to charge"""
    sbatch_flags: str = ""
    """more flags for each sbatch: `--qos=high --exclusive`"""
    ds_config: str = "ds_configs/zero2.json"
    """the DeepSpeed configuration"""
    max_restarts: Annotated[int, Ge(0), Le(MAX_COUNT)] = 3
    """how often training may be started again without a new checkpoint in between"""
    seeds: Annotated[int | None, Ge(1), Le(MAX_NODES)] = None
    """train with the seeds 1 to N, as an array of jobs in OUTPUT_DIR-seed1, ..."""
    prepare_tasks: Annotated[int, Ge(1), Le(MAX_NODES)] = 8
    """tasks that prepare; the blocks are the same for any number of them"""
    prepare_tasks_at_once: Annotated[int | None, Ge(1), Le(MAX_NODES)] = None
    """how many of them may run at a time (default: all)"""
    push_to: str | None = None
    """push the model to this repository of the Hub, `owner/name`, when it is evaluated"""
    train_flags: str = ""
    """flags of `cloze train` that win over the recipe: `--max_steps 1000`; with slurm/submit, what follows `--`"""
    prepare_flags: str = ""
    """flags of `cloze prepare` that win over its recipe"""
    dry_run: bool = False
    """submit nothing; print the sbatch commands and the scripts"""


def prepare_recipe(recipe: str) -> Path:
    """Return the recipe of `cloze prepare` beside one of `cloze train`: `x/roberta.prepare.yaml`."""
    return Path(f"{os.path.splitext(recipe)[0]}.prepare.yaml")


@dataclass(kw_only=True)
class CompletionConfig(Ranged):
    """Print what makes a shell complete commands, options and their values.

    Write it where the shell looks for such things (see the examples), or try it with `source <(cloze completion bash)`
    in bash, `source <(cloze completion zsh)` in zsh, `cloze completion fish | source` in fish.
    """

    shell: Literal["bash", "zsh", "fish"]
    """which shell"""
