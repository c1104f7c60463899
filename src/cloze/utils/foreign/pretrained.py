"""Models, configurations and tokenizers that transformers loads, from a folder or the Hub.

    from_pretrained(AutoConfig, "runs/x/model")
    from_pretrained(AutoModelForMaskedLM, name, trust_remote_code=True, dtype=torch.float32)
    from_config(AutoModelForMaskedLM, config)

transformers opens these files itself. So they are checked first: no links, no names of files elsewhere, sizes that a
model can have, and no code from the Hub as attention kernels unless the user named them. `trust_remote_code` is always
given: without it transformers asks on the terminal whether to run a stranger's code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cloze.errors import ClozeError, ModelError
from cloze.utils.foreign.hub_cache import is_unreachable, unreachable
from cloze.utils.foreign.json_yaml import read_json
from cloze.utils.foreign.model_size import check_number, limited_size
from cloze.utils.foreign.paths import check_regular, is_plain_name, printable, read_text
from cloze.utils.foreign.safetensors_header import INDEX, read_header, shard_names

MAX_TOKENIZER_BYTES = 1 << 30
CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?$")
_FILES_BY_NAME = ("transformers_weights", "configuration_files", "fast_tokenizer_files")
_FILES_BY_PATH = ("vocab_file", "merges_file", "spm_file", "tokenizer_file", "entity_vocab_file")
_MISSING = "does not appear to have a file named"  # of a repository that is there
_LOOK = "look at who made it, and do not use it unless you know why"


def from_pretrained(
    loader: Any,
    source: Path | str,
    *,
    trust_remote_code: bool = False,
    typed_attention: str | None = None,
    **options: Any,
) -> Any:
    """Return `loader.from_pretrained(source, ...)` (a class of transformers). Raises ModelError in one line.

    `typed_attention`: the attention that the user asked for, which a model made of a configuration will be given; what
    the configuration itself asks for is not kept then. A model takes it as `attn_implementation`.
    """
    try:
        stored = check_source(source, options, typed_attention or options.get("attn_implementation"))
        with limited_size(source, stored):
            found = loader.from_pretrained(str(source), trust_remote_code=trust_remote_code, **options)
        if typed_attention and hasattr(found, "_attn_implementation"):
            found._attn_implementation = None
        return found
    except Exception as error:  # any error of transformers on a file
        if is_memory(error):
            raise
        raise load_error(error, source, kind_of(loader)) from None


def read_tokenizer_file(file: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a tokenizer.json. Raises ModelError, or Exception of `tokenizers`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(read_text(file, MAX_TOKENIZER_BYTES, error=ModelError))


def from_config(loader: Any, config: Any, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Return `loader.from_config(config, ...)` (a class of transformers). Raises ModelError in one line."""
    name = getattr(config, "name_or_path", None) or config.model_type
    try:
        with limited_size(name):
            return loader.from_config(config, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # any error of transformers on a configuration
        if is_memory(error):
            raise
        raise load_error(error, name) from None


def is_memory(error: Exception) -> bool:
    """Return whether memory ran out. Callers report it, since no file is to blame."""
    is_torch = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    return isinstance(error, MemoryError) or is_torch


def check_source(source: Path | str, options: dict[str, Any], typed_attention: str | None = None) -> int | None:
    """Check the model files of a folder or a Hub repository before transformers reads them. Return the number of
    elements in a folder's weights; None if it holds no weights. Raises ModelError; OSError if the Hub has no such
    repository or cannot be reached."""
    if Path(source).is_dir():
        return check_folder(Path(source), typed_attention)
    if Path(source).exists():
        return None  # a single file, which transformers refuses
    from transformers.utils import cached_file

    names = ("revision", "cache_dir", "token", "local_files_only")
    hub = {name: options[name] for name in names if options.get(name) is not None}
    lost, found = None, False
    for name in (CONFIG, TOKENIZER_CONFIG):
        try:
            file = str(cached_file(str(source), name, **hub))
        except OSError as error:
            if is_unreachable(error):
                lost, hub = error, hub | {"local_files_only": True}  # each look-up without a connection takes long
            elif _MISSING not in str(error):
                raise
            continue
        found = True
        check_values(read_json(file, error=ModelError), source, typed_attention)
    if lost is not None and not found:
        raise lost
    return None


def check_folder(folder: Path, typed_attention: str | None = None) -> int | None:
    """Check a folder with a model or a tokenizer; return the elements of its weights, None without any. Raises
    ModelError for a link, an index that names files elsewhere,
    weights whose header does not fit, and values that `check_values` rejects."""
    stored: int | None = None
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and entry.is_dir():
            continue  # transformers reads no folders inside
        if not entry.is_dir():
            check_regular(entry, error=ModelError)
        if entry.name.endswith(".safetensors"):
            stored = (stored or 0) + sum(one.numel for one in read_header(entry, error=ModelError).values())
    for name in (CONFIG, TOKENIZER_CONFIG):
        if (folder / name).exists():
            check_values(read_json(folder / name, error=ModelError), folder / name, typed_attention)
    if (folder / INDEX).exists():
        shard_names(folder / INDEX, ModelError)
    return stored


def check_values(values: Any, where: Path | str, typed_attention: str | None = None, name: str = "") -> None:
    """Check the values of a configuration, also inside mappings and lists. Raises ModelError for sizes that no model
    has, names of files elsewhere, and attention kernels from the Hub (`typed_attention`: what the user asked for)."""
    if isinstance(values, dict):
        for key, value in values.items():
            if _IMPLEMENTATION.fullmatch(key) and not (typed_attention and "attn" in key):
                _check_implementation(value, where)
            elif key in _FILES_BY_NAME or key in _FILES_BY_PATH:
                _check_files(key, value, where)
            else:
                check_values(value, where, typed_attention, key)
    elif isinstance(values, list):
        for value in values:
            check_values(value, where, typed_attention, name)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        check_number(name, values, where)


def _check_implementation(value: Any, where: Path | str) -> None:
    for one in value.values() if isinstance(value, dict) else [value]:
        if isinstance(one, str) and "/" in one:
            raise ModelError(
                f"asks for attention code from the Hub, {printable(one)}",
                where=where,
                hint="give --attn_implementation sdpa, or that name if you trust its code",
            )


def _check_files(key: str, value: Any, where: Path | str) -> None:
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, str) or is_plain_name(one):
            continue
        if key in _FILES_BY_NAME or (Path(where).parent / one).exists():  # old paths of the maker's machine are common
            raise ModelError(f"{key} names a file outside its folder: {printable(one)}", where=where, hint=_LOOK)


