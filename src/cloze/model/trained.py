"""Select the trained parameters: all but those that a pattern names and those that do not affect the output.

Some architectures carry parameters that masked language modelling never uses (poolers, contact heads). They get no
gradient, for which data-parallel training would wait forever; they keep their values, and are kept in checkpoints.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloze.errors import ConfigError
from cloze.model.archs import REVERSIBLE, fixed_length
from cloze.model.load import check_finite

LARGE = 2 * 10**9  # parameters
SHORT_TOKENS = 64
MATCH_SECONDS = 10.0


def freeze_matching(model: torch.nn.Module, pattern: str) -> int:
    """Freeze the parameters whose names match a regular expression from their beginning; return how many there are.

    Raises ConfigError if it matches none, or all, or takes longer than MATCH_SECONDS.
    """
    matches = compile_pattern(pattern).match
    named = list(model.named_parameters())
    with _time_limit(pattern):
        found = [parameter for name, parameter in named if matches(name)]
    if not found or len(found) == len(named):
        raise ConfigError(
            f"{pattern!r} matches {'no' if not found else 'every'} parameter",
            where="--freeze",
            hint=f"their names are like {named[0][0]} and {named[-1][0]}",
        )
    for parameter in found:
        parameter.requires_grad = False
    return len(found)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of --freeze. Raises ConfigError if it is invalid."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"not a regular expression ({error})", where="--freeze", hint="for example .*embeddings"
        ) from None


@contextlib.contextmanager
def _time_limit(pattern: str) -> Iterator[None]:
    """Raise ConfigError if matching takes too long: nested repetitions such as (a+)+ take a time that doubles with
    each letter of a name. Only the main thread gets signals; the others have no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        what = f"{pattern!r} takes more than {MATCH_SECONDS:g} s to compare with the names of parameters"
        raise ConfigError(what, where="--freeze", hint="write it without a repetition inside another one")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MATCH_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def freeze_unused(model: Any, blocks: NDArray[np.int32]) -> list[str]:
    """Do not train what gets no gradient from the logits of the first block, or has no elements; return the names.
    Raises ModelError if the logits are not finite.

    blocks: [n, block_size]. A large model is given a short block: which parameters have a part in the output does not
    depend on its length, but the time does.
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > LARGE and fixed_length(model.config.get_text_config()) is None:
        blocks = blocks[:, :SHORT_TOKENS]
    was_training = model.training
    model.train(model.config.model_type in REVERSIBLE)
    used: set[torch.nn.Parameter] = set()

    def note(parameter: Any) -> None:  # and free it: all gradients together are as large as the model
        used.add(parameter)
        parameter.grad = None

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(note) for _, p in trained]
    with torch.enable_grad():
        logits = model(input_ids=torch.from_numpy(blocks[:1].astype(np.int64))).logits
        size = logits.float().square().mean()
        check_finite(float(size.detach()), type(model).__name__)
        size.backward()
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    unused = [name for name, p in trained if p not in used or p.numel() == 0]
    for name in unused:
        model.get_parameter(name).requires_grad = False
    return unused
