"""One dataclass per command: what can be set, its default, and what it means.

A value comes from the default, then from the YAML file given with --config, then from the flags. Names are
`transformers.TrainingArguments`' where they mean the same, and `run_mlm.py`'s for model and data. `cloze.cli` turns
these classes into command lines; the docstring under a field is its help text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(kw_only=True)
class SourceConfig:
    """Where documents come from."""

    dataset_name: str | None = None
    """a dataset on the Hub (`owner/name`), or a local file, folder or glob: json (array or lines), jsonl, parquet,
    arrow, csv, txt; json, csv and txt also as .gz or .zst"""
    preset: Literal["eli5", "eli5_category", "eli5_kilt", "eli5_pairs"] | None = None
    """the fields (and, without a dataset_name, the place on the Hub) of a known corpus: `eli5` (the original records),
    `eli5_category`, `eli5_kilt` (facebook/kilt_tasks), `eli5_pairs` (sentence-transformers/eli5)"""
    document: Literal["answers", "full"] = "answers"
    """with a preset: what the text is; `answers` as in the tutorial, `full` with title and question before them"""
    dataset_config_name: str | None = None
    """the configuration of a Hub dataset"""
    dataset_revision: str | None = None
    """the branch, tag or commit of a Hub dataset"""
    split: str = "train"
    """which documents to take; slices as in `datasets`: `train`, `train[:5000]`, `train_asks[10%:20%]`"""
    text_field: str | None = None
    """the field with the text; dots go into nested fields, lists are joined by a space, several fields are separated
    by commas: `title,answers.text` (default: `text`, or the line of a .txt file)"""
    id_field: str | None = None
    """the field that names a document (default: `q_id` or `id` where there is one, else the text itself)"""
    cache_dir: str | None = None
    """where downloads from the Hub are kept"""
    token: str | None = None
    """a Hub token (default: the one of `hf auth login`)"""


@dataclass(kw_only=True)
class BlocksConfig(SourceConfig):
    """How documents become blocks of tokens."""

    block_size: int = 128
    """tokens per block"""
    packing: Literal["concat", "best_fit"] = "concat"
    """`concat`: documents end to end, cut into full blocks, as in the tutorial; `best_fit`: documents kept whole where
    they fit, blocks padded, attention inside documents"""
    tokenizer_backend: Literal["auto", "gigatoken", "tokenizers", "transformers"] = "auto"
    """what encodes (default: the fastest one that gives the tokenizer's own ids)"""
    split_special_tokens: bool = False
    """encode text that spells a special token (`<mask>`) as text; default: as the special token, as tokenizers do"""
    on_bad_record: Literal["refuse", "skip"] = "refuse"
    """a record without text, of the wrong type, no UTF-8, or above 64 MiB: stop and name it, or leave it out and
    count it"""
    num_proc: int | None = None
    """worker processes (default: one per core); the result does not depend on it"""
    unit_size: str = "32MB"
    """bytes of the corpus that are done, and kept, at a time; larger ones for corpora of many terabytes"""
    validation_split: str | None = None
    """take the validation documents from this split of the dataset"""
    validation_split_percentage: float = 5.0
    """without a validation_split: the share of documents kept for validation, chosen by a hash of the document's id,
    so that the same document always falls on the same side; 0 for none"""
    trust_remote_code: bool = False
    """run Python code that comes with the tokenizer"""


@dataclass(kw_only=True)
class PrepareConfig(BlocksConfig):
    """Turn a corpus into fixed blocks of tokens, once, before any GPU is used."""

    tokenizer_name: str
    """a tokenizer on the Hub, or a local folder"""
    output: str
    """the folder to make; `datasets.load_from_disk` opens it too"""
    num_shards: int = 1
    """share the work between so many runs of this command, on any machines that see the output folder"""
    shard_index: int | None = None
    """which of them this is, from 0"""
    finalize: bool = False
    """do no work, only check that all shards' work is there and join it (the last shard does it by itself)"""


@dataclass(kw_only=True)
class InspectConfig:
    """Show what is in a prepared folder."""

    data: str
    """a folder made by `cloze prepare`"""
    split: str | None = None
    """train or validation (default: all there are)"""
    blocks: int = 3
    """how many blocks to show as text"""
    verify: bool = False
    """read every shard and compare its checksum"""


@dataclass(kw_only=True)
class TokenizerConfig(SourceConfig):
    """Train a byte-level BPE tokenizer with RoBERTa's special tokens on a corpus."""

    output: str
    """the folder to make"""
    vocab_size: int = 8192
    """number of tokens, special tokens included"""
    min_frequency: int = 2
    """how often a pair must occur to be merged"""
    model_max_length: int = 512
    """the longest input that models with this tokenizer will take"""


@dataclass(kw_only=True)
class ModelConfig:
    """Which model to train."""

    model_name_or_path: str | None = None
    """pretrained weights: a model on the Hub or a local folder; without it the model starts from random weights"""
    model_revision: str = "main"
    """branch, tag or commit of the model on the Hub"""
    model_type: str | None = None
    """from scratch: the architecture (`roberta`, `bert`, `modernbert`, ...)"""
    config_name: str | None = None
    """from scratch: take the configuration of this model (Hub name or folder)"""
    config_overrides: str | None = None
    """from scratch: changes to the configuration: `hidden_size=256,num_hidden_layers=4`"""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    """how attention is computed (default: the best one the model and this machine have)"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""
    cache_dir: str | None = None
    """where downloads from the Hub are kept"""
    token: str | None = None
    """a Hub token (default: the one of `hf auth login`)"""


@dataclass(kw_only=True)
class TrainConfig(ModelConfig, BlocksConfig):
    """Train a model. Start it with `accelerate launch -m cloze train ...` or with `cloze train ...`."""

    dataset_name: str | None = None
    """a folder made by `cloze prepare`; or a corpus, as in `cloze prepare`, which is prepared first, once, and kept"""
    tokenizer_name: str | None = None
    """for a corpus: its tokenizer (default: the one of model_name_or_path or config_name)"""
    prepared_cache_dir: str | None = None
    """where prepared corpora are kept (default: $CLOZE_CACHE, or `cloze` in the user's cache folder)"""
    streaming_train: bool = False
    """for a corpus that is larger than the disk: tokenize and pack while training, and keep nothing; needs max_steps,
    and resumes on the same number of processes only"""
    output_dir: str
    """the run's folder: checkpoints, metrics, resolved configuration"""
    mlm_probability: float = 0.15
    """share of tokens to predict"""
    mask_replace_prob: float = 0.8
    """share of those that are replaced by the mask token"""
    random_replace_prob: float = 0.1
    """share of those that are replaced by a random token; the rest stay as they are"""

    per_device_train_batch_size: int = 8
    """blocks per process and forward pass"""
    gradient_accumulation_steps: int = 1
    """forward passes per optimizer step"""
    num_train_epochs: float = 3.0
    """passes over the training blocks"""
    max_steps: int = -1
    """optimizer steps; overrides num_train_epochs where positive"""
    learning_rate: float = 5e-5
    """peak learning rate"""
    weight_decay: float = 0.0
    """for all weights but biases and normalization"""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm; 0 for no clipping"""
    lr_scheduler_type: str = "linear"
    """a schedule of `transformers` (linear, cosine, constant_with_warmup, polynomial, inverse_sqrt, ...)"""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """further arguments of the schedule"""
    warmup_steps: float = 0
    """steps of warm-up; below 1: the share of all steps"""
    seed: int = 42
    """decides initial weights, order, masks and dropout"""

    bf16: bool = False
    """mixed precision in bfloat16"""
    fp16: bool = False
    """mixed precision in float16 with loss scaling (GPU only)"""
    tf32: bool | None = None
    """TF32 matrix products on Ampere and later GPUs"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass to save memory"""
    deepspeed: str | None = None
    """a DeepSpeed configuration (JSON); normally given to `accelerate launch` instead"""
    ddp_timeout: int = 1800
    """seconds after which a collective operation that nobody answers is an error"""
    use_cpu: bool = False
    """do not use a GPU even where there is one"""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """when to evaluate on the validation blocks"""
    eval_steps: int | None = None
    """optimizer steps between evaluations (default: logging_steps)"""
    eval_on_start: bool = False
    """evaluate before the first step"""
    per_device_eval_batch_size: int = 8
    """blocks per process and forward pass in evaluation"""
    logging_steps: int = 10
    """optimizer steps between lines of metrics.jsonl"""
    report_to: str = "none"
    """trackers of accelerate, separated by commas: tensorboard, wandb, mlflow, ... or none"""
    run_name: str | None = None
    """the run's name in trackers (default: the last part of output_dir)"""

    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """when to save a checkpoint; one is always saved at the end unless this is `no`"""
    save_steps: int = 500
    """optimizer steps between checkpoints"""
    save_total_limit: int | None = None
    """keep this many of the newest checkpoints (default: all)"""
    resume_from_checkpoint: str | None = None
    """go on from this checkpoint folder; `auto`: from the newest one in output_dir, or from the start if none is"""


@dataclass(kw_only=True)
class ConsolidateConfig:
    """Turn a checkpoint into a folder that `from_pretrained` and `pipeline("fill-mask")` load."""

    checkpoint: str
    """a run's folder (its newest checkpoint is taken) or one checkpoint-N"""
    output: str | None = None
    """the folder to make (default: `model` in the run's folder)"""
    max_shard_size: str = "5GB"
    """largest size of one weights file"""


@dataclass(kw_only=True)
class EvaluateConfig:
    """Perplexity and masked accuracy on fixed masks."""

    model: str
    """a model folder, a run's folder (its `model`), or a model on the Hub"""
    data: str
    """a folder made by `cloze prepare`"""
    split: str = "validation"
    """train or validation"""
    per_device_eval_batch_size: int = 8
    """blocks per process and forward pass; the result does not depend on it"""
    mlm_probability: float = 0.15
    """share of tokens to predict"""
    seed: int = 42
    """decides which tokens are masked"""
    output: str | None = None
    """the JSON file to write (default: eval.json in the run's folder; none for a bare model)"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""
    use_cpu: bool = False
    """do not use a GPU even where there is one"""


@dataclass(kw_only=True)
class FillConfig:
    """Show what a model puts in place of the mask."""

    model: str
    """a model folder, a run's folder (its `model`), or a model on the Hub"""
    text: str
    """a text with the model's mask token; `<mask>` and `[MASK]` are both understood"""
    top_k: int = 3
    """how many answers to show"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""


@dataclass(kw_only=True)
class PushConfig:
    """Publish a consolidated model with its model card on the Hugging Face Hub."""

    path: str
    """a run's folder or a consolidated model folder"""
    repo: str
    """the repository: `name` or `owner/name`"""
    private: bool = False
    """make a new repository private"""
    revision: str | None = None
    """the branch to push to (made if missing; default: main)"""
    commit_message: str = "Upload model trained with Cloze"
    """the commit's message"""
    token: str | None = None
    """a Hub token with write access (default: the one of `hf auth login`)"""
    dry_run: bool = False
    """say what would be pushed, and push nothing"""


@dataclass(kw_only=True)
class DemoConfig:
    """Run the whole main job on the sample corpus: prepare, train, consolidate, evaluate, fill."""

    output_dir: str = "runs/demo"
    """the run's folder"""
    num_processes: int | None = None
    """how many processes train (default: one per GPU, or 2 on the CPU)"""
    max_steps: int = -1
    """optimizer steps (default: enough to learn the sample corpus)"""


@dataclass(kw_only=True)
class BenchConfig:
    """Measure Cloze beside its peers, in one run on this machine, and print a table."""

    what: Literal["prepare", "loader"]
    """`prepare`: the tutorial's map and group_texts, tokenizers alone in memory, and `cloze prepare` from three kinds
    of files; `loader`: opening a prepared folder, and masked batches from a cold page cache"""
    dataset_name: str | None = None
    """prepare: a file of ELI5-shaped records (q_id, answers.text), repeated with shuffled answers up to the size
    (default: the sample corpus)"""
    tokenizer_name: str | None = None
    """prepare: a tokenizer (default: one trained on the sample corpus)"""
    megabytes: int = 100
    """prepare: size of the corpus as JSON lines"""
    num_proc: int | None = None
    """prepare: processes for Cloze and for the tutorial (default: one per core)"""
    block_size: int = 128
    """tokens per block"""
    num_blocks: int = 10_000_000
    """loader: blocks in the folder"""
    per_device_train_batch_size: int = 32
    """loader: blocks per batch"""
    work_dir: str | None = None
    """where the files are made, and deleted (default: a temporary folder)"""
    output: str | None = None
    """write the table as JSON too"""
