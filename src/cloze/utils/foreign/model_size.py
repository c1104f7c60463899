"""Limit the size of a model that a configuration may request, by its numbers and while its modules are created.

    check_number("num_hidden_layers", 10**9, "config.json")     # ModelError
    with limited_size(stored=124_000_000): AutoModelForMaskedLM.from_pretrained(folder)

A configuration of 1 kB can ask for a billion layers, under names that differ between architectures. Numbers that make
loops long are refused by name, all others above a general limit; the product of allowed numbers is limited by hooks
of torch that see every module and parameter before it is filled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cloze.errors import ModelError
from cloze.utils.foreign.paths import printable

MAX_MODULES = 1 << 17
MAX_PARAMETER = 1 << 35  # elements of one parameter
MAX_ELEMENTS = 1 << 42
MOST_OF_STORED = 16  # times the stored elements: several 4-bit weights may be stored as one
SMALL = 1 << 28  # elements that are always allowed
# The largest number that a configuration may hold under a name of this kind.
LARGEST = (
    (re.compile(r"(^|_)(n_)?(layers?|blocks?|depth|repeats?|stages?|group_num|networks|hash|hashes)$"), 4096),
    (re.compile(r"(block_sizes|labels|experts|heads?|groups|buckets|langs|latents|channels|kernel\w*)$"), 1 << 16),
    (re.compile(r"(size|sizes|dim|width|hidden|embeddings|positions|model|ff|inner)$"), 1 << 26),
)
LARGEST_OTHER = 1 << 26  # for integers under any other name, except under these:
_FREE = re.compile(r"theta|base$|seed|(_|^)ids?$|param|tokens|steps?$|flo|time|date|version|max_length|train")
_HEADS = re.compile(r"(^|(?<!lm)_)heads?$")  # chunk_size_lm_head is 0 in Reformer
_HINT = "check config.json"


def check_number(name: str, value: float, where: Path | str) -> None:
    """Raise ModelError for a number of a configuration that no model has under this name."""
    found = [largest for pattern, largest in LARGEST if pattern.search(name)]
    if not found and isinstance(value, int) and not _FREE.search(name):
        found = [LARGEST_OTHER]
    if _HEADS.search(name) and value < 1:
        raise ModelError(f"{printable(name)} is {_short(value)}, and a model has at least 1", where=where, hint=_HINT)
    if found and not -found[0] <= value <= found[0]:
        raise ModelError(
            f"{printable(name)} is {_short(value)}, and no model is larger than {found[0]:,}", where=where, hint=_HINT
        )


@contextmanager
def limited_size(where: Path | str, stored: int | None = None) -> Iterator[None]:
    """Raise ModelError as soon as a model that is made inside has too many modules or elements, or far more than the
    `stored` elements of its files (None: unknown)."""
    from torch.nn.modules.module import (
        register_module_module_registration_hook,
        register_module_parameter_registration_hook,
    )

    most = MAX_ELEMENTS if stored is None else min(MAX_ELEMENTS, max(SMALL, MOST_OF_STORED * stored))
    modules = elements = 0

    def count_module(*_: Any) -> None:
        nonlocal modules
        modules += 1
        if modules > MAX_MODULES:
            raise ModelError(f"it asks for more than {MAX_MODULES:,} modules", where=where, hint=_HINT)

    def count_elements(module: Any, name: str, parameter: Any) -> None:
        nonlocal elements
        size = 0 if parameter is None else parameter.numel()
        elements += size
        if size > MAX_PARAMETER or elements > most:
            known = "" if stored is None else f", and its files hold {stored:,}"
            raise ModelError(f"it asks for {elements:,} parameters or more{known}", where=where, hint=_HINT)

    hooks = [
        register_module_module_registration_hook(count_module),
        register_module_parameter_registration_hook(count_elements),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _short(value: float) -> str:
    try:
        return f"{value:.4g}"
    except OverflowError:  # an integer beyond all floats
        return "a number of hundreds of digits"
