"""The Hugging Face Hub: account and rights, and one commit at a time.

The token and its rights are checked before an upload. A busy Hub is asked again; a refusal becomes a one-line error.
cloze.export.hub.publish decides what is uploaded.

    api = connect(token=None)
    repo = check_access(api, Target("name"))                             # "owner/name"
    pushed = commit(api, Target(repo), {"config.json": path, "README.md": b"..."}, message="Upload model")
    pushed.changed, pushed.url
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from cloze.errors import HubError
from cloze.utils.terminal.console import warn

T = TypeVar("T")
RETRY_SECONDS = (1.0, 2.0, 4.0)
# No connection, time-outs: the HTTP library's own errors (which library it is depends on huggingface_hub's version).
_LOST: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Target:
    """Where to push to. `repo`: `name` or `owner/name`; `private`: True makes a new repository private, None uses the
    owner's default; `revision`: a branch, created if missing; `create_pr`: open a pull request."""

    repo: str
    kind: Literal["model", "dataset"] = "model"
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False


@dataclass(frozen=True)
class Pushed:
    """A commit's address, its hash, and whether it is new."""

    url: str
    oid: str
    changed: bool


class HubBusy(HubError):
    """The Hub is unavailable or unreachable; a retry may succeed."""


def connect(token: str | None, quiet: bool = False) -> HfApi:
    """Return the client, with `token` or that of `hf auth login`. Raises HubError if it cannot be a token.

    Progress bars are shown on terminals only; with `quiet` never.
    """
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    token = (token or "").strip()
    if not (token.isascii() and token.isprintable()):
        raise HubError("not a token: it has characters that none has", where="--token", hint="copy it anew")
    return HfApi(token=token or None)


def check_access(api: HfApi, target: Target) -> str:
    """Return the full `owner/name` after checking the token and its rights to push there.

    Changes nothing on the Hub. Raises HubError.
    """
    ask(lambda: validate_repo_id(target.repo), target.repo)
    try:
        who = ask(api.whoami, target.repo, RETRY_SECONDS[:1])
    except LocalTokenNotFoundError:
        hint = "run `hf auth login`, or give --token"
        raise HubError("there is no Hub token", where=target.repo, hint=hint) from None
    repo = target.repo if "/" in target.repo else f"{who['name']}/{target.repo}"
    missing = missing_right(who, repo, target)
    if missing is not None:
        hint = "make a token with it in the Hub's settings" if "scope" in missing else "check the owner's name"
        raise HubError(missing, where=repo, hint=hint)
    _check_privacy(api, repo, target)
    return repo


def missing_right(who: dict[str, Any], repo: str, target: Target) -> str | None:
    """Return which right for the push the token lacks by the Hub's answer to `whoami`; None if it lacks none.

    Fine-grained tokens list their permissions for each user, organization and repository; others have one role.
    """
    owner = repo.split("/")[0]
    token = who.get("auth", {}).get("accessToken") or {}
    role = token.get("role")
    if role == "read":
        return "the token can only read; it lacks the scope `write`"
    if role == "fineGrained":
        wanted = {"repo.write", "discussion.write"} if target.create_pr else {"repo.write"}
        facts = token.get("fineGrained") or {}
        scoped = [one for one in facts.get("scoped", []) if one.get("entity", {}).get("name") in (owner, repo)]
        held = set(facts.get("global", [])).union(*(one.get("permissions", []) for one in scoped))
        return None if held & wanted else f"the token lacks the scope `{min(wanted)}` for {owner}"
    if role is None or target.create_pr or owner == who["name"]:
        return None
    orgs = {org["name"]: org.get("roleInOrg") for org in who.get("orgs", [])}
    if owner not in orgs:
        return f"the token may not write there: {owner} is neither {who['name']} nor an organization of that account"
    return f"{who['name']} may only read in {owner}; it lacks the role `write`" if orgs[owner] == "read" else None


def _check_privacy(api: HfApi, repo: str, target: Target) -> None:
    """Raise HubError if a model that is to be private would be pushed to a public repository."""
    if not target.private:
        return
    try:
        found = ask(lambda: api.repo_info(repo, repo_type=target.kind), repo)
    except _Missing:
        return
    if not found.private:
        raise HubError(
            f"exists already and is public, so the {target.kind} would not be private",
            where=repo,
            hint="make it private in its settings on the Hub, or push without --private",
        )


def commit(
    api: HfApi,
    target: Target,
    files: Mapping[str, Path | bytes],
    message: str,
    outdated: Callable[[str], bool] = lambda name: False,
) -> Pushed:
    """Write `files` (name in the repository -> content) in one commit; create the repository if it is missing.

    Files there that are `outdated` and not among `files` are deleted in the same commit; without changes there is
    none. It is based on the state that was compared; after a concurrent commit the comparison is repeated. Raises
    HubError, in one line, for every refusal; 429, 5xx and lost connections are retried with growing pauses, then
    HubBusy.
    """
    repo, kind = target.repo, target.kind
    ask(lambda: api.create_repo(repo, repo_type=kind, private=target.private, exist_ok=True), repo)
    _check_privacy(api, repo, target)
    if target.revision:
        branch = target.revision
        ask(lambda: api.create_branch(repo, repo_type=kind, branch=branch, exist_ok=True), repo)
    own_pr = _open_pull_request(api, target, message) if target.create_pr else None

    def attempt() -> Pushed:
        found: Any = api.repo_info(repo, repo_type=kind, revision=own_pr or target.revision)
        held = [sibling.rfilename for sibling in found.siblings or []]
        made = api.create_commit(
            repo_id=repo,
            repo_type=kind,
            operations=[
                *(CommitOperationAdd(name, str(one) if isinstance(one, Path) else one) for name, one in files.items()),
                *(CommitOperationDelete(name) for name in held if name not in files and outdated(name)),
            ],
            commit_message=message,
            revision=own_pr or target.revision,
            create_pr=target.create_pr and own_pr is None,
            parent_commit=found.sha,
        )
        return Pushed(str(made.pr_url or made.commit_url), str(made.oid), made.oid != found.sha)

    return ask(attempt, repo)


