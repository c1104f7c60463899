"""Secrets in text: the shapes of common tokens, and the values that this process was given.

    redacted("push with hf_abc...")             # "push with ***"
    secret_in("https://me:password@host/x")     # "a password in a URL"

Everything that is shown passes `redacted`. An option that is not meant for a secret refuses one, because options are
stored in run folders, checkpoints, trackers and cards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

MIN_CHARACTERS = 8  # of a value that is replaced wherever it occurs
_SHAPES = {
    "a Hugging Face token": r"\b(?:hf|api_org)_(?:oauth_)?[A-Za-z0-9]{20,}",
    "a GitHub token": r"\bgh[opusr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "an API key": r"\bsk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}|\bAIza[A-Za-z0-9_-]{35}",
    "a W&B key": r"\bwandb_v1_[A-Za-z0-9_]{20,}|(?i:wandb)[^\n]{0,40}?\b[0-9a-f]{40}\b",
    "a Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a web token": r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
    "a private key": r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----(?:[^-]{0,20000}-----END [A-Z ]{0,30}-----)?",
    "a password in a URL": r"(?<=://)[^\s/@:\"'<>]{0,200}:[^\s/@\"'<>]{1,500}(?=@)",
}
_SECRET = re.compile("|".join(f"(?:{shape})" for shape in _SHAPES.values()))
_SECRET_BYTES = re.compile(_SECRET.pattern.encode())
_SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
_known: set[str] = set()


def remember(values: Iterable[object]) -> None:
    """Replace these values in all text that this process shows from now on."""
    _known.update(value for value in values if isinstance(value, str) and len(value) >= MIN_CHARACTERS)


def known_secrets() -> tuple[str, ...]:
    """Return the values to replace: the remembered ones, and what the environment calls a token, key or password."""
    named = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= MIN_CHARACTERS}
    return tuple(sorted(_known | named, key=len, reverse=True))


def redacted(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text with *** in place of secrets: `secrets`, the known values, and what has the shape of one."""
    for secret in (*secrets, *known_secrets()):
        text = text.replace(secret, "***")
    return _SECRET.sub("***", text)


def secret_in(text: str | bytes) -> str | None:
    """Return what kind of secret a text seems to hold; None if none."""
    if not (_SECRET.search(text) if isinstance(text, str) else _SECRET_BYTES.search(text)):
        return None
    text = text if isinstance(text, str) else text.decode("utf-8", "replace")
    return next((kind for kind, shape in _SHAPES.items() if re.search(shape, text)), "a secret")
