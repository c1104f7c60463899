"""The one place that loads weights of `from_pretrained`: nothing that is not in the files is used without a word.

    model = load_weights("runs/mine/model")                          # ModelError if it lacks a weight, its head too
    model = load_weights("bert-base", may_lack_head=True)            # to be trained: says which weights are new
    model = load_weights(folder, exact=True, dtype="auto")           # no weight missing, none left over

transformers draws missing weights at random, and leaves out stored ones that have no place, with a table in its log. A
model saved by `AutoModel.save_pretrained` has no head: it would answer with another random one each time.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, PreTrainedModel
from transformers.utils import cached_file

from cloze.errors import ModelError
from cloze.model.overrides import check_reads_both_ways
from cloze.utils.foreign.folders import foreign_owner
from cloze.utils.foreign.paths import printable
from cloze.utils.foreign.pretrained import CONFIG, from_pretrained
from cloze.utils.foreign.safetensors_header import read_header
from cloze.utils.terminal.console import warn

# Parts that masked language modelling does not use: a model may lack them, or have them in addition.
_UNUSED = re.compile(r"(^|\.)(pooler|contact_head|seq_relationship|sop_classifier)\.|position_ids$|\.inv_freq$")
_SHOWN = 3  # names in a message


def load_weights(
    name: str | Path, may_lack_head: bool = False, exact: bool = False, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a masked language model from a folder or Hub name; `options` are those of `from_pretrained`.

    `may_lack_head`: warn of weights outside of the backbone that are drawn at random, in place of an error. `exact`:
    stored weights that have no place in the model are an error too. Raises ModelError.
    """
    refuse_adapter(name)
    try:
        with _without_report():
            model, report = from_pretrained(
                AutoModelForMaskedLM,
                name,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **options,
            )
    except ModelError as error:
        raise _shape_error(name) if "ignore_mismatched_sizes" in error.what else error from None
    check_reads_both_ways(model.config, name)
    _check_types(model, _folder(name, options), report["unexpected_keys"])
    if exact:
        _check_exact(name, report)
    _check_missing(model, name, report["missing_keys"], may_lack_head)
    _check_left_over(model, name, report["unexpected_keys"])
    return model


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers' table of missing and unexpected weights out of the output: they are reported here."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_error)  # another level would make transformers check, and warn of, tensor parallelism
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def refuse_adapter(folder: str | Path) -> None:
    """Raise ModelError for a folder with an adapter of PEFT: transformers would load the model that it names."""
    owner = foreign_owner(Path(folder)) if (Path(folder) / "adapter_config.json").is_file() else None
    if owner is not None:
        raise ModelError(f"this is {owner.what}", where=folder, hint=owner.hint)


def _check_types(model: Any, folder: Path | None, left_out: Collection[str]) -> None:
    """Raise ModelError if a folder holds integers or complex numbers for a weight that is a floating-point number in
    the model: they are quantized without the scales that they need, and would be taken as they are."""
    whole = {key.rpartition(".")[2] for key, one in _tensors(model) if not one.is_floating_point()}
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else []:
        for key, one in read_header(file, error=ModelError).items():
            if "F" not in one.dtype and key not in left_out and key.rpartition(".")[2] not in whole:
                what = f"{printable(key)} holds {one.dtype} numbers, and the model needs floating-point numbers"
                raise ModelError(what, where=file, hint="give the weights that were not quantized")


def _folder(name: str | Path, options: dict[str, Any]) -> Path | None:
    """Return the folder that weights were loaded from: for a name on the Hub that of its cache, None if unknown."""
    if Path(name).is_dir():
        return Path(name)
    hub = {key: options[key] for key in ("revision", "cache_dir") if options.get(key) is not None}
    file = cached_file(str(name), CONFIG, local_files_only=True, _raise_exceptions_for_missing_entries=False, **hub)
    return None if file is None else Path(file).parent


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _check_missing(model: Any, name: str | Path, missing: Collection[str], may_lack_head: bool) -> None:
    """Raise ModelError, or warn, if parameters were not in the files and are random now."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = sorted(key for key in missing if key in parameters and not _UNUSED.search(key))
    if not missing:
        return
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    backbone = [key for key in parameters if key.startswith(prefix) and not _UNUSED.search(key)]
    layers = [key for key in missing if key.startswith(prefix) and any(_layer(key, model))]
    if layers or set(backbone) <= set(missing):
        raise ModelError(
            f"its files have no {_listed(layers or missing)}, which its config.json asks for",
            where=name,
            hint="the folder is not whole, or its weights are of another model; to add layers use `cloze grow`",
        )
    if not may_lack_head:
        raise ModelError(
            f"it has no {_listed(missing)}: it was saved without its head for masked language modelling",
            where=name,
            hint=f"a random head would answer in its place; train one with `cloze train --model_name_or_path {name}`",
        )
    warn(f"{name}: it has no {_listed(missing)}: these weights begin at random, and are trained with the others")


def _check_left_over(model: Any, name: str | Path, unexpected: Collection[str]) -> None:
    """Raise ModelError if stored layers have no place in the model; warn of other weights without one."""
    left = sorted(key for key in unexpected if not _UNUSED.search(key))
    layers = [key for key in left if any(_layer(key, model))]
    if layers:
        raise ModelError(
            f"its files have {_listed(layers)}, and its config.json describes fewer layers",
            where=name,
            hint="correct config.json, or make a smaller model of it with `cloze grow`",
        )
    if left:
        warn(f"{name}: {_listed(left)} have no place in {type(model).__name__}, and are left out")


def _layer(key: str, model: Any) -> list[int]:
    """Return the number that a weight's name has in each of the model's lists of layers."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    inside = f"{model.base_model_prefix}."
    found = [re.search(rf"(^|\.){re.escape(each.removeprefix(inside))}\.(\d+)\.", key) for each in lists]
    return [int(match.group(2)) + 1 for match in found if match]


def _check_exact(name: str | Path, report: dict[str, Any]) -> None:
    """Raise ModelError unless the files hold exactly the model's weights."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ModelError(
                f"{kind.replace('_', ' ')}: {', '.join(map(str, sorted(report[kind])))}",
                where=name,
                hint="the folder is not whole: consolidate again",
            )


def _listed(names: Collection[str]) -> str:
    """Return the first names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shape_error(name: str | Path) -> ModelError:
    return ModelError(
        "its weights have other shapes than its config.json says",
        where=name,
        hint="give the config.json that these weights were saved with",
    )
