"""The files for the Hub: a model with its card, and checkpoints to resume from.

Only listed files are uploaded, never logs or pickles, and nothing specific to this machine: the uploaded
`checkpoint.json` has no paths and a new checksum. Each push is one commit, so a repository is always complete.

    model = model_to_publish(Path("runs/demo"))
    pushed = push_model(api, Target("owner/name"), Path(model.folder), message="Upload model")
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from cloze.checkpoint.format import MANIFEST, read_manifest, signed
from cloze.checkpoint.model_path import ModelPath, resolve_model_path
from cloze.errors import CheckpointError, ConfigError, HubError
from cloze.export.cards.curve import CURVE
from cloze.export.cards.metadata import CardInfo
from cloze.export.consolidation.replaceable import TOKENIZER_FILES
from cloze.export.hub.client import Pushed, Target, ask, commit
from cloze.utils.foreign.json_yaml import dump_json
from cloze.utils.foreign.paths import check_regular, open_regular
from cloze.utils.foreign.safetensors_header import INDEX, shard_names
from cloze.utils.shareable import basename_paths, shareable_config
from cloze.utils.terminal.redact import secret_in

MODEL_FILES = (
    "config.json",
    "model*.safetensors",
    INDEX,
    *TOKENIZER_FILES,
    "README.md",
    CURVE,
)
# Replaced in the repository: `from_pretrained` would prefer an old model.safetensors to new shards.
_OLD_WEIGHTS = re.compile(r"model\.safetensors|model\.safetensors\.index\.json|model-\d{5}-of-\d{5}\.safetensors")
_NUMBERS = (".safetensors", ".arrow")
_SEARCHED_AT_ONCE = 1 << 24


def model_to_publish(path: Path) -> ModelPath:
    """Return the consolidated model that a run's folder or a model folder stands for (see
    cloze.checkpoint.model_path).

    Raises ConfigError if it is no folder, ModelError if there is no model or RUN/model is not the run's newest.
    """
    if not path.is_dir():
        raise ConfigError("no such folder", where=path, hint="give a run's folder or a consolidated model folder")
    return resolve_model_path(str(path), consolidated=True)


def files_to_push(model_dir: Path) -> dict[str, Path]:
    """Return the files of a model folder to upload, by name. Raises ConfigError if weights are missing."""
    files = {
        file.name: check_regular(file, error=ConfigError)
        for pattern in MODEL_FILES
        for file in model_dir.glob(pattern)
    }
    if INDEX in files and "model.safetensors" not in files:
        missing = sorted(set(shard_names(files[INDEX], ConfigError).values()) - set(files))
        if missing:
            raise ConfigError(f"{missing[0]} is missing", where=model_dir, hint="run `cloze consolidate` again")
    elif "model.safetensors" not in files:
        raise ConfigError("it has no safetensors weights", where=model_dir, hint="run `cloze consolidate` first")
    return files


def push_model(
    api: HfApi, target: Target, model_dir: Path, message: str, checkpoints: Mapping[str, Path] | None = None
) -> Pushed:
    """Upload a model folder, and `checkpoints` (folder in the repository -> checkpoint), in one commit.

    Weights of an earlier push that this one does not replace are deleted, as are other files in those folders. Raises
    ConfigError, CheckpointError or HubError.
    """
    files: dict[str, Path | bytes] = dict(files_to_push(model_dir))
    folders = tuple(f"{folder}/" for folder in checkpoints or {})
    for folder, checkpoint in (checkpoints or {}).items():
        files |= {f"{folder}/{name}": content for name, content in checkpoint_files(checkpoint).items()}
    refuse_tokens(files)
    return commit(
        api, target, files, message, lambda name: bool(_OLD_WEIGHTS.fullmatch(name)) or name.startswith(folders)
    )


def checkpoint_files(folder: Path) -> dict[str, Path | bytes]:
    """Return the files of a checkpoint by name; checkpoint.json without values of this machine.

    A run can be resumed from them: see `cloze.checkpoint.identity.check_same_run`. Raises CheckpointError.
    """
    manifest = read_manifest(folder)
    manifest |= {"config": shareable_config(manifest["config"]), "run": basename_paths(manifest["run"])}
    files: dict[str, Path | bytes] = {
        name: check_regular(folder / name, folder=folder, error=CheckpointError) for name in manifest["files"]
    }
    files[MANIFEST] = (dump_json(signed(manifest), indent=2) + "\n").encode()
    return files


def refuse_tokens(files: Mapping[str, Path | bytes]) -> None:
    """Raise HubError if a file to be uploaded holds a token or a password, as a card written by hand may.
    Tensors and blocks are numbers, and not searched."""
    for name, content in files.items():
        if not name.endswith(_NUMBERS) and (kind := _secret_in(content)):
            raise HubError(f"holds what looks like {kind}", where=name, hint="take it out, and make a new one")


def _secret_in(content: Path | bytes) -> str | None:
    with io.BytesIO(content) if isinstance(content, bytes) else open_regular(content, error=HubError) as stream:
        before = b""
        while part := stream.read(_SEARCHED_AT_ONCE):
            if kind := secret_in(before + part):
                return kind
            before = part[-1024:]  # a token may span two parts
    return None


def with_license(api: HfApi, info: CardInfo, base: str | None, dataset: str | None) -> CardInfo:
    """Return `info`; without a license, with the one that the Hub has for the base model, else for the dataset."""
    for kind, name in (("model", base), ("dataset", dataset)):
        if info.license is None and name is not None:
            info = replace(info, license=_license_of(api, kind, name))
    return info


def _license_of(api: HfApi, kind: str, name: str) -> str | None:
    try:
        info: Any = ask(lambda: api.repo_info(name, repo_type=kind), name, ())
    except HubError:
        return None
    found = info.card_data.get("license") if info.card_data is not None else None
    return found if isinstance(found, str) else None
