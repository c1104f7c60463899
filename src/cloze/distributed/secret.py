"""Prove that the processes of a run belong together, before they exchange anything else.

    authenticate(store, rank, world_size, secret, seconds)

The starter of a run passes CLOZE_SECRET to every machine through the environment or standard input, never on a command
line, which other users can read. Ranks meet in a key-value store whose port any user may open or reach. There rank 0
and each other rank exchange fresh random numbers and prove to each other with HMAC-SHA256 that they know the secret.
A proof holds for one rank of one world at one meeting only. See SECURITY.md for what this does not protect from.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from cloze.errors import LaunchError

NONCE_BYTES = 32
SHORTEST = 16  # characters of a secret
_NO_SECRET = b"none"
_HINT = "start all machines with the same CLOZE_SECRET, and choose another port if a stranger holds this one"


def proof(secret: bytes, side: str, rank: int, world_size: int, main: bytes, other: bytes) -> bytes:
    """Return what proves knowledge of `secret` to the other side. `side`: "main" for rank 0, else "rank"; `main`,
    `other`: the random numbers of rank 0 and of the other rank."""
    content = f"cloze {side} {rank} of {world_size}".encode() + b"\0" + main + other
    return hmac.new(hashlib.sha256(secret).digest(), content, hashlib.sha256).digest()


def sign(secret: bytes | None, content: bytes) -> bytes:
    """Return `content` after what proves that its sender knows `secret`."""
    return (
        hmac.new(hashlib.sha256(secret or b"").digest(), b"cloze message\0" + content, hashlib.sha256).digest()
        + content
    )


def signed(secret: bytes | None, message: bytes) -> bytes | None:
    """Return the content of a message that `sign` made with the same secret; None of any other message."""
    content = message[hashlib.sha256().digest_size :]
    return content if hmac.compare_digest(message, sign(secret, content)) else None


def check_secret(secret: str | None) -> bytes | None:
    """Return the secret as bytes, or None without one. Raises LaunchError for one that is too short to be one."""
    if secret is None:
        return None
    if len(secret) < SHORTEST:
        raise LaunchError(
            f"is shorter than {SHORTEST} characters",
            where="CLOZE_SECRET",
            hint='make one with: python -c "import secrets; print(secrets.token_hex(32))"',
        )
    return secret.encode()


def secret_port(secret: str, start: str) -> int:
    """Return a port that is derived from the secret and `start`, so that others cannot predict it. It is below the
    ports that Linux gives to outgoing connections. launch/multi_node computes the same."""
    digest = hashlib.sha256(f"cloze port {start} {secret}".encode()).hexdigest()
    return int(digest[:4], 16) % 12000 + 20000


def without_secret(address: str) -> str:
    """Return the warning for a run on several hosts without a secret."""
    return (
        f"several hosts without CLOZE_SECRET: any process that reaches {address} can join; "
        "set it to the same value on all hosts, as launch/multi_node and slurm/submit do (see SECURITY.md)"
    )


def authenticate(
    store: Any,
    rank: int,
    world_size: int,
    secret: bytes | None,
    seconds: float,
    ranks: Sequence[int] | None = None,
) -> bool:
    """Check over the store that all of `ranks` (default: every one) know the secret; each of them calls it. Return
    False if none has one.

    Raises LaunchError if another rank, or what answers in its place, does not prove it within `seconds`.
    """
    own = _NO_SECRET if secret is None else secrets.token_bytes(NONCE_BYTES)
    store.set(f"cloze/hello/{rank}", own)
    limit = timedelta(seconds=seconds)
    if rank == 0:
        others = [other for other in (range(world_size) if ranks is None else ranks) if other != 0]
        _prove_to_all(store, others, world_size, secret, own, limit)
    else:
        _prove_to_main(store, rank, world_size, secret, own, limit)
    return secret is not None


def _prove_to_all(
    store: Any, ranks: Sequence[int], world_size: int, secret: bytes | None, own: bytes, limit: timedelta
) -> None:
    failed = []
    for rank in ranks:
        other = _read(store, f"cloze/hello/{rank}", rank, limit)
        if secret is None and other == _NO_SECRET:
            continue
        given = b"" if secret is None or other == _NO_SECRET else _read(store, f"cloze/proof/{rank}", rank, limit)
        known = secret is not None and len(other) == NONCE_BYTES
        if known and hmac.compare_digest(given, proof(secret or b"", "rank", rank, world_size, own, other)):
            answer = proof(secret or b"", "main", rank, world_size, own, other)
        else:
            failed.append(rank)
            answer = _NO_SECRET
        store.set(f"cloze/answer/{rank}", answer)
    if failed:
        who = f"rank{'s' * (len(failed) > 1)} {', '.join(map(str, failed[:8]))}"
        raise LaunchError(f"{who} did not prove to know this run's secret", where="CLOZE_SECRET", hint=_HINT)


def _prove_to_main(store: Any, rank: int, world_size: int, secret: bytes | None, own: bytes, limit: timedelta) -> None:
    main = _read(store, "cloze/hello/0", 0, limit)
    if secret is None and main == _NO_SECRET:
        return
    if secret is None or len(main) != NONCE_BYTES:
        who = "this rank has none" if secret is None else "what answers as rank 0 has none"
        raise LaunchError(f"the ranks of a run share a secret, and {who}", where="CLOZE_SECRET", hint=_HINT)
    store.set(f"cloze/proof/{rank}", proof(secret, "rank", rank, world_size, main, own))
    answer = _read(store, f"cloze/answer/{rank}", 0, limit)
    if not hmac.compare_digest(answer, proof(secret, "main", rank, world_size, main, own)):
        what = "what answers as rank 0 does not know this run's secret"
        raise LaunchError(what, where="CLOZE_SECRET", hint=_HINT)


def _read(store: Any, key: str, rank: int, limit: timedelta) -> bytes:
    try:
        store.wait([key], limit)
        return bytes(store.get(key))
    except RuntimeError as error:  # all of torch.distributed's errors are
        what = f"rank {rank} did not answer within {limit.total_seconds():.0f} s ({str(error).splitlines()[0][:100]})"
        raise LaunchError(what, where="CLOZE_SECRET", hint=_HINT) from None
