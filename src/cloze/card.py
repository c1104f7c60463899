"""The model card: README.md of a consolidated model, with the metadata the Hub reads.

Built from what a run leaves behind (config.yaml, data.json, eval.json), each of which may be missing. Only named
values get in, so no path, token or host name can. A card written by hand is kept.

    write_card(Path("runs/demo/model"), Path("runs/demo"))
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from cloze.files import write_text

MARKER = "<!-- made by cloze -->"
HYPERPARAMETERS = (
    "model_type",
    "config_overrides",
    "mlm_probability",
    "mask_replace_prob",
    "random_replace_prob",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
)
LIBRARIES = ("cloze", "torch", "transformers", "accelerate", "deepspeed", "datasets")


def write_card(model_dir: Path, run_dir: Path | None) -> Path:
    """Write `model_dir`/README.md unless somebody wrote one by hand; return its path."""
    path = model_dir / "README.md"
    if not path.exists() or MARKER in path.read_text(encoding="utf-8"):
        write_text(path, render_card(model_dir, run_dir))
    return path


def render_card(model_dir: Path, run_dir: Path | None) -> str:
    """The card's text."""
    model_config = _read(model_dir / "config.json")
    config, data, scores = (
        _read(run_dir / name) if run_dir else {} for name in ("config.yaml", "data.json", "eval.json")
    )
    mask = _mask_token(model_dir)
    metadata = card_data(config, data, scores, mask)
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n{MARKER}",
        f"# {(model_config.get('architectures') or ['Masked language model'])[0]}",
        "A masked language model: it fills in words that are left out. Trained with Cloze.",
        _usage(mask),
        _data_section(data),
        _evaluation_section(scores),
        _table("Training", "hyperparameter", {k: config[k] for k in HYPERPARAMETERS if config.get(k) is not None}),
        _table("Versions", "library", {name: version(name) for name in LIBRARIES}),
        "## Limits\n\nIt knows what its training text says, including its mistakes and prejudices, and nothing else. "
        "Perplexity can only be compared with models that use the same tokenizer, masks and text.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def card_data(config: dict[str, Any], data: dict[str, Any], scores: dict[str, Any], mask: str) -> ModelCardData:
    """The metadata block: library, task, widget, and where known base model, dataset and results."""
    dataset = _hub_dataset(data)
    known: dict[str, Any] = {}
    base = config.get("model_name_or_path")
    if isinstance(base, str) and _is_hub_name(base):
        known["base_model"] = base
    if dataset:
        known["datasets"] = [dataset]
    results = [
        EvalResult(
            task_type="fill-mask",
            task_name="Masked language modeling",
            dataset_type=dataset or "text",
            dataset_name=dataset or data.get("source", {}).get("dataset_name") or "local text",
            dataset_split=scores.get("split"),
            metric_type=kind,
            metric_name=name,
            metric_value=scores[kind],
        )
        for kind, name in (("perplexity", "Perplexity (fixed masks)"), ("masked_accuracy", "Masked accuracy"))
        if scores.get(kind) is not None
    ]
    if results:
        known |= {"model_name": "masked language model", "eval_results": results}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["cloze", "fill-mask"],
        widget=[{"text": f"The Milky Way is a {mask} galaxy."}],
        **known,
    )


def _usage(mask: str) -> str:
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'fill = pipeline("fill-mask", "THIS_REPOSITORY")\nfill("The Milky Way is a {mask} galaxy.")\n```'
    )


def _data_section(data: dict[str, Any]) -> str:
    if not data:
        return ""
    source, train = data.get("source", {}), data.get("splits", {}).get("train", {})
    facts = {
        "dataset": source.get("dataset_name"),
        "revision": source.get("revision"),
        "split": source.get("split"),
        "text": source.get("text_field"),
        "tokenizer": data.get("tokenizer", {}).get("name"),
        "documents": train.get("documents"),
        "tokens": train.get("tokens"),
        "blocks": train.get("blocks"),
        "block size": data.get("block_size"),
    }
    return _table("Training data", "what", {k: v for k, v in facts.items() if v is not None})


def _evaluation_section(scores: dict[str, Any]) -> str:
    keys = ("perplexity", "loss", "masked_accuracy", "masked_tokens", "blocks", "split", "mlm_probability", "seed")
    return _table("Evaluation", "on fixed masks", {k: scores[k] for k in keys if scores.get(k) is not None})


def _table(title: str, column: str, values: dict[str, Any]) -> str:
    if not values:
        return ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
    return f"## {title}\n\n| {column} | value |\n|---|---|\n{rows}"


def _hub_dataset(data: dict[str, Any]) -> str | None:
    """The dataset's name on the Hub; None for local files."""
    source = data.get("source", {})
    name = source.get("dataset_name")
    return name if isinstance(name, str) and not source.get("files") and _is_hub_name(name) else None


def _is_hub_name(name: str) -> bool:
    return not Path(name).exists() and not name.startswith((".", "/", "~")) and name.count("/") <= 1


def _mask_token(model_dir: Path) -> str:
    token = _read(model_dir / "tokenizer_config.json").get("mask_token") or "<mask>"
    return token["content"] if isinstance(token, dict) else token


def _read(path: Path) -> dict[str, Any]:
    """A JSON or YAML file's mapping; empty where there is no such file or it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
