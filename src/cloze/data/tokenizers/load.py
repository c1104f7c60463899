"""The tokenizer of a corpus: loading it, and what names it.

tokenizer = load_tokenizer("roberta-base")
fingerprint(tokenizer)              # equal for equal ids, independent of the folder
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cloze.data.tokenizers.token_ids import missing_ids, special_ids, vocabulary_size
from cloze.data.tokenizers.tokenizer_file import (
    FILE,
    ODD_TEXTS,
    first_difference,
    special_texts,
    stored_tokenizer,
    tokenizer_file,
)
from cloze.data.tokenizers.written_tokenizer import check_written, damaged, read_written
from cloze.errors import ModelError
from cloze.utils.foreign.pretrained import from_pretrained, load_error
from cloze.utils.terminal.console import warn

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FAILED = "cannot load the tokenizer "  # how the error begins if transformers failed to load one
UNLIMITED = int(1e30)  # transformers' own value of model_max_length for "no limit is known"
# Files that hold only a vocabulary, and the class that usually reads them.
VOCABULARIES = {"vocab.txt": "BertTokenizer", "vocab.json": "RobertaTokenizer"}


def load_tokenizer(name: str, trust_remote_code: bool = False, token: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or Hub name, as its tokenizer.json describes it.

    Raises ModelError if it cannot be loaded, cannot mask, or is not what its tokenizer.json says; DataError if it is
    in a prepared folder and not the one that the blocks were made with.
    """
    written = read_written(name)
    if written is None:
        return _usable(name, trust_remote_code, token)
    try:
        tokenizer = _usable(name, trust_remote_code, token)
    except ModelError as error:
        if "trust_remote_code" in str(error):
            raise
        raise damaged(name, "the tokenizer cannot be loaded") from None
    check_written(name, written, describe(tokenizer, name))
    return tokenizer


def _usable(name: str, trust_remote_code: bool, token: str | None) -> PreTrainedTokenizerBase:
    """Load a tokenizer and check what masking needs of it."""
    tokenizer = _loaded(name, trust_remote_code, token)
    if tokenizer.mask_token_id is None:
        raise ModelError(
            "the tokenizer has no mask token",
            where=name,
            hint="take the tokenizer of an encoder (BERT, RoBERTa, ...), or make one with `cloze tokenizer`",
        )
    _check_special_tokens(tokenizer, name)
    limit: Any = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        warn(f"{name}: model_max_length is {limit!r}, which is no length; it is not used")
        tokenizer.model_max_length = UNLIMITED
    return tokenizer


def _loaded(name: str, trust_remote_code: bool, token: str | None) -> Any:
    """Load a tokenizer with the class that its configuration names, or from tokenizer.json alone if that class cannot
    be loaded or makes other tokens."""
    file = tokenizer_file(name, token)
    try:
        tokenizer = from_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code, token=token)
    except ModelError as error:
        if file is None or not error.what.startswith(FAILED) or "trust_remote_code" in str(error):
            raise _vocabulary_alone(name) or error from None
        tokenizer, problem = None, f"its class cannot be loaded {error.what.removeprefix(FAILED)}"
    if tokenizer is not None:
        text = _difference(tokenizer, name)
        if text is None:
            return tokenizer
        problem = f"{type(tokenizer).__name__} gives other tokens than its tokenizer.json, for {text[:40]!r} first"
    plain = from_pretrained(PreTrainedTokenizerFast, name, token=token)
    _take_special_tokens(plain, tokenizer)
    if _difference(plain, name) is not None:
        raise ModelError(
            problem, where=name, hint="remove the added tokens of tokenizer_config.json that tokenizer.json lacks"
        )
    warn(f"{name}: {problem}; tokenizer.json is used as it is")
    return plain


def _difference(tokenizer: Any, name: str) -> str | None:
    """Return a text that becomes other tokens than by tokenizer.json; None if none was found."""
    try:
        stored = stored_tokenizer(tokenizer)
        return None if stored is None else first_difference(tokenizer, stored, [*ODD_TEXTS, *special_texts(tokenizer)])
    except Exception as error:  # `tokenizers` raises Exception itself
        raise load_error(error, name, "tokenizer") from None


def _take_special_tokens(plain: Any, tokenizer: Any) -> None:
    """Give a tokenizer the special tokens that it does not name itself, and that its vocabulary has."""
    vocabulary = plain.get_vocab()
    for name in SPECIAL_TOKENS:
        token = None if tokenizer is None else getattr(tokenizer, name, None)
        if getattr(plain, name, None) is None and token is not None and str(token) in vocabulary:
            setattr(plain, name, str(token))


def check_sample(tokenizer: PreTrainedTokenizerBase, texts: list[str], split_special_tokens: bool) -> None:
    """Compare a loaded tokenizer with its tokenizer.json on texts of a corpus. Raises ModelError if they differ."""
    stored = stored_tokenizer(tokenizer)
    text = None if stored is None else first_difference(tokenizer, stored, texts, split_special_tokens)
    if text is not None:
        raise ModelError(
            f"{type(tokenizer).__name__} gives other tokens than its tokenizer.json, for {text[:40]!r}",
            where=tokenizer.name_or_path,
            hint='write "tokenizer_class": "PreTrainedTokenizerFast" into its tokenizer_config.json',
        )


def _vocabulary_alone(name: str) -> ModelError | None:
    """Return the error for a folder with a vocabulary but no description of its use; None for other folders."""
    folder = Path(name)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not names & VOCABULARIES.keys() or names & {FILE, "tokenizer_config.json"}:
        return None
    found = " and ".join(sorted(names & {*VOCABULARIES, "merges.txt"}))
    kind = next(kind for file, kind in VOCABULARIES.items() if file in names)
    return ModelError(
        f"a vocabulary ({found}) without tokenizer.json does not say how texts are cut into words",
        where=name,
        hint=f'make that first, if it is for the usual class: python -c "from transformers import {kind}; '
        f'{kind}.from_pretrained({name!r}).save_pretrained({name!r})"',
    )


def _check_special_tokens(tokenizer: Any, name: str) -> None:
    """Raise ModelError if the mask token is also another special token, from which it could not be distinguished."""
    mask = tokenizer.mask_token_id
    same = [kind for kind in SPECIAL_TOKENS if kind != "mask_token" and getattr(tokenizer, f"{kind}_id", None) == mask]
    if same:
        raise ModelError(
            f"the mask token is also the {same[0]} ({tokenizer.mask_token!r})",
            where=name,
            hint="give the tokenizer a mask token of its own",
        )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of what determines a text's ids: the fast tokenizer's description, or the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        facts: dict[str, Any] = json.loads(backend.to_str())
        facts.pop("truncation", None)
        facts.pop("padding", None)
    else:
        facts = {"class": type(tokenizer).__name__, "vocab": sorted(tokenizer.get_vocab().items())}
    facts = {"backend": facts, "special": sorted(tokenizer.all_special_ids), "mask": tokenizer.mask_token_id}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def describe(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    """Return what the manifest says of the tokenizer. A local folder is named by its last part only; ids that no token
    has are listed only if there are any."""
    missing = missing_ids(tokenizer)
    return {
        "name": Path(name).name if Path(name).exists() else name,
        "class": type(tokenizer).__name__,
        "fingerprint": fingerprint(tokenizer),
        "vocab_size": vocabulary_size(tokenizer),
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "special_token_ids": special_ids(tokenizer),
        **({"missing_token_ids": missing} if missing else {}),
    }
