"""Select the fastest backend whose ids equal those of the tokenizer on samples of the corpus.

spec = choose_encoder(tokenizer, "auto", False, sample_texts)
spec.backend                                      # "gigatoken", "tokenizers", "characters" or "transformers"
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from cloze.data.tokenizers.encoders import Encoder, EncoderSpec
from cloze.data.tokenizers.load import check_sample
from cloze.data.tokenizers.tokenizer_file import ODD_TEXTS, reference, special_texts
from cloze.errors import ConfigError, ModelError
from cloze.utils.terminal.console import warn

_TRIED_TOKENS = 1000
# A word of more characters than 16 bits can count; a longer one shows no other fault and adds a second to every start.
NASTY_TEXTS = (*ODD_TEXTS, "x" * (2**16 + 1), "漢" * 50_000)


def choose_encoder(
    tokenizer: PreTrainedTokenizerBase,
    wanted: str,
    split_special_tokens: bool,
    sample: list[str],
    trust_remote_code: bool = False,
) -> EncoderSpec:
    """Return the encoder of a tokenizer: `wanted` (one of `cloze.data.tokenizers.encoders.BACKENDS`; `auto`: the
    fastest).

    Raises ConfigError if a wanted backend is missing or gives other ids; ModelError if no backend gives equal ids.
    """
    prefix, suffix = template(tokenizer)
    fast = getattr(tokenizer, "backend_tokenizer", None)
    source = fast.to_str() if fast is not None else tokenizer.name_or_path
    check_sample(tokenizer, sample, split_special_tokens)
    texts = [*sample, *NASTY_TEXTS, *special_texts(tokenizer)]
    expected = reference(tokenizer, texts, split_special_tokens)
    candidates = (["gigatoken"] if find_spec("gigatoken") else []) + ["tokenizers"] if fast else []
    candidates = candidates or ["characters", "transformers"]
    if fast is None and split_special_tokens:
        _check_splitting(tokenizer, sample)
    for backend in candidates if wanted == "auto" else [wanted]:
        spec = EncoderSpec(backend, source, prefix, suffix, split_special_tokens, trust_remote_code)
        reason = _unfit(spec, fast is not None, texts, expected)
        if reason is None:
            return spec
        if wanted != "auto":
            raise ConfigError(f"{backend} cannot be used: {reason}", where="--tokenizer_backend", hint="leave it out")
        if backend == "gigatoken" and "gives other ids" in reason:
            warn(f"{backend} is not used: {reason}")
    raise ModelError(
        "the tokenizer gives a text other tokens when it adds special ones",
        where=type(tokenizer).__name__,
        hint="please report it with the tokenizer's name",
    )


def _unfit(spec: EncoderSpec, is_fast: bool, texts: list[str], expected: list[list[int]]) -> str | None:
    """Return why a backend cannot be used; None if it can."""
    if spec.backend in ("gigatoken", "tokenizers"):
        if not find_spec(spec.backend):
            return f"it is not installed (pip install {spec.backend})"
        if not is_fast:
            return "this tokenizer has no tokenizer.json"
    try:
        tokens, lengths = Encoder(spec)(texts)
    except Exception as error:  # gigatoken rejects WordPiece and others with many kinds of errors
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    ends = np.cumsum(lengths)
    for text, ids, end, length in zip(texts, expected, ends, lengths, strict=True):
        if tokens[end - length : end].tolist() != ids:
            return f"it gives other ids for {text[:40]!r}"
    return None


def _check_splitting(tokenizer: Any, sample: list[str]) -> None:
    """Raise ConfigError if splitting special tokens changes other texts too: ESM's tokenizer then makes every sequence
    one unknown token (transformers 5.23)."""
    special = [str(token) for token in tokenizer.all_special_tokens]
    plain = [text for text in sample if not any(token in text for token in special)]
    if reference(tokenizer, plain, True) != reference(tokenizer, plain, False):
        raise ConfigError(
            f"{type(tokenizer).__name__} cuts ordinary text otherwise with it",
            where="--split_special_tokens",
            hint="leave it out",
        )


def template(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the special tokens that the tokenizer puts before and after a single text."""
    special = set(tokenizer.all_special_tokens)
    own = (name for name in tokenizer.get_vocab() if name not in special)
    bare: list[int] = []
    for text in ("Hello world", *islice(own, _TRIED_TOKENS)):  # an alphabet of its own may not have these letters
        bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if bare:
            break
    whole = list(tokenizer(text)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()  # the comparison of ids finds any difference
