"""Whether the blocks to train on were made with the tokenizer of the model's pretrained weights.

Token ids of another tokenizer fit the model's embeddings, and mean other words in it: training begins with a loss
above that of random weights, and nothing says why.

    check_own_tokenizer("roberta-base", model.config, tokenizer)      # ModelError if ids stand for other tokens
    check_pair("runs/mine/model", model.config, tokenizer)            # the same for a model that is not trained
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cloze.data.tokenizers.load import SPECIAL_TOKENS, fingerprint, load_tokenizer
from cloze.data.tokenizers.token_ids import token_names, vocabulary_size
from cloze.data.tokenizers.tokenizer_file import ODD_TEXTS, reference
from cloze.errors import ModelError
from cloze.utils.terminal.console import say, warn

_FILES = ("tokenizer", "vocab", "sentencepiece", "spiece", "bpe")  # how the names of a tokenizer's files begin
_PLACEHOLDER = re.compile(r"\[unused\d+\]|<unused\d+>|madeupword\d+", re.IGNORECASE)
_DECISIVE = ("pad_token", "mask_token")  # a model's code or configuration uses their ids


def check_own_tokenizer(
    name: str, config: Any, tokenizer: Any, trust_remote_code: bool = False, token: str | None = None
) -> None:
    """Compare the tokenizer of the blocks with that of the model `name`, or without one with its configuration.

    Raises ModelError if an id stands for another token. Warns if the same tokens are found otherwise in a text.
    """
    own = _own_tokenizer(name, trust_remote_code, token)
    if own is None:
        _compare_with_config(name, config.get_text_config(), tokenizer)
        return
    if fingerprint(own) == fingerprint(tokenizer):
        return
    _compare_ids(name, own, tokenizer)
    if reference(own, list(ODD_TEXTS), False) != reference(tokenizer, list(ODD_TEXTS), False):
        warn(f"{name}: its own tokenizer cuts some texts into other tokens than that of the blocks")


def _compare_ids(name: str, own: Any, tokenizer: Any) -> None:
    there, here = token_names(own), token_names(tokenizer)
    pairs = list(zip(there, here, strict=False))
    other = [
        token
        for token, (one, two) in enumerate(pairs)
        if one != two and one is not None and two is not None and not _PLACEHOLDER.fullmatch(one)
    ]
    if other:
        first = other[0]
        raise _error(
            name,
            f"{len(other):,} of {len(pairs):,} ids stand for other tokens than in the model's own (id {first}: "
            f"{here[first]!r} for {there[first]!r})",
        )
    roles = [each for each in SPECIAL_TOKENS if _id(own, each) not in (None, _id(tokenizer, each))]
    decisive = [each for each in roles if each in _DECISIVE]
    if decisive:
        kind = decisive[0]
        raise _error(name, f"the {kind} has the id {_id(tokenizer, kind)}, and {_id(own, kind)} in the model's own")
    if len(here) != len(there):
        what = f"the tokenizer of the blocks has {len(here):,} ids, and the model's own {len(there):,}"
        warn(f"{name}: {what}: embeddings of ids that only one of them has are as the model has them")


def _compare_with_config(name: str, config: Any, tokenizer: Any) -> None:
    """Compare special ids and sizes, and report that nothing else could be compared."""
    different = _different(config, tokenizer)
    decisive = [each for each in different if each in _DECISIVE]
    if decisive:
        kind = decisive[0]
        what = f"the {kind} has the id {_id(tokenizer, kind)}, and {getattr(config, f'{kind}_id')} in config.json"
        raise _error(name, what)
    rows = getattr(config, "vocab_size", None)
    what = f"{name} has no tokenizer to compare with that of the blocks: {vocabulary_size(tokenizer):,} ids"
    more = f"; other ids in config.json: {', '.join(different)}" if different else ""
    say("model", f"{what} for {rows:,} embeddings{more}" if isinstance(rows, int) else f"{what}{more}")


def check_pair(name: str, config: Any, tokenizer: Any) -> None:
    """Raise ModelError if a model's tokenizer has ids beyond its embeddings, or if config.json gives another id to a
    token that the model looks for: it would take words for padding."""
    config = config.get_text_config()
    rows, size = getattr(config, "vocab_size", None), vocabulary_size(tokenizer)
    hint = "give the tokenizer and the config.json that belong to its weights"
    if isinstance(rows, int) and size > rows:
        raise ModelError(
            f"its tokenizer has {size:,} ids, and the model has {rows:,} embeddings", where=name, hint=hint
        )
    for kind in (each for each in _different(config, tokenizer) if each in _DECISIVE):
        what = f"the {kind} has the id {_id(tokenizer, kind)}, and {getattr(config, f'{kind}_id')} in config.json"
        raise ModelError(what, where=name, hint=hint)


def _different(config: Any, tokenizer: Any) -> list[str]:
    """Return the special tokens to which a configuration gives another id than the tokenizer."""
    return [
        each
        for each in SPECIAL_TOKENS
        if isinstance(getattr(config, f"{each}_id", None), int)
        and _id(tokenizer, each) not in (None, getattr(config, f"{each}_id"))
    ]


def _error(name: str, what: str) -> ModelError:
    return ModelError(
        f"the blocks were made with another tokenizer: {what}",
        where=name,
        hint=f"prepare the corpus with --tokenizer_name {name}, or make a model for this tokenizer with "
        f"`cloze grow {name} --tokenizer ... --output ...`",
    )


def _id(tokenizer: Any, kind: str) -> int | None:
    return getattr(tokenizer, f"{kind}_id", None)


def _own_tokenizer(name: str, trust_remote_code: bool, token: str | None) -> Any:
    """Return the tokenizer in the model's folder or repository; None without one that can be loaded."""
    if Path(name).is_dir() and not any(path.name.startswith(_FILES) for path in Path(name).iterdir()):
        return None  # transformers would make one without a vocabulary
    try:
        own = load_tokenizer(name, trust_remote_code, token)
    except ModelError as error:
        warn(f"{name}: its own tokenizer is not compared with that of the blocks ({error.what})")
        return None
    return own if len(own.get_vocab()) > len(set(own.all_special_ids)) else None
