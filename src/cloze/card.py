"""The model card: README.md of a consolidated model, with the metadata the Hub reads.

Built from what a run leaves behind (config.yaml, data.json, eval.json), each of which may be missing. Only named
values get in, so no path, token or host name can. A card written by hand is kept.

    write_card(Path("runs/demo/model"), Path("runs/demo"))
"""

from __future__ import annotations

import json
import math
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from cloze.errors import HubError
from cloze.files import write_text

MARKER = "<!-- made by cloze -->"
HYPERPARAMETERS = (
    "model_type",
    "config_overrides",
    "mlm_probability",
    "mlm_probability_end",
    "mask_unit",
    "mask_replace_prob",
    "random_replace_prob",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "batch_size_warmup_steps",
    "batch_size_warmup_start",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "layerwise_lr_decay",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "precision",
    "bf16",
    "fp16",
    "seed",
)
LIBRARIES = ("cloze", "torch", "transformers", "accelerate", "deepspeed", "datasets")
METRICS = {"perplexity": "Perplexity (fixed masks)", "masked_accuracy": "Masked accuracy"}
_DATA_FILE = re.compile(r"\.(json|jsonl|parquet|arrow|csv|txt|gz|zst)$", re.IGNORECASE)
_METADATA = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)
_SNIPPET_NAME = re.compile(r'pipeline\("fill-mask", "[^"\n]*"\)')


def write_card(model_dir: Path, run_dir: Path | None, repo: str | None = None) -> Path:
    """Bring `model_dir`/README.md up to date, unless somebody wrote it by hand; return its path.

    `repo` is the name on the Hub where it is known. Raises DiskError.
    """
    path = model_dir / "README.md"
    text = card_text(model_dir, run_dir, repo)
    if not path.exists() or _text(path) != text:
        write_text(path, text)
    return path


def card_text(model_dir: Path, run_dir: Path | None, repo: str | None = None) -> str:
    """What README.md should hold: what was written by hand, else the card that Cloze makes.

    A card made earlier is made again only where the run's folder is at hand, for it holds what the run knew.
    """
    path = model_dir / "README.md"
    if not path.exists():
        return render_card(model_dir, run_dir, repo)
    text = _text(path)
    if MARKER not in text:
        return text
    if run_dir is not None:
        return render_card(model_dir, run_dir, repo)
    return _SNIPPET_NAME.sub(f'pipeline("fill-mask", "{repo}")', text) if repo else text


def metadata_text(card: str) -> str:
    """The YAML at the top of a card; empty where there is none. Raises HubError where it is not a mapping."""
    found = _METADATA.match(card)
    if found is None:
        return ""
    try:
        is_mapping = isinstance(yaml.safe_load(found[1]), dict)
    except yaml.YAMLError:
        is_mapping = False
    if not is_mapping:
        raise HubError("the metadata between the `---` lines is not YAML of names and values", where="README.md")
    return found[1]


