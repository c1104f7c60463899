"""Train a byte-level BPE tokenizer with RoBERTa's special tokens, for pre-training from scratch.

    train_tokenizer(TokenizerConfig(dataset_name="corpus.jsonl", output="tokenizer", vocab_size=8192))

Byte-level BPE (Radford et al., 2019) knows every text: its alphabet are the 256 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import PreTrainedTokenizerFast, RobertaTokenizer

from cloze.config import TokenizerConfig
from cloze.console import progress
from cloze.data.sources import open_corpus
from cloze.errors import ConfigError, DataError
from cloze.files import staged_folder

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
MASK = AddedToken("<mask>", lstrip=True, special=True)  # takes the space before it, as a masked word does
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """Train on every document of the split, write the folder `config.output`, and return the tokenizer.

    Raises ConfigError for values that cannot be used, DataError where the corpus holds no text.
    """
    output = Path(config.output)
    if output.exists():
        raise ConfigError("exists already", where=output, hint="choose another --output, or delete it")
    if config.vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"must be at least {MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)",
            where="--vocab_size",
        )
    corpus = open_corpus(config)
    seen = 0

    def texts() -> Iterator[str]:
        nonlocal seen
        with progress("tokenizer", total=None, unit="documents") as advance:
            for document in corpus.documents():
                advance()
                if document.text.strip():
                    seen += 1
                    yield document.text

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts(),
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[*SPECIAL_TOKENS[:-1], MASK],
        show_progress=False,
    )
    if not seen:
        raise DataError("no text to learn from", where=config.dataset_name, hint="check --text_field and --split")
    tokenizer = as_roberta(trained, config.model_max_length)
    with staged_folder(output) as staged:
        tokenizer.save_pretrained(staged)
    return tokenizer


def as_roberta(trained: ByteLevelBPETokenizer, model_max_length: int) -> PreTrainedTokenizerFast:
    """The trained BPE as the tokenizer class of RoBERTa, `<s> text </s>`."""
    backend = trained._tokenizer
    ids = {token: backend.token_to_id(token) for token in SPECIAL_TOKENS}
    backend.post_processor = RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=False)
    return RobertaTokenizer(
        tokenizer_object=backend,
        model_max_length=model_max_length,
        mask_token=MASK,  # type: ignore[arg-type]
    )
