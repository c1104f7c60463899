"""Small tokenizers of the `tokenizers` library, and how they are saved."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from transformers import PreTrainedTokenizerFast

TEXTS = ["the river follows a lantern near the harbour , in 1987 and 2023 ."] * 40
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT_NAMES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), BERT, strict=True))
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ROBERTA_NAMES = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), ROBERTA, strict=True))


@cache  # `tokenizers` numbers the alphabet of a WordPiece in another order each time
def words() -> tuple[Tokenizer, dict[str, str]]:
    """Return a WordPiece that lowercases, keeps accents, and cuts at white space and punctuation."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    backend.train_from_iterator(TEXTS, WordPieceTrainer(vocab_size=90, special_tokens=BERT, show_progress=False))
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.decoder = decoders.WordPiece()
    return backend, BERT_NAMES


@cache
def digits() -> tuple[Tokenizer, dict[str, str]]:
    """Return a byte-level BPE that lowercases and keeps digits apart."""
    backend = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, special_tokens=ROBERTA, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return backend, ROBERTA_NAMES


def saved(folder: Path, backend: Tokenizer, names: dict[str, str], class_name: str | None = None) -> str:
    """Save a tokenizer; `class_name`: the class that its configuration is to name."""
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    if class_name is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": class_name}))
    return str(folder)
