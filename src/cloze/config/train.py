"""Which model to train, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cloze.config.data import BlocksConfig
from cloze.config.ranges import (
    MAX_BATCH,
    MAX_BETA,
    MAX_COUNT,
    MAX_RATE,
    MAX_SECONDS,
    MAX_SEED,
    MAX_STEPS,
    MIN_EPSILON,
    Ge,
    Gt,
    Le,
    Lt,
    Ranged,
)

NOT_ADAM = ("sgd", "rmsprop")  # values of `optim` for which the flags of Adam have no effect
# The values that determine a run's numbers. The split of the global batch is not among them.
RUN_KEYS = (
    "model_name_or_path",
    "model_revision",
    "model_type",
    "config_name",
    "config_overrides",
    "mlm_probability",
    "mlm_probability_end",
    "mask_unit",
    "mask_replace_prob",
    "random_replace_prob",
    "batch_size_warmup_steps",
    "batch_size_warmup_start",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "layerwise_lr_decay",
    "optim",
    "optim_args",
    "ema_decay",
    "freeze",
    "seed",
)


@dataclass(kw_only=True)
class ModelConfig(Ranged):
    """Which model to train."""

    model_name_or_path: str | None = None
    """pretrained weights: a model on the Hub or a local folder (default: start from random weights)"""
    model_revision: str = "main"
    """branch, tag or commit of the model on the Hub"""
    model_type: str | None = None
    """from scratch: the architecture (`roberta`, `bert`, `modernbert`, ...)"""
    config_name: str | None = None
    """from scratch: use the configuration of this model (Hub name or folder)"""
    config_overrides: str | None = None
    """changes to the configuration: `hidden_size=256,num_hidden_layers=4`; with pretrained weights only those that
    need no other weights: `hidden_dropout_prob=0`"""
    attn_implementation: str | None = None
    """how attention is computed: eager, sdpa, flex_attention, flash_attention_2 (3, 4), or a flash kernel on the Hub
    such as kernels-community/flash-attn2 (default: the best one the model and this machine have)"""
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
    mlm_probability: Annotated[float, Gt(0), Le(1)] = 0.15
    """share of tokens to predict"""
    mlm_probability_end: Annotated[float | None, Gt(0), Le(1)] = None
    """the share at the end of the run: it changes linearly from mlm_probability at the first sample to this value at
    the last one; evaluation uses this value throughout (default: the share is constant)"""
    mask_unit: Literal["token", "word", "span"] = "token"
    """what is masked as a whole: single tokens; words (BERT's whole word masking); or spans of up to 10 words
    (SpanBERT); evaluation masks single tokens"""
    mask_replace_prob: Annotated[float, Ge(0), Le(1)] = 0.8
    """share of the chosen tokens that are replaced by the mask token"""
    random_replace_prob: Annotated[float, Ge(0), Le(1)] = 0.1
    """share of the chosen tokens that are replaced by a random token; the rest stay unchanged"""

    per_device_train_batch_size: Annotated[int, Ge(1), Le(MAX_BATCH)] = 8
    """blocks per process and forward pass"""
    gradient_accumulation_steps: Annotated[int, Ge(1), Le(MAX_BATCH)] = 1
    """forward passes per optimizer step"""
    global_batch_size: Annotated[int | None, Ge(1), Le(MAX_BATCH)] = None
    """blocks per optimizer step on all processes together, for any number of processes; gradient_accumulation_steps is
    derived from it, and per_device_train_batch_size is an upper limit (default: per_device_train_batch_size *
    gradient_accumulation_steps * processes)"""
    batch_size_warmup_steps: Annotated[int, Ge(0), Le(MAX_STEPS)] = 0
    """grow the global batch linearly, in whole blocks, during this many optimizer steps; each step runs only the
    forward passes it needs"""
    batch_size_warmup_start: Annotated[int | None, Ge(1), Le(MAX_BATCH)] = None
    """blocks of all processes together in the first step of this warm-up"""
    auto_find_batch_size: bool = False
    """choose per_device_train_batch_size and gradient_accumulation_steps so that memory is used well; the global batch
    (their product times the processes) stays the same"""
    num_train_epochs: Annotated[float, Ge(0), Le(MAX_COUNT)] = 3.0
    """passes over the training blocks: the run has ceil(num_train_epochs * blocks / global batch) steps. A step may
    span two passes, and only the last step may be partly filled (transformers' Trainer: num_train_epochs * ceil(blocks
    / global batch) steps)"""
    max_steps: Annotated[int, Ge(-1), Le(MAX_STEPS)] = -1
    """optimizer steps; overrides num_train_epochs if positive"""
    learning_rate: Annotated[float, Ge(0), Le(MAX_RATE)] = 5e-5
    """peak learning rate"""
    weight_decay: Annotated[float, Ge(0), Le(MAX_RATE)] = 0.0
    """weight decay of all parameters except biases and normalization weights"""
    adam_beta1: Annotated[float, Ge(0), Le(MAX_BETA)] = 0.9
    """decay rate of Adam's first moment"""
    adam_beta2: Annotated[float, Ge(0), Le(MAX_BETA)] = 0.999
    """decay rate of Adam's second moment"""
    adam_epsilon: Annotated[float, Ge(MIN_EPSILON), Le(1)] = 1e-8
    """term added to Adam's denominator"""
    max_grad_norm: Annotated[float, Ge(0), Le(1e30)] = 1.0
    """clip gradients to this norm; 0 disables clipping"""
    lr_scheduler_type: str = "linear"
    """a schedule of `transformers` (linear, cosine, warmup_stable_decay, constant_with_warmup, inverse_sqrt, ...)"""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """arguments of the schedule: `{"num_decay_steps": 0.2, "decay_type": "1-sqrt"}` for warmup_stable_decay"""
    warmup_steps: Annotated[float, Ge(0), Le(MAX_STEPS)] = 0
    """warm-up steps; a value below 1 is a share of all steps"""
    layerwise_lr_decay: Annotated[float | None, Gt(0), Le(1)] = None
    """for fine-tuning: the learning rate of each layer, as a share of that of the layer above (0.8 to 0.95 is
    usual)"""
    optim: Literal["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "stable_adamw", "muon"] = "adamw_torch_fused"
    """the optimizer; both spellings of AdamW are fused; Muon updates hidden matrices, AdamW the other parameters"""
    optim_args: str | None = None
    """further arguments of the optimizer: `momentum=0.9,nesterov=true`"""
    ema_decay: Annotated[float | None, Gt(0), Lt(1)] = None
    """keep an exponential moving average of the fp32 weights (4 bytes per parameter); its decay rate is lower in the
    first steps; `cloze consolidate --weights ema` uses the average"""
    freeze: str | None = None
    """do not train parameters whose names match this regular expression from the beginning: `.*embeddings`"""
    seed: Annotated[int, Ge(0), Le(MAX_SEED)] = 42
    """seed of initial weights, order, masks and dropout"""

    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """`auto`: what the launcher asks for, otherwise bf16 on a GPU that is fast in it, fp16 on an older GPU, and fp32
    on a CPU. Weights and optimizer state are fp32 in any case; fp8 needs an Ada or Hopper GPU and torchao"""
    bf16: bool = False
    """mixed precision in bfloat16; the same as `--precision bf16`"""
    fp16: bool = False
    """mixed precision in float16 with loss scaling (GPU only); the same as `--precision fp16`"""
    tf32: bool | None = None
    """use TF32 matrix products on Ampere and later GPUs (default: torch's setting)"""
    full_determinism: bool | Literal["auto"] = "auto"
    """use only operations that give the same bits every time. `auto`: on a GPU, with a warning if the model needs an
    operation without a deterministic implementation; true: refuse such a model; false: allow nondeterministic
    kernels"""
    torch_compile: bool | Literal["auto"] = "auto"
    """compile the model's backbone; `auto`: on a GPU, for architectures that compile to one graph"""
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = (
        None
    )
    """mode of torch.compile: `reduce-overhead` uses CUDA graphs, which helps small models; `max-autotune` tries more
    kernels"""
    sparse_head: bool = True
    """compute vocabulary scores at masked positions only; architectures that do not allow it are detected"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass to save memory"""
    gradient_checkpointing_every_n_layers: Annotated[int, Ge(1), Le(MAX_COUNT)] = 1
    """with gradient_checkpointing: recompute only every n-th layer, which computes less and stores more"""
    deepspeed: str | None = None
    """a DeepSpeed configuration (JSON); usually given to `accelerate launch` instead"""
    ddp_timeout: Annotated[int, Ge(1), Le(MAX_SECONDS)] = 1800
    """seconds after which an unanswered collective operation is an error"""
    hang_timeout: Annotated[int | None, Ge(1), Le(MAX_SECONDS)] = None
    """seconds without progress after which every rank writes the stacks of its threads into the run's folder and ends
    (default: never)"""
    use_cpu: bool = False
    """train on the CPU even if there is a GPU"""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """when to evaluate on the validation blocks"""
    eval_steps: Annotated[int | None, Ge(1), Le(MAX_STEPS)] = None
    """optimizer steps between evaluations (default: logging_steps)"""
    eval_on_start: bool = False
    """evaluate before the first step"""
    per_device_eval_batch_size: Annotated[int, Ge(1), Le(MAX_BATCH)] = 8
    """blocks per process and forward pass during evaluation"""
    logging_steps: Annotated[int, Ge(1), Le(MAX_STEPS)] = 10
    """optimizer steps between lines of metrics.jsonl"""
    report_to: str = "none"
    """trackers of accelerate, separated by commas: tensorboard, wandb, mlflow, trackio, ... or none"""
    run_name: str | None = None
    """name of the run in trackers (default: the last part of output_dir)"""
    project: str = "huggingface"
    """project of the run in trackers: of W&B (or WANDB_PROJECT) and Trackio, or the experiment of MLflow (or
    MLFLOW_EXPERIMENT_NAME)"""

    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """when to save a checkpoint; unless this is `no`, one is also saved at the end"""
    save_steps: Annotated[int, Ge(1), Le(MAX_STEPS)] = 500
    """optimizer steps between checkpoints"""
    save_total_limit: Annotated[int | None, Ge(1), Le(MAX_COUNT)] = None
    """keep this many of the newest checkpoints (default: all)"""
    async_save: bool = False
    """write checkpoints in the background: training waits only while the state is copied to host memory, which must
    have room for one more copy"""
    on_save_error: Literal["continue", "stop"] = "continue"
    """what to do if a checkpoint cannot be written (a full disk): continue until the next one, or stop"""
    save_before_time_limit: Annotated[int | None, Ge(1), Le(MAX_SECONDS)] = None
    """in a SLURM job: save a checkpoint and stop (exit code 75) this many seconds before the job's time limit"""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """what to do if a loss or gradient is NaN or infinite: stop; skip the batch, up to 50 times in a row; or return to
    the last checkpoint and exclude the batch"""
    resume_from_checkpoint: str | None = None
    """resume from this checkpoint folder; `auto`: from the newest checkpoint in output_dir, or from step 0 without a
    checkpoint. Newer checkpoints in output_dir are moved into a folder superseded-1; a checkpoint of another run
    starts a branch in an empty output_dir"""

    push_to_hub: bool = False
    """push the model to the Hub during training, in the background; a failed push never stops training"""
    hub_model_id: str | None = None
    """the repository: `name` or `owner/name` (default: the last part of output_dir)"""
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = "every_save"
    """what to push: the model at the `end`, or with `every_save`; `checkpoint`: also the last checkpoint, to resume
    from, in the folder `last-checkpoint`; `all_checkpoints`: also every checkpoint, each in its own folder"""
    hub_private_repo: bool | None = None
    """make a new repository private (default: according to its owner's settings)"""
    hub_revision: str | None = None
    """the branch to push to; it is created if missing (default: main)"""
    hub_token: str | None = None
    """a Hub token with write access (default: `token`, or the one of `hf auth login`)"""
    license: str | None = None
    """the license on the model card, as the Hub spells it: `apache-2.0`, `mit`, ... (default: that of the base model
    on the Hub, otherwise that of the dataset)"""
    language: str | None = None
    """the language of the text on the model card: `en`, or several separated by commas"""
