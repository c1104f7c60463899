"""Publish a model folder on the Hugging Face Hub.

Only the files of a model go up (config, safetensors, tokenizer, card), never checkpoints, logs or pickles. The token
and its rights are checked before anything is uploaded, and a busy Hub is asked again.

    api = connect(token=None)
    repo = check_access(api, "name")                                     # "owner/name"
    url = push_folder(api, Path("runs/demo/model"), repo, private=True)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars

from cloze.console import warn
from cloze.errors import ConfigError, HubError

T = TypeVar("T")
INDEX = "model.safetensors.index.json"
MODEL_FILES = (
    "config.json",
    "model*.safetensors",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "entity_vocab.json",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "README.md",
)
# What a push replaces in the repository: `from_pretrained` would take an old model.safetensors before new shards.
OLD_WEIGHTS = ["model.safetensors", INDEX, f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors"]
RETRY_SECONDS = (1.0, 2.0, 4.0)
# No connection, time-outs: the HTTP library's own errors (which library it is depends on huggingface_hub's version).
_LOST: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)


def find_model(path: Path) -> tuple[Path, Path | None]:
    """(model folder, run folder or None) of a run's folder or a model folder. Raises ConfigError."""
    if not path.is_dir():
        raise ConfigError("no such folder", where=path, hint="give a run's folder or a consolidated model folder")
    if (path / "model" / "config.json").is_file():
        return path / "model", path
    is_run = (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file()
    if is_run or (path / "checkpoint.json").is_file() or any(path.glob("checkpoint-*/checkpoint.json")):
        raise ConfigError("there is no model here yet", where=path, hint=f"run `cloze consolidate {path}` first")
    if not (path / "config.json").is_file():
        raise ConfigError("not a model folder: there is no config.json", where=path)
    parent = path.resolve().parent
    return path, parent if (parent / "config.yaml").is_file() else None


def files_to_push(model_dir: Path) -> list[Path]:
    """The files of a model folder that go up. Raises ConfigError where the safetensors weights are not all there."""
    files = sorted({file for pattern in MODEL_FILES for file in model_dir.glob(pattern) if file.is_file()})
    names = {file.name for file in files}
    if INDEX in names and "model.safetensors" not in names:
        missing = sorted(_shards(model_dir / INDEX) - names)
        if missing:
            raise ConfigError(f"{missing[0]} is missing", where=model_dir, hint="run `cloze consolidate` again")
    elif "model.safetensors" not in names:
        raise ConfigError("there are no safetensors weights", where=model_dir, hint="run `cloze consolidate` first")
    return files


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError("not an index of weights", where=index, hint="run `cloze consolidate` again") from None


def connect(token: str | None) -> HfApi:
    """The client, with `token` or the one of `hf auth login`. Raises HubError where it cannot be a token.

    Its progress bars are for terminals only.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    token = (token or "").strip()
    if not (token.isascii() and token.isprintable()):
        raise HubError("not a token: it has characters that no token has", where="--token")
    return HfApi(token=token or None)


def check_access(api: HfApi, repo: str) -> str:
    """The full `owner/name`, once the token is known to be good and not to be read-only. Raises HubError."""
    try:
        who = _ask(api.whoami, repo, RETRY_SECONDS[:1])
    except LocalTokenNotFoundError:
        raise HubError("there is no Hub token", where=repo, hint="run `hf auth login`, or give --token") from None
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(
            "the token can only read; it lacks the scope `write`",
            where=repo,
            hint="make a token with it in the Hub's settings",
        )
    return repo if "/" in repo else f"{who['name']}/{repo}"


def push_folder(
    api: HfApi,
    model_dir: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload model",
) -> str:
    """Upload a model folder to `owner/name` in one commit and return the commit's address.

    The repository and the branch are made where they are missing; weights of an earlier push that this one does not
    replace are deleted. Raises HubError, in one line, for everything the Hub refuses; 429, 5xx and lost connections
    are tried again with growing pauses first.
    """
    names = [file.name for file in files_to_push(model_dir)]
    _ask(lambda: api.create_repo(repo, private=private or None, exist_ok=True), repo)
    if private and not _ask(lambda: api.model_info(repo), repo).private:
        raise HubError(
            "exists already and is public, so the model would not be private",
            where=repo,
            hint="make it private in its settings on the Hub, or push without --private",
        )
    if revision:
        _ask(lambda: api.create_branch(repo, branch=revision, exist_ok=True), repo)
    commit = _ask(
        lambda: api.upload_folder(
            repo_id=repo,
            folder_path=model_dir,
            allow_patterns=names,
            delete_patterns=OLD_WEIGHTS,
            commit_message=message,
            revision=revision,
        ),
        repo,
    )
    return str(commit.commit_url)


def _ask(call: Callable[[], T], repo: str, pauses: tuple[float, ...] = RETRY_SECONDS) -> T:
    """Call the Hub; ask again after each of `pauses` where it is busy; turn its refusals into one line."""
    for pause in (*pauses, None):
        try:
            return call()
        except LocalTokenNotFoundError:
            raise
        except OfflineModeIsEnabled:
            raise HubError("HF_HUB_OFFLINE is set, so the Hub is not asked", where=repo, hint="unset it") from None
        except HFValidationError as error:
            raise HubError(str(error).splitlines()[0], where=repo, hint="a name is `name` or `owner/name`") from None
        except json.JSONDecodeError:
            raise HubError(
                f"what answers at {constants.ENDPOINT} is not a Hub",
                where=repo,
                hint="check HF_ENDPOINT and the proxy",
            ) from None
        except ValueError as error:
            if "README.md" not in str(error):  # the Hub's verdict on the card's metadata
                raise
            raise HubError(str(error), where=repo) from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if pause is None or not (status == 429 or status >= 500):
                raise _refusal(status, repo, error.server_message) from None
            problem = f"the Hub answered {status}"
        except _LOST as error:
            if pause is None:
                raise HubError(
                    f"the Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__})",
                    where=repo,
                    hint="is there a network?",
                ) from None
            problem = f"no connection to the Hub ({type(error).__name__})"
        warn(f"{problem}; trying again in {pause:.0f} s")
        time.sleep(pause)
    raise AssertionError("unreachable")


def _refusal(status: int, repo: str, server_message: str | None) -> HubError:
    meaning = {
        401: ("the token is not valid", "make a new one in the Hub's settings, then `hf auth login`"),
        403: ("the token may not write here", "it needs the scope `write` for this owner's repositories"),
        404: ("not found, or not visible with this token", "check the owner's name and the token's scopes"),
        412: ("somebody else pushed at the same time", "push again"),
        429: ("the Hub asks to slow down", "push again later"),
    }
    if status in meaning:
        what, hint = meaning[status]
        return HubError(f"{what} ({status})", where=repo, hint=hint)
    said = f": {' '.join(server_message.split())[:200]}" if server_message else ""
    return HubError(f"the Hub answered {status}{said}", where=repo, hint="push again later" if status >= 500 else None)