def render_card(model_dir: Path, run_dir: Path | None, repo: str | None = None) -> str:
    """The text of a card that Cloze makes, from whatever is known."""
    model_config = _read(model_dir / "config.json")
    config, data, scores = (
        _read(run_dir / name) if run_dir else {} for name in ("config.yaml", "data.json", "eval.json")
    )
    mask = _mask_token(model_dir)
    name = repo.split("/")[-1] if repo else f"cloze-{model_config.get('model_type', 'model')}"
    metadata = card_data(name, config, data, scores, mask)
    architectures = model_config.get("architectures")
    sections = [
        f"---\n{metadata.to_yaml().strip()}\n---\n{MARKER}",
        f"# {architectures[0] if architectures else name}",
        "A masked language model: it fills in words that are left out. Trained with Cloze.",
        _usage(mask, repo or "owner/name"),
        _data_section(data),
        _evaluation_section(scores),
        _table("Training", "hyperparameter", {key: config.get(key) for key in HYPERPARAMETERS}),
        _table("Versions", "library", {name: _version(name) for name in LIBRARIES}),
        "## Limits\n\nIt knows what its training text says, including its mistakes and prejudices, and nothing else. "
        "Perplexity can only be compared with models that use the same tokenizer, masks and text.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def card_data(
    name: str, config: dict[str, Any], data: dict[str, Any], scores: dict[str, Any], mask: str
) -> ModelCardData:
    """The metadata block: library, task, widget, and where known base model, dataset and results."""
    source = _part(data, "source")
    dataset = None if source.get("files") else _hub_name(source.get("dataset_name"))
    known: dict[str, Any] = {}
    if base := _hub_name(config.get("model_name_or_path")):
        known["base_model"] = base
    if dataset:
        known["datasets"] = [dataset]
    masks = {key: scores[key] for key in ("mlm_probability", "seed") if _is_number(scores.get(key))}
    results = [
        EvalResult(
            task_type="fill-mask",
            task_name="Masked language modeling",
            dataset_type=dataset or "text",
            dataset_name=dataset or _last_part(source.get("dataset_name")) or "local text",
            dataset_split=scores.get("split"),
            metric_type=kind,
            metric_name=metric,
            metric_value=scores[kind],
            metric_args=masks or None,
        )
        for kind, metric in METRICS.items()
        if _is_number(scores.get(kind))
    ]
    if results:
        known |= {"model_name": name, "eval_results": results}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=["cloze", "fill-mask", "masked-lm"],
        widget=[{"text": f"The Milky Way is a {mask} galaxy."}],
        **known,
    )


def _usage(mask: str, repo: str) -> str:
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'fill = pipeline("fill-mask", "{repo}")\nfill("The Milky Way is a {mask} galaxy.")\n```'
    )


def _data_section(data: dict[str, Any]) -> str:
    source, train = _part(data, "source"), _part(_part(data, "splits"), "train")
    name, tokenizer = source.get("dataset_name"), _part(data, "tokenizer").get("name")
    facts = {
        "dataset": _hub_name(name) or _last_part(name),
        "configuration": source.get("dataset_config_name"),
        "revision": source.get("revision"),
        "split": source.get("split"),
        "text": source.get("text_field"),
        "tokenizer": _hub_name(tokenizer) or _last_part(tokenizer),
        "documents": train.get("documents"),
        "tokens": train.get("tokens"),
        "blocks": train.get("blocks"),
        "block size": data.get("block_size"),
    }
    return _table("Training data", "what", facts)


def _evaluation_section(scores: dict[str, Any]) -> str:
    keys = ("perplexity", "loss", "masked_accuracy", "masked_tokens", "blocks", "split", "mlm_probability", "seed")
    return _table("Evaluation", "on fixed masks", {key: scores.get(key) for key in keys})


def _table(title: str, column: str, values: dict[str, Any]) -> str:
    """A Markdown table of the values that are known; empty where none is."""
    cells = {
        name: " ".join(str(value).split()).replace("|", r"\|") for name, value in values.items() if value is not None
    }
    if not cells:
        return ""
    rows = "\n".join(f"| {name} | {cell} |" for name, cell in cells.items())
    return f"## {title}\n\n| {column} | value |\n|---|---|\n{rows}"


def _hub_name(name: Any) -> str | None:
    """`name` where it is one on the Hub; None for a path, and where in doubt (`demo/model`, something that exists)."""
    if not isinstance(name, str) or _DATA_FILE.search(name) or Path(name).exists():
        return None
    if re.fullmatch(r"model|checkpoint-\d+", name.split("/")[-1]):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _last_part(name: Any) -> str | None:
    return Path(name).name if isinstance(name, str) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _mask_token(model_dir: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read(model_dir / name).get("mask_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return "<mask>"


def _text(path: Path) -> str:
    """A card's text; bytes that are not UTF-8 are kept as they are."""
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def _part(values: dict[str, Any], key: str) -> dict[str, Any]:
    """A mapping inside a mapping; empty where there is none."""
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    """A JSON or YAML file's mapping; empty where there is no such file or it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