def kind_of(loader: Any) -> str:
    """Return the kind of object that a class of transformers loads."""
    name = getattr(loader, "__name__", "")
    return "tokenizer" if "Tokenizer" in name else "configuration" if "Config" in name else "model"


def first_line(error: Exception) -> str:
    """Return an error in one line: its first line, and the next one if the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return printable(" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])


@contextmanager
def forward_errors(
    where: object, hint: str = "compare its config.json with the one it was trained with"
) -> Iterator[None]:
    """Turn the errors of a forward pass into a one-line ModelError: some mistakes in a configuration only show when
    the model reads text."""
    try:
        yield
    except Exception as error:  # transformers raises errors of many classes
        if isinstance(error, ClozeError) or is_memory(error) or type(error).__module__.startswith("torch.distributed"):
            raise
        what = f"the model cannot read a text ({type(error).__name__}: {first_line(error)})"
        raise ModelError(what, where=where, hint=hint) from error


def load_error(error: Exception, name: object, kind: str = "model") -> ClozeError:
    """Return one line for what loading raised. Raises the error itself if it is one of Cloze, or of a lost process."""
    if isinstance(error, ClozeError) or type(error).__module__.startswith("torch.distributed"):
        raise error
    if not Path(str(name)).exists() and (offline := unreachable(error)):
        return ModelError(f"cannot load the {kind} ({offline[0]})", where=name, hint=offline[1])
    text = first_line(error)
    text = f"it has no {text}" if isinstance(error, KeyError) else text
    if "trust_remote_code" in str(error):
        hint = "it comes with Python code of its own: read it, then give --trust_remote_code"
    elif "ttention" in text:
        hint = "choose another --attn_implementation, or leave it out"
    elif kind == "tokenizer":
        hint = "give a folder with tokenizer.json, or the name of a model on the Hub"
    elif "safetensors" in str(error):
        hint = "only safetensors weights are loaded, since other formats can run code; convert them first"
    else:
        hint = "give a folder made by save_pretrained or the name of a model on the Hub"
    return ModelError(f"cannot load the {kind} ({text})", where=name, hint=hint)
