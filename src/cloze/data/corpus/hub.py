"""Documents of a dataset on the Hugging Face Hub, streamed.

streams, description, splits = open_hub(config, "train")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from cloze.config import SourceConfig
from cloze.data.corpus.fields import Record
from cloze.errors import DataError
from cloze.utils.foreign.hub_cache import unreachable

Stream = Callable[[], Iterator[tuple[int, Record]]]
_FAILURES = (DatasetsError, HfHubHTTPError, HFValidationError, OSError, RuntimeError, ValueError)


def open_hub(config: SourceConfig, split: str) -> tuple[list[tuple[str, Stream]], dict[str, Any], list[str]]:
    """Return a named stream of records per file of the split, its description for the manifest, and the known names of
    the dataset's splits.

    Raises DataError if the dataset, its configuration or the split is not available.
    """
    builder = _builder(config)
    # A dataset whose card has no facts about its splits still groups its files by split.
    known = [str(name) for name in builder.info.splits or getattr(builder.config, "data_files", None) or {}]
    if known and split not in known:
        raise DataError(f"no split {split!r}", where=config.dataset_name, hint=f"the splits are: {', '.join(known)}")
    try:
        whole = builder.as_streaming_dataset(split=split)
    except _FAILURES as error:
        raise _hub_error(config, error) from None

    def stream(number: int) -> Iterator[tuple[int, Record]]:
        try:
            yield from enumerate(whole.shard(num_shards=whole.num_shards, index=number), 1)
        except _FAILURES as error:
            raise _hub_error(config, error) from None

    streams: list[tuple[str, Stream]] = [
        (f"{config.dataset_name} ({split}), file {number}", partial(stream, number))
        for number in range(whole.num_shards)
    ]
    description = {
        "dataset_name": config.dataset_name,
        "dataset_config_name": config.dataset_config_name or builder.config.name,
        "revision": builder.hash or config.dataset_revision,
    }
    return streams, description, known


def _builder(config: SourceConfig) -> Any:
    try:
        return datasets.load_dataset_builder(
            str(config.dataset_name),
            config.dataset_config_name,
            revision=config.dataset_revision,
            cache_dir=config.cache_dir,
            token=config.token,
        )
    except _FAILURES as error:
        raise _hub_error(config, error) from None


def _hub_error(config: SourceConfig, error: Exception) -> DataError:
    if offline := unreachable(error, config.cache_dir or str(datasets.config.HF_DATASETS_CACHE)):
        hint = f"{offline[1]}; a local file needs its extension"
        return DataError(f"cannot load the dataset ({offline[0]})", where=config.dataset_name, hint=hint)
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "script" in text.lower():
        hint = "datasets made by a script are no longer loaded; try --dataset_revision refs/convert/parquet"
    else:
        hint = "is it the name of a dataset on the Hub, and is the Hub reachable? A local file needs its extension"
    return DataError(f"cannot load the dataset ({text})", where=config.dataset_name, hint=hint)
