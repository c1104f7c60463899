"""The model card: README.md of a consolidated model, with metadata for the Hub and the run's loss curve.

It is built from a run's files (config.yaml, data.json, metrics.jsonl, sessions.json, eval.json), each of which may be
missing. It contains no paths, tokens or hosts. A card that the user wrote is kept.

    write_card(Path("runs/demo/model"), Path("runs/demo"))
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cloze.checkpoint.lineage import read_record, scores_of
from cloze.config.train import RUN_KEYS
from cloze.export.cards.curve import CURVE, loss_curve
from cloze.export.cards.markdown import class_name, fenced, in_table, quoted, sessions_of
from cloze.export.cards.metadata import (
    CardInfo,
    hub_name,
    info_of_run,
    last_part,
    model_metadata,
    read_run_files,
    with_values,
)
from cloze.export.cards.reproduce import BLOCK_FLAGS, commands
from cloze.export.cards.weights import evaluation_facts, number_in, read_lines, weights_facts
from cloze.utils import run_files
from cloze.utils.atomic_files import write_text
from cloze.utils.foreign.card_yaml import dump_yaml
from cloze.utils.foreign.json_yaml import read_mapping
from cloze.utils.foreign.lenient_read import is_number, part
from cloze.utils.foreign.paths import MAX_TEXT_BYTES, read_bytes
from cloze.utils.shareable import shareable_config
from cloze.utils.system import versions_of
from cloze.utils.terminal.console import duration
from cloze.utils.terminal.redact import redacted

MARKER = "<!-- made by cloze -->"
MODEL_NAMES = ("model_name_or_path", "config_name", "tokenizer_name")
# What the card says under "Training": what decides a run's numbers, its split, and its precision.
HYPERPARAMETERS = (
    *(key for key in RUN_KEYS if key not in (*MODEL_NAMES, "model_revision")),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "precision", "bf16", "fp16"),
)
LIBRARIES = ("cloze", "torch", "transformers", "accelerate", "deepspeed", "datasets")
LOCAL = "LOCAL_MODEL"
_SNIPPET_NAME = re.compile(r'pipeline\("fill-mask", "[^"\n]*"\)')
_NO_INFO = CardInfo()


def write_card(model_dir: Path, run_dir: Path | None, repo: str | None = None, info: CardInfo = _NO_INFO) -> Path:
    """Update `model_dir`/README.md and the curve in that folder, unless the card was written by hand.

    `repo`: the name on the Hub, None if unknown. Returns the card's path. Raises DiskError.
    """
    path = model_dir / "README.md"
    text = card_text(model_dir, run_dir, repo, info)
    if not path.exists() or _text(path) != text:
        write_text(path, text)
    curve = loss_curve(read_lines(run_dir, read_record(model_dir)))
    if curve and f"]({CURVE})" in text:
        write_text(model_dir / CURVE, curve)
    return path


def card_text(model_dir: Path, run_dir: Path | None, repo: str | None = None, info: CardInfo = _NO_INFO) -> str:
    """Return the text for README.md: the one written by hand, else a generated card.

    An earlier generated card is replaced only if the run's folder is available, whose values it contains.
    """
    path = model_dir / "README.md"
    if not path.exists():
        return render_card(model_dir, run_dir, repo, info)
    text = _text(path)
    if MARKER not in text:
        return text
    if run_dir is not None:
        return render_card(model_dir, run_dir, repo, info)
    text = _SNIPPET_NAME.sub(f'pipeline("fill-mask", "{repo}")', text) if repo else text
    return with_values(text, info.values())


def render_card(model_dir: Path, run_dir: Path | None, repo: str | None = None, info: CardInfo = _NO_INFO) -> str:
    """Return the text of a generated card, from the values that are known."""
    model_config = read_mapping(model_dir / "config.json")
    files = read_run_files(run_dir)
    config, data = _public_names(files[run_files.CONFIG]), files[run_files.DATA]
    lineage = read_record(model_dir)
    scores, _ = scores_of(lineage, files[run_files.SCORES])
    info = info_of_run(run_dir, info)
    sessions = sessions_of(files[run_files.SESSIONS])
    if lineage is not None and lineage.step:  # the run may have continued since
        sessions = [one for one in sessions if number_in(one, "first_step") < lineage.step]
    lines = read_lines(run_dir, lineage)
    mask = _mask_token(model_dir)
    name = repo.split("/")[-1] if repo else f"cloze-{class_name(model_config.get('model_type')) or 'model'}"
    metadata = model_metadata(name, config, data, scores, mask, info)
    architecture = class_name(model_config.get("architectures"))
    versions = sessions[-1].get("versions") if sessions else None
    sections = [
        f"---\n{dump_yaml(metadata.to_dict())}\n---\n{MARKER}",
        f"# {architecture or name}",
        "A masked language model: it fills in words that are left out. Trained with Cloze.",
        _usage(mask, repo or "owner/name"),
        _data_section(data, info.dataset),
        _table("Weights", "what", weights_facts(lineage)),
        _table("Evaluation", "on fixed masks", evaluation_facts(scores, data)),
        "## Loss\n\nNats per masked token.\n\n" + f"![Loss by optimizer step]({CURVE})" if loss_curve(lines) else "",
        _table("Training", "hyperparameter", {key: config.get(key) for key in HYPERPARAMETERS}),
        _effort_section(sessions, lines, data),
        _config_section(config, data),
        _table("Versions", "library", versions or versions_of(LIBRARIES)),
        _reproduce_section(commands(config, data, sessions, repo or f"owner/{name}", lineage)),
        _limits_section(data),
    ]
    return redacted("\n\n".join(section for section in sections if section)) + "\n"


def _public_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration in which models outside of the Hub have no name: it would be a path, or a part of one."""
    named = {name: config[name] for name in MODEL_NAMES if isinstance(config.get(name), str)}
    return config | {name: one if hub_name(one) else LOCAL for name, one in named.items()}


