"""Read a masked language model from a checkpoint of transformers' Trainer, accelerate, DeepSpeed or torch.

    find_zero_files(Path("runs/old/checkpoint-500"))      # Trainer: latest + global_step500/
    find_zero_files(Path("state"))                        # accelerate's save_state: state/pytorch_model/
    find_zero_files(Path("checkpoints"))                  # engine.save_checkpoint: latest + its tag
    find_dcp_files(Path("runs/old/checkpoint-500"))       # FSDP, by Trainer or accelerate: pytorch_model_fsdp_0/
    find_dcp_files(Path("state"))                         # torch.distributed.checkpoint.save: .metadata
    source = foreign_source(folder, config_name, tokenizer_name)

Neither DeepSpeed nor a process group is needed. Names, shapes and ties of tensors are those of the model that the
configuration makes, without memory for its weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedTokenizerBase

from cloze.checkpoint.format import MANIFEST, list_checkpoints
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.token_ids import vocabulary_size
from cloze.errors import CheckpointError, ConfigError, ModelError
from cloze.export.consolidation.dcpfiles import Chunked, DcpFiles, holds_metadata
from cloze.export.consolidation.stored import Source, Stored, chunks
from cloze.export.consolidation.zerofiles import Placed, ZeroFiles, holds_files, verify_files
from cloze.utils.closeness import largest, within
from cloze.utils.foreign.paths import is_plain_name, printable, read_text
from cloze.utils.foreign.pretrained import from_config, from_pretrained
from cloze.utils.foreign.safetensors_header import open_tensors

# How far a weight in half precision is from the fp32 one it was rounded from, relative to it (and below the smallest
# normal number, absolutely).
_ROUNDING = {torch.float32: (0.0, 0.0), torch.bfloat16: (2.0**-8, 2.0**-133), torch.float16: (2.0**-11, 2.0**-25)}


Files = ZeroFiles | DcpFiles
MAX_TAG_BYTES = 4096


def find_zero_files(path: Path) -> Path | None:
    """Return the folder with DeepSpeed's files for `path`, None without one. Raises CheckpointError if `latest` names
    a folder that is missing."""
    if not path.is_dir() or (path / MANIFEST).is_file():
        return None
    if holds_files(path):
        return path
    latest = path / "latest"
    if latest.is_file():
        tag = read_text(latest, MAX_TAG_BYTES, error=CheckpointError).strip()
        if not is_plain_name(tag) or not holds_files(path / tag):
            raise CheckpointError(
                f"it names {printable(tag)}, and no DeepSpeed checkpoint is there",
                where=latest,
                hint="give the folder that holds the *_states.pt files",
            )
        return path / tag
    if holds_files(path / "pytorch_model"):
        return path / "pytorch_model"
    newest = list_checkpoints(path)[-1:]
    return find_zero_files(newest[0]) if newest else None


def find_dcp_files(path: Path) -> Path | None:
    """Return the folder with torch.distributed.checkpoint's files of a model for `path`; None without one."""
    if not path.is_dir() or (path / MANIFEST).is_file():
        return None
    if holds_metadata(path):
        return path
    if holds_metadata(path / "pytorch_model_fsdp_0"):
        return path / "pytorch_model_fsdp_0"
    newest = list_checkpoints(path)[-1:]
    return find_dcp_files(newest[0]) if newest else None


def foreign_source(folder: Path, given: Path, config_name: str | None, tokenizer_name: str | None) -> Source:
    """Return the model in DeepSpeed's or DCP's files in `folder`; `given`: the folder that the user named.

    Configuration and tokenizer are those named, else those in the folder where Trainer saves them. Raises ConfigError,
    ModelError or CheckpointError before writing.
    """
    beside = next((p for p in (folder.parent, given) if (p / "config.json").is_file()), None)
    name = config_name or (str(beside) if beside else None)
    if name is None:
        raise ConfigError(
            "this checkpoint has no config.json", where=given, hint="give --config_name: a model or a folder"
        )
    config, tokenizer = from_pretrained(AutoConfig, name), _tokenizer(tokenizer_name, [beside, name])
    _check_vocabulary(config, tokenizer)
    files = _opened(folder)
    shapes, tied, class_name = expected_tensors(config)
    config.architectures = [class_name]
    tensors = _assign(files, shapes, tied, name)

    def save_model_files(output: Path) -> None:
        config.save_pretrained(output)
        tokenizer.save_pretrained(output)

    return Source(tensors, save_model_files, partial(_check, files, {t.name: t for t in tensors}))


