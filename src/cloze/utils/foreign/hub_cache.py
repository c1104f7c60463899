"""Errors of a Hub that cannot be reached: why that is, and which cache was searched.

what, hint = unreachable(error)     # "no such folder, not in the cache ..., and the Hub ...", "connect, or ..."
"""

from __future__ import annotations

from collections.abc import Iterator

# The HTTP library of huggingface_hub depends on its version, so its errors go by their names.
_LOST = ("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError", "NameResolutionError")


def is_unreachable(error: BaseException) -> bool:
    """Return whether an error, or one that caused it, says that the Hub cannot be reached."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    kinds = (LocalEntryNotFoundError, ConnectionError, TimeoutError)  # OfflineModeIsEnabled is a ConnectionError
    return any(isinstance(one, kinds) or type(one).__name__ in _LOST for one in _chain(error))


def unreachable(error: BaseException, cache: str | None = None) -> tuple[str, str] | None:
    """Return the problem and the remedy if the Hub cannot be reached; None for other errors.

    `cache`: the folder that was searched (default: the Hub's cache).
    """
    if not is_unreachable(error):
        return None
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    why = "is not asked: HF_HUB_OFFLINE is set" if offline else "cannot be reached: no connection"
    hint = "unset HF_HUB_OFFLINE" if offline else "connect"
    what = f"no such folder, not in the cache {cache or constants.HF_HUB_CACHE}, and the Hub {why}"
    return what, f"{hint}, or download it elsewhere and give its folder"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