def _usage(mask: str, repo: str) -> str:
    example = quoted(f"The Milky Way is a {mask} galaxy.")
    lines = f'from transformers import pipeline\n\nfill = pipeline("fill-mask", "{repo}")\nfill({example})'
    return fenced(lines, "python")


def _data_section(data: dict[str, Any], published: str | None) -> str:
    source, train = part(data, "source"), part(part(data, "splits"), "train")
    name, tokenizer = source.get("dataset_name"), part(data, "tokenizer").get("name")
    rule = part(data, "split_rule")
    held_out = rule.get("validation") or rule.get("validation_percentage")
    facts = {
        "dataset": hub_name(name) or last_part(name),
        "configuration": source.get("dataset_config_name"),
        "revision": source.get("revision"),
        "split": source.get("split"),
        "text": source.get("text_field"),
        "held out for validation": f"{held_out} % of the documents, by a {rule['kind']}"
        if is_number(held_out) and rule.get("kind")
        else held_out,
        "tokenizer": hub_name(tokenizer) or last_part(tokenizer),
        "documents": train.get("documents"),
        "tokens": train.get("tokens"),
        "blocks": train.get("blocks"),
        "block size": data.get("block_size"),
        "packing": data.get("packing"),
        "the blocks themselves": published,
    }
    return _table("Training data", "what", facts)


def _effort_section(sessions: list[dict[str, Any]], lines: list[dict[str, Any]], data: dict[str, Any]) -> str:
    """Return the section on devices, time and speed of the run."""
    logged = [line for line in lines if is_number(line.get("seconds"))]
    seconds = sum(line["seconds"] for line in logged)
    rate = sum(
        line["seconds"] * line["tokens_per_second"] for line in logged if is_number(line.get("tokens_per_second"))
    )
    samples = next((line["samples_seen"] for line in reversed(lines) if is_number(line.get("samples_seen"))), None)
    last_step = next((line["step"] for line in reversed(lines) if is_number(line.get("step"))), None)
    size = data.get("block_size")
    facts: dict[str, Any] = {
        "steps": last_step,
        "blocks seen": samples,
        "tokens seen": samples * size if samples is not None and isinstance(size, int) else None,
        "time": duration(seconds) if seconds else None,
        "tokens per second": f"{rate / seconds:,.0f}" if seconds else None,
    }
    for session in sessions:
        first = int(number_in(session, "first_step"))
        where = f"computed on, from step {first + 1}" if len(sessions) > 1 else "computed on"
        devices = ", ".join(f"{count} x {device}" for device, count in part(session, "devices").items())
        ranks, hosts = session.get("ranks"), session.get("hosts")
        world = f"{ranks} rank{'s' * (ranks != 1)} on {hosts} host{'s' * (hosts != 1)}"
        facts[where] = f"{devices}; {world}, {session.get('engine')}, {session.get('precision')}"
    return _table("Effort", "what", facts)


def _config_section(config: dict[str, Any], data: dict[str, Any]) -> str:
    """Return config.yaml without the settings for making blocks, if the run used existing blocks."""
    shown = shareable_config(config)
    if not data.get("streamed"):
        shown = {name: value for name, value in shown.items() if name not in BLOCK_FLAGS or name == "dataset_name"}
    if not shown:
        return ""
    text = dump_yaml(shown)
    return f"<details>\n<summary>The whole configuration</summary>\n\n{fenced(text, 'yaml')}\n\n</details>"


def _reproduce_section(lines: list[str]) -> str:
    if not lines:
        return ""
    shown = "\n".join(lines)
    why = "The order of the data, the masks and dropout follow from the seed."
    return f"## The same again\n\n{why}\n\n{fenced(shown, 'sh')}"


def _limits_section(data: dict[str, Any]) -> str:
    size = data.get("block_size")
    length = f"It has seen blocks of {size} tokens, and knows nothing of longer texts. " if size else ""
    return (
        "## Limits\n\nIt fills in words; it does not write texts, follow instructions or check facts. It knows what "
        f"its training text says, including its mistakes and prejudices, and nothing else. {length}Perplexity can "
        "only be compared with models that use the same tokenizer, masks and text."
    )


def _table(title: str, column: str, values: dict[str, Any]) -> str:
    """Return a Markdown table of the known values; "" if no value is known."""
    cells = {in_table(name): in_table(value) for name, value in values.items() if value is not None}
    if not cells:
        return ""
    rows = "\n".join(f"| {name} | {cell} |" for name, cell in cells.items())
    return f"## {title}\n\n| {column} | value |\n|---|---|\n{rows}"


def _mask_token(model_dir: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_mapping(model_dir / name).get("mask_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return "<mask>"


def _text(path: Path) -> str:
    """Return a card's text; bytes that are not UTF-8 are kept."""
    return read_bytes(path, MAX_TEXT_BYTES).decode("utf-8", "surrogateescape")