def _open_pull_request(api: HfApi, target: Target, title: str) -> str | None:
    """Return the branch of this account's open pull request of that title, to avoid opening a second one."""
    name = ask(api.whoami, target.repo)["name"]
    found = ask(
        lambda: list(
            api.get_repo_discussions(
                target.repo,
                repo_type=target.kind,
                author=name,
                discussion_type="pull_request",
                discussion_status="open",
            )
        ),
        target.repo,
    )
    return next((one.git_reference for one in found if one.title == title and one.author == name), None)


def check_tag(api: HfApi, target: Target, tag: str) -> str | None:
    """Return the commit of a tag; None if there is no such tag or repository. Raises HubError."""
    try:
        refs = ask(lambda: api.list_repo_refs(target.repo, repo_type=target.kind), target.repo)
    except _Missing:
        return None
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


def put_tag(api: HfApi, target: Target, tag: str, oid: str) -> None:
    """Tag a commit. Raises HubError if the tag exists at another one."""
    there = check_tag(api, target, tag)
    if there is None:
        ask(
            lambda: api.create_tag(target.repo, repo_type=target.kind, tag=tag, revision=oid, exist_ok=True),
            target.repo,
        )
    elif there != oid:
        raise HubError(
            f"the tag {tag} belongs to another commit ({there[:8]}) and is not moved",
            where=target.repo,
            hint="choose another --tag",
        )


class _Missing(HubError):
    """The repository does not exist, or is hidden from this token."""


def ask(call: Callable[[], T], repo: str, pauses: tuple[float, ...] = RETRY_SECONDS) -> T:
    """Call the Hub; retry after each of `pauses` if it is busy; turn its refusals into one line."""
    left = list(pauses)
    while True:
        try:
            return call()
        except LocalTokenNotFoundError:
            raise
        except OfflineModeIsEnabled:
            raise HubError("HF_HUB_OFFLINE is set, so the Hub is not asked", where=repo, hint="unset it") from None
        except HFValidationError as error:
            raise HubError(str(error).splitlines()[0], where=repo, hint="a name is `name` or `owner/name`") from None
        except json.JSONDecodeError:
            hint = "check HF_ENDPOINT and the proxy"
            raise HubError(f"what answers at {constants.ENDPOINT} is not a Hub", where=repo, hint=hint) from None
        except ValueError as error:
            if "README.md" not in str(error):  # the Hub's verdict on the card's metadata
                raise
            raise HubError(str(error), where=repo, hint="mend the top of README.md") from None
        except HfHubHTTPError as error:
            if _without_xet(error):
                continue
            refusal = _refusal(error, repo)
            if not left or not isinstance(refusal, HubBusy):
                raise refusal from None
            problem = f"the Hub answered {error.response.status_code}"
        except _LOST as error:
            if _without_xet(error):
                continue
            if not left:
                raise HubBusy(
                    f"the Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__})",
                    where=repo,
                    hint="is there a network?",
                ) from None
            problem = f"no connection to the Hub ({type(error).__name__})"
        warn(f"{problem}; trying again in {left[0]:.0f} s")
        time.sleep(left.pop(0))


def _without_xet(error: Exception) -> bool:
    """Disable Xet if it caused the error: the Hub does not offer it, or a proxy blocks its storage.

    hf_xet raises ConnectionError for everything, a refused token included; the Hub's plain LFS upload then reports the
    cause, or works.
    """
    from_xet = type(error) is ConnectionError or "-xet-" in str(error) or "/xet-" in str(error)
    if not from_xet or constants.HF_HUB_DISABLE_XET:
        return False
    constants.HF_HUB_DISABLE_XET = True
    warn("the Hub's Xet storage cannot be used from here; uploading by LFS instead")
    return True


def _refusal(error: HfHubHTTPError, repo: str) -> HubError:
    status, said = error.response.status_code, error.server_message
    meaning = {
        401: ("the token is not valid", "make a new one in the Hub's settings, then `hf auth login`"),
        403: ("the token may not write here", "it needs the scope `write` for this owner's repositories"),
        404: ("not found, or not visible with this token", "check the owner's name and the token's scopes"),
        412: ("the repository was changed by another push at the same time", "push again"),
        429: ("the Hub asks to slow down", "push again later"),
    }
    kind = HubBusy if status in (412, 429) or status >= 500 else HubError
    if isinstance(error, RepositoryNotFoundError):
        kind = _Missing
    if status in meaning:
        what, hint = meaning[status]
        return kind(f"{what} ({status})", where=repo, hint=hint)
    details = f": {' '.join(said.split())[:200]}" if said else ""
    return kind(f"the Hub answered {status}{details}", where=repo, hint="push again later" if status >= 500 else None)
