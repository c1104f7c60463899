"""The metadata of a card for the Hub: the YAML between its `---` lines, from a run's files.

data = model_metadata("demo", read_run_files(Path("runs/demo")), mask="<mask>", info=CardInfo(license="mit"))
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from cloze.checkpoint.lineage import from_mapping
from cloze.data.corpus.formats import format_of
from cloze.data.corpus.unpack import COMPRESSIONS
from cloze.errors import HubError
from cloze.evaluation.metric_table import METRICS
from cloze.utils import run_files
from cloze.utils.foreign.card_yaml import metadata_names, with_names
from cloze.utils.foreign.json_yaml import read_mapping
from cloze.utils.foreign.lenient_read import interval_of, is_number, part

_METADATA = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class CardInfo:
    """Values from the user. `language`: codes separated by commas; `dataset`: where the blocks are published."""

    license: str | None = None
    language: str | None = None
    dataset: str | None = None

    def values(self) -> dict[str, Any]:
        """Return the fields of the metadata block that were given."""
        languages = [code.strip() for code in str(self.language or "").split(",") if code.strip()]
        return ({"license": self.license} if self.license else {}) | ({"language": languages} if languages else {})


def read_run_files(run_dir: Path | None) -> dict[str, dict[str, Any]]:
    """Return the mappings in a run's files by name; empty ones for missing files."""
    names = (run_files.CONFIG, run_files.DATA, run_files.SCORES, run_files.SESSIONS)
    return {name: read_mapping(run_dir / name) if run_dir else {} for name in names}


def base_and_dataset(run_dir: Path | None) -> tuple[str | None, str | None]:
    """Return the names on the Hub of the run's base model and of its dataset, each None without one."""
    files = read_run_files(run_dir)
    return hub_name(files[run_files.CONFIG].get("model_name_or_path")), origin_of(files[run_files.DATA])


def info_of_run(run_dir: Path | None, info: CardInfo) -> CardInfo:
    """Return `info`, completed by the run's own --license and --language."""
    config = read_run_files(run_dir)[run_files.CONFIG]
    return replace(
        info, license=info.license or config.get("license"), language=info.language or config.get("language")
    )


def origin_of(data: dict[str, Any]) -> str | None:
    """Return the Hub name of the dataset in the blocks' manifest; None for local files."""
    source = part(data, "source")
    return None if source.get("files") else hub_name(source.get("dataset_name"))


def model_metadata(
    name: str, config: dict[str, Any], data: dict[str, Any], scores: dict[str, Any], mask: str, info: CardInfo
) -> ModelCardData:
    """Return the metadata: library, task, widget, and if known base model, datasets, license, language, results."""
    source, dataset = part(data, "source"), origin_of(data)
    measured, local = dataset, last_part(source.get("dataset_name"))
    if on_other_data(scores, data):
        measured, local = None, last_part(scores.get("data"))
    known: dict[str, Any] = info.values()
    if base := hub_name(config.get("model_name_or_path")):
        known["base_model"] = base
    if datasets := [one for one in (dataset, info.dataset) if one]:
        known["datasets"] = datasets
    results = [
        EvalResult(
            task_type="fill-mask",
            task_name="Masked language modeling",
            dataset_type=measured or "text",
            dataset_name=measured or local or "local text",
            dataset_config=source.get("dataset_config_name") if measured else None,
            dataset_revision=source.get("revision") if measured else None,
            dataset_split=scores.get("split"),
            metric_type=metric.key,
            metric_name=metric.card,
            metric_value=scores[metric.key],
            metric_args=_measured_with(scores, metric.key),
        )
        for metric in METRICS
        if metric.card is not None and is_number(scores.get(metric.key))
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


def on_other_data(scores: dict[str, Any], data: dict[str, Any]) -> bool:
    """Return whether an evaluation is known to be on other blocks than those that the run was trained on."""
    measured, trained = scores.get("data_checksum"), data.get("checksum")
    return bool(measured and trained and measured != trained)


def _measured_with(scores: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """Return masks, weights and 95 % interval of a result, as far as they are known."""
    found = {key: scores[key] for key in ("mlm_probability", "seed", "draws") if is_number(scores.get(key))}
    if interval := interval_of(scores, kind):
        found["interval_95"] = interval
    if (lineage := from_mapping(scores)) is not None:
        found |= {"weights": str(lineage), "weights_checksum": lineage.weights}
    return found or None


def metadata_text(card: str) -> str:
    """Return the YAML at the top of a card; empty without any. Raises HubError if it is not a mapping."""
    found = _METADATA.match(card)
    if found is None:
        return ""
    try:
        metadata_names(found[1])
    except HubError as error:
        raise HubError(
            f"the metadata between the `---` lines is not YAML of names and values: {error.what}",
            where="README.md",
            hint="correct it, or delete the file, which is then made anew",
        ) from None
    return found[1]


def with_values(card: str, values: dict[str, Any]) -> str:
    """Return a card with some fields of its metadata set. Raises HubError if its metadata are not a mapping."""
    if not values or not (before := metadata_text(card)):
        return card
    return card.replace(before, with_names(before, values), 1)


def hub_name(name: Any) -> str | None:
    """Return `name` if it is one on the Hub; None for a path, and if in doubt (`demo/model`, an existing path)."""
    if not isinstance(name, str) or _is_data_file(Path(name)) or Path(name).exists():
        return None
    if re.fullmatch(r"model|checkpoint-\d+|LOCAL_MODEL", name.split("/")[-1]):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _is_data_file(path: Path) -> bool:
    return format_of(path) is not None or path.suffix.lower() in COMPRESSIONS


def last_part(name: Any) -> str | None:
    """Return the last part of a path; None if it is not text."""
    return Path(name).name if isinstance(name, str) else None
