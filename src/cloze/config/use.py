"""What is done with a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cloze.config.ranges import MAX_BATCH, MAX_COUNT, MAX_SEED, MAX_STEPS, SIZE, Ge, Gt, Le, Ranged


@dataclass(kw_only=True)
class ConsolidateConfig(Ranged):
    """Turn a checkpoint into a folder that `from_pretrained` and `pipeline("fill-mask")` load."""

    checkpoint: str
    """a run's folder (its newest checkpoint is taken) or one checkpoint-N; or a ZeRO or FSDP checkpoint of
    transformers' Trainer, of accelerate, of DeepSpeed or of torch (torch.distributed.checkpoint)"""
    output: str | None = None
    """the folder to write (default: `model` in the run's folder; required for checkpoints of other tools)"""
    max_shard_size: Annotated[str, SIZE] = "5GB"
    """largest size of one weights file"""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """type of the weights that are written; training keeps them in fp32 in any precision"""
    weights: Literal["trained", "ema"] = "trained"
    """which weights: the trained ones, or their moving average (see --ema_decay of `cloze train`)"""
    average: Annotated[int, Ge(1), Le(MAX_COUNT)] = 1
    """average the weights of this many of the last checkpoints"""
    config_name: str | None = None
    """for checkpoints of other tools: the model's configuration, a folder or a model on the Hub (default: config.json
    beside the checkpoint)"""
    tokenizer_name: str | None = None
    """for checkpoints of other tools: the tokenizer, a folder or a model on the Hub (default: the one beside the
    checkpoint, else that of config_name)"""


@dataclass(kw_only=True)
class MeasureConfig(Ranged):
    """How blocks are scored."""

    split: str = "validation"
    """train or validation"""
    per_device_eval_batch_size: Annotated[int, Ge(1), Le(MAX_BATCH)] = 8
    """blocks (or masked sentences) per process and forward pass; the result does not depend on it"""
    mlm_probability: Annotated[float, Gt(0), Le(1)] = 0.15
    """share of tokens to predict"""
    seed: Annotated[int, Ge(0), Le(MAX_SEED)] = 42
    """seed of the masks"""
    draws: Annotated[int, Ge(1), Le(MAX_COUNT)] = 1
    """masks per block; more draws narrow the interval"""
    output: str | None = None
    """the JSON file to write"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""
    use_cpu: bool = False
    """compute on the CPU even if there is a GPU"""


@dataclass(kw_only=True)
class EvaluateConfig(MeasureConfig):
    """Perplexity on fixed masks with its interval, accuracy, bits per byte; or pseudo-log-likelihood of sentences. The
    perplexity of a run's model is written to eval.json in the run's folder unless --output is given."""

    model: str
    """a model folder, a run's folder (its `model`, else its newest checkpoint), a checkpoint, or a model on the Hub"""
    data: str | None = None
    """a folder made by `cloze prepare` (default: the one that the run was trained with)"""
    sentences: str | None = None
    """for pll: a text file with one sentence on each line"""
    metric: Literal["perplexity", "pll", "pll_word_l2r"] = "perplexity"
    """perplexity on fixed masks; `pll`: each token from all others (Salazar et al., 2020); `pll_word_l2r`: later
    tokens of its own word masked too (Kauf and Ivanova, 2023)"""


@dataclass(kw_only=True)
class CompareConfig(MeasureConfig):
    """The paired difference of two models' losses on the same masks, with its interval and p-value."""

    model: str
    """the one model (see `cloze evaluate`)"""
    other: str
    """the other model"""
    data: str | None = None
    """a folder made by `cloze prepare`, with the tokenizer of both (default: the one that their runs were trained
    with)"""


@dataclass(kw_only=True)
class FillConfig(Ranged):
    """Show a model's predictions for a mask."""

    model: str
    """a model folder, a run's folder (its `model`), or a model on the Hub"""
    text: str
    """a text with the model's mask token; `<mask>` and `[MASK]` are both understood"""
    top_k: Annotated[int, Ge(1), Le(MAX_COUNT)] = 3
    """how many answers to show"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""


@dataclass(kw_only=True)
class ArchsConfig(Ranged):
    """Show which architectures there are, and what works for each."""

    model_type: str | None = None
    """show this one only"""
    output: str | None = None
    """write the table as JSON too"""


@dataclass(kw_only=True)
class ReplayConfig(Ranged):
    """Rebuild the batch of one step of a run, exactly as it was trained on, and show it decoded."""

    run: str
    """a run's folder"""
    step: Annotated[int, Ge(1), Le(MAX_STEPS)]
    """the step, counted from 1 as in metrics.jsonl and in messages"""
    samples: Annotated[int, Ge(0), Le(MAX_COUNT)] = 4
    """how many of its blocks to show"""
    data: str | None = None
    """the run's prepared folder if it has moved"""
    output: str | None = None
    """store the whole batch in this safetensors file: samples, blocks, input_ids, labels"""


@dataclass(kw_only=True)
class PushConfig(Ranged):
    """Publish a consolidated model with its model card on the Hugging Face Hub."""

    path: str
    """a run's folder or a consolidated model folder"""
    repo: str
    """the repository: `name` or `owner/name`"""
    private: bool = False
    """make a new repository private"""
    revision: str | None = None
    """the branch of the model's repository to push to (made if missing; default: main)"""
    tag: str | None = None
    """tag the commit of the model"""
    create_pr: bool = False
    """open a pull request, or update your open one of the same commit_message, instead of committing to the branch"""
    dataset_repo: str | None = None
    """also push the blocks that the run was trained on, as a dataset with its own card: `name` or `owner/name`"""
    license: str | None = None
    """the license on the card, as the Hub spells it: `apache-2.0`, `mit`, ... (default: that of the base model on the
    Hub, otherwise that of the dataset)"""
    language: str | None = None
    """the language of the text on the card: `en`, or several separated by commas"""
    commit_message: str = "Upload model trained with Cloze"
    """the message of the model's commit"""
    token: str | None = None
    """a Hub token with write access (default: the one of `hf auth login`)"""
    dry_run: bool = False
    """show what a push would upload, without pushing"""
