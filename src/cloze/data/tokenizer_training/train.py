"""Train a tokenizer on a corpus, for pre-training from scratch: the same one for the same corpus, to the byte.

    train_tokenizer(TokenizerConfig(dataset_name="corpus.jsonl", output="tokenizer", vocab_size=8192))

- `bpe`: byte-level BPE with RoBERTa's special tokens. It knows every text: its alphabet are the 256 bytes (Radford et
  al., 2019).
- `wordpiece`: BERT's, `[CLS] text [SEP]`, pieces inside of words with `##` (Devlin et al., 2019).
- `unigram`: SentencePiece's language model with XLM-R's special tokens, `▁` for spaces (Kudo, 2018).

BPE is trained by `tokenizers`, which gives the same merges for any number of threads. So is WordPiece, after its
alphabet was put in order in a pass of its own: `tokenizers` would number it in the order of a hash table, and decide
between pairs that are equally frequent by these numbers. Unigram has a trainer of our own
(`cloze.data.tokenizer_training.unigram`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, ByteLevelBPETokenizer, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from cloze.config import TokenizerConfig
from cloze.data.corpus.sources import Corpus, open_corpus
from cloze.data.prepare.pipeline import sample_texts
from cloze.data.prepare.text_sketch import sampled_report
from cloze.data.prepared.text_report import warnings_of
from cloze.data.tokenizer_training.unigram import train_unigram
from cloze.data.tokenizer_training.word_counts import count_words
from cloze.data.tokenizers.token_ids import vocabulary_size
from cloze.errors import ConfigError, DataError
from cloze.utils.atomic_files import staged_folder
from cloze.utils.terminal.console import progress, warn

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
BERT_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MASK = AddedToken("<mask>", lstrip=True, special=True)  # takes the space before it, as a masked word does
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_ALPHABET = 1000  # characters of a WordPiece vocabulary, the most frequent ones: what `tokenizers` keeps for BERT


def train_tokenizer(config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """Train on every document of the split, write the folder `config.output`, and return the tokenizer.

    Raises ConfigError for values that cannot be used, DataError if the corpus holds no text.
    """
    check_new(Path(config.output))
    _check_values(config)
    corpus = open_corpus(config)
    texts = Texts(corpus, str(config.dataset_name))
    train = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram}[config.kind]
    tokenizer = train(config, texts)
    size = vocabulary_size(tokenizer)
    if size < config.vocab_size:
        warn(f"the corpus gives {size:,} tokens, not {config.vocab_size:,}")
    with staged_folder(config.output) as staged:
        tokenizer.save_pretrained(staged)
    warn_of_unknown_text(corpus, tokenizer)
    return tokenizer


def warn_of_unknown_text(corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    """Warn if a sample of the corpus that the tokenizer was made for has many unknown tokens."""
    found = sampled_report(sample_texts(corpus), tokenizer, split_special_tokens=False)["train"]
    for line in warnings_of({name: found[name] for name in ("unknown_tokens", "long_words") if name in found}):
        warn(line)


class Texts:
    """The texts of a corpus, a stream that can be read again. DataError at the end of a pass without any text."""

    def __init__(self, corpus: Corpus, name: str):
        self._corpus, self._name = corpus, name

    def __iter__(self) -> Iterator[str]:
        seen = 0
        with progress("tokenizer", total=None, unit="documents") as advance:
            for document in self._corpus.documents():
                advance()
                if document.text.strip():
                    seen += 1
                    yield document.text
        if not seen:
            raise DataError("no text to learn from", where=self._name, hint="check --text_field and --split")


def check_new(output: Path) -> None:
    """Raise ConfigError if a folder is there already."""
    if output.exists():
        raise ConfigError("exists already", where=output, hint="choose another --output")


def _check_values(config: TokenizerConfig) -> None:
    least, of = {
        "bpe": (MIN_VOCAB_SIZE, f"256 bytes and {len(SPECIAL_TOKENS)} special tokens"),
        "wordpiece": (len(BERT_SPECIAL_TOKENS) + 1, f"{len(BERT_SPECIAL_TOKENS)} special tokens and a character"),
        "unigram": (len(SPECIAL_TOKENS) + 1, f"{len(SPECIAL_TOKENS)} special tokens and a character"),
    }[config.kind]
    if config.vocab_size < least:
        raise ConfigError(f"must be at least {least} ({of})", where="--vocab_size")
    if config.do_lower_case and config.kind == "bpe":
        raise ConfigError(
            "byte-level BPE keeps letters as they are", where="--do_lower_case", hint="use it with --kind wordpiece"
        )
    if config.strip_accents and config.kind != "wordpiece":
        raise ConfigError(f"{config.kind} keeps accents", where="--strip_accents", hint="use it with --kind wordpiece")


def _train_bpe(config: TokenizerConfig, texts: Texts) -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        iter(texts),
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[*SPECIAL_TOKENS[:-1], MASK],
        show_progress=False,
    )
    return as_roberta(trained, config.model_max_length)


def as_roberta(trained: ByteLevelBPETokenizer, model_max_length: int) -> PreTrainedTokenizerFast:
    """Return the trained BPE as the tokenizer class of RoBERTa, `<s> text </s>`."""
    backend = trained._tokenizer
    ids = {token: backend.token_to_id(token) for token in SPECIAL_TOKENS}
    backend.post_processor = RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=False)
    return RobertaTokenizer(
        tokenizer_object=backend,
        model_max_length=model_max_length,
        mask_token=MASK,  # type: ignore[arg-type]
    )


def _train_wordpiece(config: TokenizerConfig, texts: Texts) -> PreTrainedTokenizerFast:
    # None follows `lowercase`, as in BERT: small letters would lose their marks, of Hindi the vowels.
    accents = config.strip_accents if config.do_lower_case or config.strip_accents else None
    normalizer = normalizers.BertNormalizer(lowercase=config.do_lower_case, strip_accents=accents)
    characters: Counter[str] = Counter()

    def normalized() -> Iterator[str]:
        for text in texts:
            normal = normalizer.normalize_str(text)
            characters.update(normal)
            yield normal

    # A vocabulary of size 0 is the alphabet: every character as it is found in and at the beginning of words.
    alphabet = set(_wordpieces(normalized(), 0, [], None, config.min_frequency))
    kept = {one for one, _ in sorted(characters.items(), key=lambda one: (-one[1], one[0]))[:MAX_ALPHABET]}
    letters = sorted(token for token in alphabet if token.removeprefix("##")[-1:] in kept or token in kept)
    if len(letters) + len(BERT_SPECIAL_TOKENS) > config.vocab_size:
        raise DataError(
            f"its {len(letters)} characters and {len(BERT_SPECIAL_TOKENS)} special tokens are more than "
            f"{config.vocab_size} tokens",
            where="--vocab_size",
            hint="choose a larger one",
        )
    first = [*BERT_SPECIAL_TOKENS, *letters]
    plain = (normalizer.normalize_str(text) for text in texts)
    vocabulary = _wordpieces(plain, config.vocab_size, first, sorted(kept), config.min_frequency)
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return BertTokenizer(
        tokenizer_object=backend,
        do_lower_case=config.do_lower_case,
        strip_accents=accents,
        model_max_length=config.model_max_length,
    )


def _wordpieces(
    texts: Iterator[str], vocab_size: int, first: list[str], alphabet: list[str] | None, min_frequency: int
) -> dict[str, int]:
    """Return token -> id of a WordPiece vocabulary that begins with `first`; `alphabet`: the characters that words are
    made of (None: all there are)."""
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    limits: dict[str, Any] = (
        {} if alphabet is None else {"initial_alphabet": alphabet, "limit_alphabet": len(alphabet)}
    )
    trainer = WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=first, show_progress=False, **limits
    )
    trained.train_from_iterator(texts, trainer)
    return trained.get_vocab()


def _train_unigram(config: TokenizerConfig, texts: Texts) -> PreTrainedTokenizerFast:
    steps = [normalizers.NFKC(), *([normalizers.Lowercase()] if config.do_lower_case else [])]
    normalizer = normalizers.Sequence(steps)
    words = count_words(texts, lambda text: [f"▁{word}" for word in normalizer.normalize_str(text).split()])
    pieces = train_unigram(words, config.vocab_size - len(SPECIAL_TOKENS))
    special = [(token, 0.0) for token in SPECIAL_TOKENS]
    backend = Tokenizer(models.Unigram([*special, *pieces], SPECIAL_TOKENS.index("<unk>"), False))
    backend.normalizer = normalizer
    marks = {"replacement": "▁", "prepend_scheme": "always"}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**marks)]  # type: ignore[list-item,arg-type]
    )
    backend.decoder = decoders.Metaspace(**marks)  # type: ignore[arg-type]
    ids = [(token, SPECIAL_TOKENS.index(token)) for token in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", ids)
    # XLM-R's own class would leave the normalizer out when it is loaded again (transformers 5.23).
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=config.model_max_length,
        **dict.fromkeys(("bos_token", "cls_token"), "<s>"),
        **dict.fromkeys(("eos_token", "sep_token"), "</s>"),
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=MASK,
    )
