"""Publish a model folder on the Hugging Face Hub.

Only the files of a model go up (config, safetensors, tokenizer, card), never checkpoints, logs or pickles. The token
and its rights are checked before anything is uploaded, and a busy Hub is asked again.

    url = push_folder(Path("runs/demo/model"), "owner/name", private=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from cloze.console import warn
from cloze.errors import ConfigError, HubError

T = TypeVar("T")
_HTTP_ERRORS = HfHubHTTPError.__bases__  # OSError and the HTTP library's own: no connection, time-outs
MODEL_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "README.md",
)
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0)


def find_model(path: Path) -> tuple[Path, Path | None]:
    """(model folder, run folder or None) of a run's folder or a model folder. Raises ConfigError or HubError."""
    if not path.is_dir():
        raise ConfigError("no such folder", where=path, hint="give a run's folder or a consolidated model folder")
    if (path / "model" / "config.json").is_file():
        return path / "model", path
    if (path / "config.yaml").is_file() or (path / "checkpoint.json").is_file():
        raise ConfigError("there is no model here yet", where=path, hint=f"run `cloze consolidate {path}` first")
    if not (path / "config.json").is_file():
        raise ConfigError("not a model folder: there is no config.json", where=path)
    return path, path.parent if (path.parent / "config.yaml").is_file() else None


def files_to_push(model_dir: Path) -> list[Path]:
    """The files of a model folder that go up. Raises ConfigError where there are no safetensors weights."""
    files = sorted({file for pattern in MODEL_FILES for file in model_dir.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files):
        raise ConfigError("there are no safetensors weights", where=model_dir, hint="run `cloze consolidate` first")
    return files


def check_access(api: HfApi, repo: str) -> str:
    """The full `owner/name`, once the token is known to be good and allowed to write. Raises HubError."""
    try:
        who = _ask(api.whoami, repo)
    except LocalTokenNotFoundError:
        raise HubError("there is no Hub token", hint="run `hf auth login`, or give --token") from None
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(
            "the token can only read", where=repo, hint="make one with the scope `write` in the Hub's settings"
        )
    return repo if "/" in repo else f"{who['name']}/{repo}"


def push_folder(
    model_dir: Path, repo: str, private: bool, revision: str | None, message: str, token: str | None
) -> str:
    """Upload a model folder in one commit and return its address.

    The repository and the branch are made where they are missing. Raises HubError, in one line, for everything the
    Hub refuses; 429 and 5xx answers are tried again with growing pauses first.
    """
    names = [file.name for file in files_to_push(model_dir)]
    api = HfApi(token=token)
    repo = check_access(api, repo)
    _ask(lambda: api.create_repo(repo, private=private, exist_ok=True), repo)
    if revision:
        _ask(lambda: api.create_branch(repo, branch=revision, exist_ok=True), repo)
    commit = _ask(
        lambda: api.upload_folder(
            repo_id=repo,
            folder_path=model_dir,
            allow_patterns=names,
            commit_message=message,
            revision=revision,
        ),
        repo,
    )
    return str(commit.commit_url)


def _ask(call: Callable[[], T], repo: str) -> T:
    """Call the Hub; ask again where it is busy; turn its refusals into one line."""
    for pause in (*RETRY_SECONDS, None):
        try:
            return call()
        except HFValidationError as error:
            raise HubError(str(error).splitlines()[0], where=repo, hint="a name is `name` or `owner/name`") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if pause is None or not (status == 429 or status >= 500):
                raise _refusal(status, repo) from None
            warn(f"the Hub answered {status}; trying again in {pause:.0f} s")
            time.sleep(pause)
        except LocalTokenNotFoundError:
            raise
        except _HTTP_ERRORS as error:
            if pause is None:
                raise HubError(
                    f"the Hub cannot be reached ({type(error).__name__})", where=repo, hint="is there a network?"
                ) from None
            time.sleep(pause)
    raise AssertionError("unreachable")


def _refusal(status: int, repo: str) -> HubError:
    meaning = {
        401: ("the token is not valid", "make a new one in the Hub's settings, then `hf auth login`"),
        403: ("the token may not write here", "it needs the scope `write` for this owner's repositories"),
        404: ("not found, or not visible with this token", "check the owner's name and the token's scopes"),
        412: ("somebody else pushed at the same time", "push again"),
        429: ("the Hub asks to slow down", "push again later"),
    }
    what, hint = meaning.get(status, (f"the Hub answered {status}", "push again later"))
    return HubError(f"{what} ({status})" if status in meaning else what, where=repo, hint=hint)
