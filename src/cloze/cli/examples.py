"""Groups of options and examples for the help; a test parses the examples with the real parser."""

from __future__ import annotations

# The commands, as `cloze --help` shows them; one that is in no group comes last.
COMMAND_GROUPS = {
    "start here": ("demo",),
    "data": ("tokenizer", "prepare", "inspect"),
    "training": ("plan", "grow", "train", "replay"),
    "trained models": ("consolidate", "evaluate", "compare", "fill", "report", "push"),
    "machines": ("submit", "doctor", "bench", "archs"),
    "setup": ("init", "completion"),
}

# (the dataclass, its first option of a group) -> the group's name. A group ends where the next one begins.
GROUP_BEGINS = {
    ("TrainConfig", "dataset_name"): "data",
    ("TrainConfig", "output_dir"): "the run",
    ("TrainConfig", "mlm_probability"): "masking",
    ("TrainConfig", "per_device_train_batch_size"): "batch and length",
    ("TrainConfig", "learning_rate"): "optimization",
    ("TrainConfig", "freeze"): "trained parameters and seed",
    ("TrainConfig", "precision"): "speed and memory",
    ("TrainConfig", "deepspeed"): "processes",
    ("TrainConfig", "eval_strategy"): "evaluation and logging",
    ("TrainConfig", "save_strategy"): "checkpoints",
    ("TrainConfig", "on_nonfinite"): "failures and resuming",
    ("TrainConfig", "push_to_hub"): "the Hub",
    ("ModelConfig", "model_name_or_path"): "the model",
    ("BlocksConfig", "block_size"): "blocks",
    ("SourceConfig", "dataset_name"): "the corpus",
    ("MeasureConfig", "split"): "measurement",
    ("SubmitConfig", "recipe"): "the job",
    ("SubmitConfig", "partition"): "the cluster",
    ("SubmitConfig", "ds_config"): "training",
    ("SubmitConfig", "prepare_tasks"): "other jobs and options",
    ("PushConfig", "path"): "what to push, and where",
    ("PushConfig", "license"): "the card and the commit",
}

EXAMPLES = {
    "prepare": (
        "cloze prepare --dataset_name corpus.jsonl --text_field answers.text --tokenizer_name roberta-base "
        "--output prepared/mine",
        "cloze prepare --config launch/recipes/distilroberta-eli5.prepare.yaml --num_proc 8",
        "cloze prepare --preset eli5_category --tokenizer_name roberta-base --packing best_fit --block_size 512 "
        "--output prepared/eli5",
    ),
    "inspect": ("cloze inspect prepared/mine --verify",),
    "tokenizer": (
        "cloze tokenizer --dataset_name corpus.jsonl --text_field answers.text --vocab_size 8192 "
        "--output tokenizers/mine",
        "cloze tokenizer --dataset_name corpus.jsonl --extend roberta-base --new_tokens 1000 --output tokenizers/more",
    ),
    "plan": (
        "cloze plan launch/recipes/roberta-large.yaml --gpus 8xH100-80GB --nodes 2",
        "cloze plan launch/recipes/roberta-large.yaml --gpus A10G --train_flags '--max_steps 1000 --bf16' "
        "--write launch/mine",
    ),
    "grow": ("cloze grow runs/mine/model --tokenizer tokenizers/other --output models/grown",),
    "train": (
        "cloze train --dataset_name prepared/mine --output_dir runs/mine --model_name_or_path distilroberta-base "
        "--max_steps 1000 --eval_strategy steps --eval_steps 100",
        "accelerate launch --config_file launch/accelerate/zero2.yaml -m cloze train "
        "--config launch/recipes/distilroberta-eli5.yaml --learning_rate 1e-4",
        "cloze train --config launch/recipes/distilroberta-eli5.yaml --resume_from_checkpoint auto "
        "--report_to tensorboard,wandb",
        "cloze train --config launch/recipes/distilroberta-eli5.yaml --log_format json > run.jsonl",
    ),
    "consolidate": (
        "cloze consolidate runs/mine",
        "cloze consolidate runs/mine/checkpoint-500 --dtype bf16 --output models/mine",
    ),
    "evaluate": (
        "cloze evaluate runs/mine --draws 4",
        "cloze evaluate distilroberta-base --data prepared/mine",
        "cloze evaluate roberta-base --metric pll --sentences sentences.txt --output pll.json",
    ),
    "compare": ("cloze compare runs/mine/checkpoint-500 runs/mine",),
    "fill": ("cloze fill runs/mine 'The Milky Way is a <mask> galaxy.' --top_k 5",),
    "push": (
        "cloze push runs/mine --repo my-name/mine --dry_run",
        "cloze push runs/mine --repo my-name/mine --private --license apache-2.0 --language en",
    ),
    "replay": ("cloze replay runs/mine --step 12 --samples 2",),
    "submit": ("cloze submit launch/recipes/roberta-large.yaml --nodes 4 --gpus_per_node 8 --dry_run",),
    "archs": ("cloze archs", "cloze archs --model_type modernbert"),
    "bench": ("cloze bench train --rounds 20", "cloze bench prepare --megabytes 200"),
    "doctor": ("cloze doctor --output_dir runs", "srun cloze doctor --output_dir /shared/runs"),
    "demo": ("cloze demo --output_dir runs/demo",),
    "init": ("cloze init my-project",),
    "report": (
        "cloze report runs/mine",
        "cloze report runs/mine runs/other --output report.html --prompts prompts.txt",
    ),
    "completion": (
        "cloze completion bash > ~/.local/share/bash-completion/completions/cloze",
        "cloze completion zsh > ~/.zfunc/_cloze",
        "cloze completion fish > ~/.config/fish/completions/cloze.fish",
    ),
}