def _opened(folder: Path) -> Files:
    if holds_metadata(folder):
        files = DcpFiles(folder)
        files.verify()
        return files
    verify_files(folder)
    return ZeroFiles(folder)


def expected_tensors(config: PretrainedConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, str], str]:
    """Return name and shape of every tensor in the model's files; name -> name of tied tensors; the model's class."""
    try:
        with torch.device("meta"):
            model = from_config(AutoModelForMaskedLM, config, dtype=torch.float32)
    except ModelError as error:
        raise ModelError(
            f"no masked language model can be made from its configuration: {error.what}",
            where=error.where,
            hint="give another one with --config_name",
        ) from None
    tied = dict(model.all_tied_weights_keys or {})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return shapes, tied, type(model).__name__


def _tokenizer(given: str | None, others: list[Path | str | None]) -> PreTrainedTokenizerBase:
    if given is not None and not _is_bare(given):
        return load_tokenizer(given)
    for name in others:
        if given is None and name is not None and not _is_bare(name):
            return load_tokenizer(str(name))
    raise ConfigError(
        "there is no tokenizer", where=given or "--tokenizer_name", hint="give --tokenizer_name: a model or a folder"
    )


def _check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    size = vocabulary_size(tokenizer)
    if isinstance(vocab_size, int) and size > vocab_size:
        raise ModelError(
            f"the tokenizer has {size} tokens, but the model has embeddings for {vocab_size}",
            where=tokenizer.name_or_path,
            hint="give the tokenizer the model was trained with (--tokenizer_name)",
        )


def _is_bare(name: Path | str) -> bool:
    """Return whether it is a folder without a tokenizer, from which transformers 5 makes one with no vocabulary."""
    return Path(name).is_dir() and not any(
        path.name.startswith(("tokenizer", "vocab", "sentencepiece", "spiece")) for path in Path(name).iterdir()
    )


def _assign(
    files: Files, shapes: Mapping[str, tuple[int, ...]], tied: Mapping[str, str], config_name: str
) -> list[Stored]:
    """Return for every tensor of the model the one in the files: under its own name, the name of a tied one, or the
    one that the files say it shares."""
    there: dict[str, Placed | Chunked] = {**files.trained, **files.frozen}
    dtypes = {name: placed.dtype for name, placed in there.items()}
    for name in files.buffers:
        tensor = files.module[name]
        there[name], dtypes[name] = Placed(tuple(tensor.shape), []), tensor.dtype
    used: set[str] = set()
    stored = []
    for name, shape in shapes.items():
        same = [name, *(alias for alias, kept in tied.items() if kept == name)]
        found = [one for one in [*same, *(files.aliases.get(n, "") for n in same)] if one in there]
        if not found:
            raise CheckpointError(f"{name} is not there", where=files.folder, hint=_wrong_config(config_name))
        for other in dict.fromkeys(found):
            if there[other].shape != shape:
                raise CheckpointError(
                    f"{other} has shape {there[other].shape}, but {shape} by the configuration",
                    where=files.folder,
                    hint=_wrong_config(config_name),
                )
        used |= set(found)
        own = [_stored(files, there, dtypes, other, name) for other in dict.fromkeys(found)]
        if len(own) > 1 and len({one.content_sum(torch.float32) for one in own}) > 1:
            raise ConfigError(
                f"the configuration ties {found[0]} to {found[1]}, but they were trained apart",
                where=files.folder,
                hint="give --config_name a folder whose config.json says tie_word_embeddings: false",
            )
        stored.append(own[0])
    left = sorted(there.keys() - used)
    if left:
        raise CheckpointError(
            f"{left[0]} is no part of the model", where=files.folder, hint=_wrong_config(config_name)
        )
    return stored


