"""A small tokenizer of each kind, with added tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMES = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>", "bos_token": "<s>", "eos_token": "</s>"}
SPECIAL, ADDED = list(NAMES.values()), ["new", "1new", ".new"]
KINDS = ("WordPiece", "ByteLevel", "Unigram", "suffix")


@cache
def tokenizer_of(kind: str) -> Any:
    """Return a small tokenizer of a kind, with added tokens. Words have several tokens; no token contains `X`."""
    if kind == "WordPiece":
        tokens = [*SPECIAL, "a", "b", "##a", "##b", "##ab", ".", "1"]
        model: Any = models.WordPiece({token: number for number, token in enumerate(tokens)}, unk_token="<unk>")
        before: Any = pre_tokenizers.BertPreTokenizer()
        decoder: Any = decoders.WordPiece(cleanup=False)
    elif kind == "ByteLevel":
        tokens = [*SPECIAL, "a", "b", ".", "1", "Ġ", "Ċ", "Ġa", "ab"]
        merges = [("Ġ", "a"), ("a", "b")]
        model = models.BPE({token: number for number, token in enumerate(tokens)}, merges, unk_token="<unk>")
        before, decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind == "Unigram":
        tokens = [*SPECIAL, "▁a", "▁b", "▁", "a", "b", ".", "1"]
        model, before = models.Unigram([(token, -1.0) for token in tokens], unk_id=1), pre_tokenizers.Metaspace()
        decoder = decoders.Metaspace()
    else:
        tokens = [*SPECIAL, "a", "b", "1", "a</w>", "b</w>", "1</w>", ".</w>"]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        model = models.BPE(vocabulary, [], unk_token="<unk>", end_of_word_suffix="</w>")
        before, decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = before, decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)
    tokenizer.add_tokens(ADDED)
    return tokenizer
