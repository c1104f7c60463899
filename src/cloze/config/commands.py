"""The commands with their dataclasses, and what to use instead of names of other tools."""

from __future__ import annotations

from cloze import config

# command -> (its dataclass, one line of help, whether required fields are given by position)
COMMANDS: dict[str, tuple[type, str, bool]] = {
    "prepare": (config.PrepareConfig, "turn a corpus into fixed blocks of tokens", False),
    "inspect": (config.InspectConfig, "show the contents of a prepared folder", True),
    "tokenizer": (config.TokenizerConfig, "train a tokenizer on a corpus, or extend a pretrained one", False),
    "plan": (config.PlanConfig, "estimate memory, speed and time before training", True),
    "grow": (config.GrowConfig, "make a larger model, or one with another vocabulary, from a trained one", True),
    "train": (config.TrainConfig, "train a model", False),
    "consolidate": (config.ConsolidateConfig, "turn a checkpoint into a model folder", True),
    "evaluate": (config.EvaluateConfig, "measure perplexity and masked accuracy", True),
    "compare": (config.CompareConfig, "test which of two models is better", True),
    "report": (config.ReportConfig, "show runs as one HTML page", True),
    "fill": (config.FillConfig, "fill the mask in a text", True),
    "push": (config.PushConfig, "publish a model on the Hub", True),
    "replay": (config.ReplayConfig, "rebuild and show the batch of one step", True),
    "submit": (config.SubmitConfig, "submit a recipe to SLURM as a chain of jobs", True),
    "init": (config.InitConfig, "write recipes, configurations and SLURM scripts into a folder", True),
    "archs": (config.ArchsConfig, "show the architectures and what works for each", False),
    "bench": (config.BenchConfig, "benchmark against other tools", True),
    "doctor": (config.DoctorConfig, "check whether these machines are fit for training", False),
    "demo": (config.DemoConfig, "run the whole job on a sample corpus, in minutes", False),
    "completion": (config.CompletionConfig, "print a shell completion script", True),
}

# Option names of run_mlm.py, older transformers and other tools -> the option here.
OLD_NAMES = {
    "from": "use --weights",
    "max_seq_length": "use --block_size",
    "line_by_line": "dropped: documents are packed into blocks of block_size",
    "pad_to_max_length": "dropped: blocks are always full",
    "train_file": "use --dataset_name",
    "validation_file": "use --validation_split on a folder with train and validation files",
    "preprocessing_num_workers": "use --num_proc",
    "overwrite_cache": "dropped: a changed corpus, tokenizer or setting is noticed",
    "overwrite_output_dir": "choose another output_dir, or delete the old one",
    "use_fast_tokenizer": "dropped: the fast tokenizer is always used",
    "use_auth_token": "use --token",
    "streaming": "`cloze prepare` always streams; to keep nothing on the disk use --streaming_train of `cloze train`",
    "max_train_samples": "use a slice: --split 'train[:N]'",
    "max_eval_samples": "use a slice: --validation_split 'validation[:N]'",
    "low_cpu_mem_usage": "dropped",
    "torch_dtype": "use --bf16 or --fp16",
    "do_train": "dropped: `cloze train` trains",
    "do_eval": "use --eval_strategy, or `cloze evaluate`",
    "evaluation_strategy": "use --eval_strategy",
    "per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use --per_device_eval_batch_size",
    "no_cuda": "use --use_cpu",
    "auto_batch_size": "use --auto_find_batch_size",
    "warmup_ratio": "use --warmup_steps with a value below 1",
    "hub_always_push": "dropped: a push that comes too late is left out, and the next one has all",
    "local_rank": "start with `accelerate launch -m cloze train ...`",
    "logging_dir": "trackers write into output_dir",
}