def _wrong_config(name: str) -> str:
    return f"is {name} (--config_name) the configuration of the model that was trained?"


def _stored(
    files: Files, there: dict[str, Placed | Chunked], dtypes: dict[str, torch.dtype], source: str, name: str
) -> Stored:
    dtype = torch.float32 if dtypes[source].is_floating_point else dtypes[source]
    pieces = partial(_pieces, files, there, source, dtype)
    return Stored(name, there[source].shape, dtype, pieces, files.folder)


def _pieces(
    files: Files, there: dict[str, Placed | Chunked], name: str, dtype: torch.dtype
) -> Iterator[tuple[int, torch.Tensor]]:
    if name in files.buffers:
        yield 0, files.module[name].reshape(-1).to(dtype)
    else:
        for offset, piece in there[name].pieces():
            yield offset, piece.to(dtype)


def _check(files: Files, tensors: dict[str, Stored], model: torch.nn.Module) -> str:
    """Compare the loaded model with the copy of its weights that the training engine computed with, if the checkpoint
    has one; return what was compared. Raises CheckpointError if they differ by more than rounding."""
    copies = files.module if files.stage in (1, 2) else _beside(files.folder)
    where = files.model_file.name if isinstance(files, ZeroFiles) and files.stage in (1, 2) else "model.safetensors"
    if files.stage == 0:
        kind = str(next(iter(files.module.values())).dtype).removeprefix("torch.")
        return f"the engine's own {kind} weights were taken, for ZeRO-0 keeps no others under their names"
    largest, compared, kinds = 0.0, 0, set()
    for name, parameter in model.state_dict().items():
        copy = copies.get(name)
        if copy is None or copy.shape != parameter.shape or not copy.is_floating_point():
            continue
        difference = _difference(parameter, copy)
        if not within(difference, 1.0):
            raise CheckpointError(
                f"{name} in fp32 is not what the engine computed with ({where}): off by {difference:.1f} times what "
                f"rounding to {copy.dtype} explains",
                where=files.folder,
                hint="its files are not of one moment of training, or it was written by an engine that is not known",
            )
        largest, compared = max(largest, difference), compared + 1
        kinds.add(str(copy.dtype).removeprefix("torch."))
    if not compared:
        return "this checkpoint has no second copy of the weights to compare with"
    return f"{compared} tensors are the engine's own of {where} ({', '.join(sorted(kinds))}), to its rounding"


def _difference(written: torch.Tensor, copy: torch.Tensor) -> float:
    """Return the largest |written - copy| in units of what rounding to the types of both explains.

    At most 1 if nothing is wrong, NaN if a value is not finite.
    """
    relative, absolute = (sum(bounds) for bounds in zip(_ROUNDING[written.dtype], _ROUNDING[copy.dtype], strict=True))
    worst = []
    one, other = written.detach().reshape(-1), copy.reshape(-1)
    for offset, length in chunks(one.numel()):
        a, b = one[offset : offset + length].float(), other[offset : offset + length].float()
        excess = (a - b).abs_()
        if relative == 0.0:
            worst.append(float(excess.max()) * math.inf if bool(excess.any()) else 0.0)
        else:
            worst.append(float((excess / (b.abs() * relative + absolute)).max()))
    return largest(worst)


def _beside(folder: Path) -> dict[str, Any]:
    """Return the weights that Trainer may have gathered next to a stage-3 checkpoint, mapped; {} without any."""
    found: dict[str, Any] = {}
    for file in sorted(folder.parent.glob("model*.safetensors")):
        with open_tensors(file) as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found
