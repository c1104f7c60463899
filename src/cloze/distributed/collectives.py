"""Small values from rank to rank, as JSON: nothing that another process sent is unpickled.

    hosts = gather(socket.gethostname())          # of every rank, on every rank
    parts = gather_to_main((problem, files))      # of every rank, on rank 0
    folder = run_on_main_and_broadcast(lambda: open_folder(...))  # rank 0's result, or its ClozeError, on every rank
    raise_on_any_rank(problem)                    # the first rank's ClozeError, on every rank

Numbers, texts, None, lists, tuples, dictionaries, paths, ClozeErrors and Stopped can be sent, and arrive as what they
were. An error is sent as the name of its class and its fields, and only classes of `cloze.errors` are created from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from cloze import errors
from cloze.errors import ClozeError, LaunchError, LostRank, Stopped, mark_all_ranks

T = TypeVar("T")
ERRORS: dict[str, type[ClozeError]] = {
    name: found for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, ClozeError)
}
_FIELDS = ("what", "where", "hint")
_LOST_FIELDS = ("exit_code", "loud", "lost")


def encode(value: Any) -> bytes:
    """Return a value as JSON. Raises TypeError for values that cannot be sent."""
    return json.dumps(_plain(value), separators=(",", ":")).encode()


def decode(data: bytes) -> Any:
    """Return the value that `encode` was given. Raises LaunchError for anything else."""
    try:
        return _restored(json.loads(data))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"a message from another rank cannot be read ({type(error).__name__})"
        raise LaunchError(
            what, where="a collective operation", hint="do all ranks run the same version of Cloze?"
        ) from None


def _plain(value: Any) -> Any:
    """Encode for JSON: tuples, paths, errors and dictionaries with keys other than strings become {"~": [name,
    content]}."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, tuple):
        return {"~": ["tuple", [_plain(one) for one in value]]}
    if isinstance(value, dict):
        if all(type(key) is str and key != "~" for key in value):
            return {key: _plain(one) for key, one in value.items()}
        return {"~": ["dict", [[_plain(key), _plain(one)] for key, one in value.items()]]}
    if isinstance(value, Path):
        return {"~": ["path", str(value)]}
    if isinstance(value, ClozeError):
        known = next(kind.__name__ for kind in type(value).__mro__ if kind.__name__ in ERRORS)
        names = _FIELDS + (_LOST_FIELDS if known == LostRank.__name__ else ())
        return {"~": ["error", [known, {name: _plain(getattr(value, name)) for name in names}]]}
    if isinstance(value, Stopped):
        return {"~": ["stopped", [str(value), value.exit_code]]}
    raise TypeError(f"a {type(value).__name__} cannot be sent to other ranks")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(one) for one in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {"~"}:
        return {key: _restored(one) for key, one in value.items()}
    kind, content = value["~"]
    if kind == "tuple":
        return tuple(_restored(one) for one in content)
    if kind == "dict":
        return {_restored(key): _restored(one) for key, one in content}
    if kind == "path":
        return Path(content)
    if kind == "error":
        name, fields = content
        return ERRORS[name](**_restored(fields))
    if kind == "stopped":
        line, code = content
        return Stopped(str(line), int(code))
    raise KeyError(kind)


def gather(value: T) -> list[T]:
    """Return the value of every rank, by rank; every rank calls it."""
    if not torch.distributed.is_initialized():
        return [value]
    mine, lengths = _bytes_and_lengths(encode(value), None)
    longest = [torch.empty_like(mine) for _ in lengths]
    torch.distributed.all_gather(longest, mine)
    return [decode(_content(one, length)) for one, length in zip(longest, lengths, strict=True)]


def gather_to_main(value: T, group: Any = None) -> list[T]:
    """Return the value of every rank, by rank, on rank 0, and an empty list elsewhere; every rank calls it."""
    if not torch.distributed.is_initialized():
        return [value]
    mine, lengths = _bytes_and_lengths(encode(value), group)
    main = torch.distributed.get_rank() == 0
    longest = [torch.empty_like(mine) for _ in lengths] if main else None
    torch.distributed.gather(mine, longest, group=group)
    return [decode(_content(one, length)) for one, length in zip(longest or [], lengths, strict=True)] if main else []


def broadcast(value: T | None, group: Any = None) -> T:
    """Return rank 0's value on every rank; the others' is not looked at."""
    device = _device(group)
    data = encode(value) if torch.distributed.get_rank() == 0 else b""
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    torch.distributed.broadcast(length, 0, group=group)
    tensor = _tensor(data, int(length), device)
    torch.distributed.broadcast(tensor, 0, group=group)
    return decode(_content(tensor, int(length)))


def _bytes_and_lengths(data: bytes, group: Any) -> tuple[torch.Tensor, list[int]]:
    """Return this rank's bytes, as long as the longest rank's, and the true lengths of all ranks'."""
    device = _device(group)
    size = torch.distributed.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(size)]
    torch.distributed.all_gather(lengths, torch.tensor([len(data)], device=device), group=group)
    found = [int(length) for length in lengths]
    return _tensor(data, max(found), device), found


def _tensor(data: bytes, length: int, device: torch.device) -> torch.Tensor:
    tensor = torch.zeros(length, dtype=torch.uint8)
    if data:
        tensor[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return tensor.to(device)


def _content(tensor: torch.Tensor, length: int) -> bytes:
    return tensor[:length].cpu().numpy().tobytes()


def _device(group: Any) -> torch.device:
    """Return where messages are sent from: gloo wants host memory, NCCL this rank's GPU."""
    on_host = torch.distributed.get_backend(group) == "gloo"
    return torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())


def wait_in_new_groups(seconds: float) -> None:
    """Set the timeout of process groups that any library creates from now on: torch has its own default for each
    backend, which DeepSpeed uses."""
    c10d, timeout = torch.distributed.distributed_c10d, timedelta(seconds=seconds)
    c10d.default_pg_timeout = timeout
    if getattr(c10d, "default_pg_nccl_timeout", None) is not None:
        c10d.default_pg_nccl_timeout = timeout


def make_group(backend: str) -> Any:
    """Return a process group of all ranks beside the one of training, for a thread, or None without any group."""
    if not torch.distributed.is_initialized():
        return None
    return torch.distributed.new_group(backend=backend)


def run_on_main_and_broadcast(choose: Callable[[], T], group: Any = None) -> T:
    """Return the result of `choose` on rank 0, on every rank; its ClozeError or Stopped is raised on all of them."""
    if not torch.distributed.is_initialized():
        return choose()
    outcome: tuple[Any, ClozeError | Stopped | None] = (None, None)
    unexpected: BaseException | None = None
    if torch.distributed.get_rank() == 0:
        try:
            outcome = (choose(), None)
            encode(outcome)
        except (ClozeError, Stopped) as error:
            outcome = (None, error)
        except Exception as error:  # a bug: the others must not wait until the time-out
            unexpected = error
            outcome = (None, LaunchError(f"rank 0 failed: {type(error).__name__}: {error}"))
    own, (result, problem) = outcome, broadcast(outcome, group)
    if unexpected is not None:
        raise unexpected
    if problem is not None:
        problem = own[1] or problem  # on rank 0 with the notes that were made on it
        mark_all_ranks(problem)
        raise problem
    return result


def raise_on_any_rank(problem: ClozeError | None) -> None:
    """Raise the first rank's problem on every rank, so that all of them stop at the same place."""
    for one in gather(problem):
        if one is not None:
            mark_all_ranks(one)
            raise one
