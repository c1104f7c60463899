"""Documents of a dataset on the Hugging Face Hub, streamed.

records, count, description = open_hub(config, "train")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from cloze.config import SourceConfig
from cloze.data.readers import Record
from cloze.errors import DataError

_FAILURES = (DatasetsError, HfHubHTTPError, HFValidationError, OSError, ValueError)


def open_hub(
    config: SourceConfig, split: str
) -> tuple[Callable[[], Iterator[Record]], Callable[[], int], dict[str, Any]]:
    """Records of a split, the number of them, and what the manifest says of the dataset.

    Raises DataError where the dataset, its configuration or the split cannot be had.
    """
    builder = _builder(config)
    known = list(builder.info.splits or {})
    if known and split not in known:
        raise DataError(f"no split {split!r}", where=config.dataset_name, hint=f"the splits are: {', '.join(known)}")

    def records() -> Iterator[Record]:
        try:
            yield from builder.as_streaming_dataset(split=split)
        except _FAILURES as error:
            raise _hub_error(config, error) from None

    def count() -> int:
        facts = (builder.info.splits or {}).get(split)
        return facts.num_examples if facts and facts.num_examples else sum(1 for _ in records())

    description = {
        "dataset_name": config.dataset_name,
        "dataset_config_name": config.dataset_config_name or builder.config.name,
        "revision": builder.hash or config.dataset_revision,
    }
    return records, count, description


def _builder(config: SourceConfig) -> Any:
    try:
        return datasets.load_dataset_builder(
            config.dataset_name,
            config.dataset_config_name,
            revision=config.dataset_revision,
            cache_dir=config.cache_dir,
            token=config.token,
        )
    except _FAILURES as error:
        raise _hub_error(config, error) from None


def _hub_error(config: SourceConfig, error: Exception) -> DataError:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "script" in text.lower():
        hint = "datasets made by a script are no longer loaded; try --dataset_revision refs/convert/parquet"
    else:
        hint = "is it the name of a dataset on the Hub, and is the Hub reachable? A local file needs its extension"
    return DataError(f"cannot load the dataset ({text})", where=config.dataset_name, hint=hint)
