"""Where words begin: as the tokenizer itself has it, for every kind of tokenizer that has words at all."""

from __future__ import annotations

import copy
import gzip
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    BertWordPieceTokenizer,
    ByteLevelBPETokenizer,
    CharBPETokenizer,
    SentencePieceUnigramTokenizer,
    Tokenizer,
    models,
    pre_tokenizers,
)
from transformers import AutoTokenizer, ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast
from word_starts import agreement

from cloze.config import TrainConfig
from cloze.data.batches.word_boundaries import (
    ALONE,
    LETTER,
    LONG_WORD,
    MARKS,
    OTHER,
    SPACELESS,
    Words,
    _byte_level,
    _kind_of,
    _kind_of_part,
    mean_word_length,
    words_of,
)
from cloze.data.prepared.shards import open_prepared
from cloze.data.tokenizer_training.train import SPECIAL_TOKENS, as_roberta
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.select_encoder import NASTY_TEXTS
from cloze.data.train_data import TrainData, words_for
from cloze.errors import ConfigError
from cloze.tools.demo.corpus import write_corpus

NAMES = {"unk_token": "<unk>", "mask_token": "<mask>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
KINDS = {
    "byte-level BPE": (ByteLevelBPETokenizer, {}),
    "WordPiece": (BertWordPieceTokenizer, {"unk_token": "<unk>"}),
    "Unigram": (SentencePieceUnigramTokenizer, {}),
    "BPE with a suffix": (CharBPETokenizer, {}),
}
# White space, contractions, classes that change, characters of several tokens.
CONTRACTED = ["it's we'll they'd I'm can't you've we're"] * 50
ODD = [
    "  two  spaces\t\ttabs \r\n\n newlines\n",
    "it's we'll they'd 'quoted' x='s' o''s don’t",
    "rock'n'roll it'sabc we'llama I'md",
    "3.14159 1,000,000 x=y+z; a_b-c/d\\e|f~g B2B 4ever 2½ km² C++ <html>&amp;</html>",
    "한국어도 있다. naïve Ångström Привет, мир! שלום नमस्ते दुनिया",
    "emoji 👍🏽🇩🇪☃️ and text 😀😀 a😀b",
]


def is_spaceless(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in SPACELESS)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("sample") / "corpus.jsonl"
    write_corpus(path, num_threads=150)
    return [" ".join(json.loads(line)["answers"]["text"]) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(sample: list[str]) -> dict[str, PreTrainedTokenizerFast]:
    """A small tokenizer of each kind: words of several tokens, and characters of several bytes."""
    found = {}
    for kind, (make, options) in KINDS.items():
        tokenizer = make(**options)
        train = {"unk_token": "<unk>"} if kind == "Unigram" else {"min_frequency": 2}
        tokenizer.train_from_iterator(
            [*sample, *ODD, *CONTRACTED], vocab_size=700, special_tokens=SPECIAL_TOKENS, show_progress=False, **train
        )
        if kind == "byte-level BPE":
            found[kind] = as_roberta(tokenizer, 512)
        else:
            found[kind] = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **NAMES)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_the_sample_corpus_begin_where_the_tokenizer_has_them_begin(trained, sample, kind, figure):
    same, total = agreement(trained[kind], sample)
    assert total > 5_000
    assert same / total > 0.999
    figure(f"{kind}: share of tokens of the sample corpus whose word start is not the tokenizer's", 1 - same / total)


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_odd_texts_begin_there_too(trained, kind, figure):
    same, total = agreement(trained[kind], ODD)
    assert same / total >= (0.96 if kind == "byte-level BPE" else 1.0)
    figure(f"{kind}: share of tokens of odd texts whose word start is not the tokenizer's", 1 - same / total)


def test_white_space_and_contractions_are_cut_as_the_regular_expression_of_gpt_2_has_it(trained):
    texts = [
        "ab\U00100000\U0010fffd cd",
        ODD[0],
        "a\n\nb",
        "a   b",
        "a\t\tb",
        "a\n\nb \n c\t d  \n",
        "end \n\n",
        CONTRACTED[0],
        "it'sabc we'llama",
        "12ab34 a1.b",
    ]
    for text in texts:
        same, total = agreement(trained["byte-level BPE"], [text])
        assert same == total, text


@pytest.mark.parametrize("name", ["roberta-base", "bert-base-uncased"])
def test_words_of_real_threads_begin_where_the_real_tokenizers_have_them_begin(shared_data: Path, name: str, figure):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    with gzip.open(shared_data / "eli5_category" / "eli5-category-validation-2.json.gz", "rt") as file:
        threads = json.load(file)[:400]
    same, total = agreement(tokenizer, [" ".join(thread["answers"]["text"]) for thread in threads])
    assert total > 100_000
    assert 1 - same / total <= 1e-5
    figure(f"{name}: share of tokens of ELI5 whose word start is not the tokenizer's", 1 - same / total)
    texts = [text for text in NASTY_TEXTS[:-2] if not any(map(is_spaceless, text))]
    assert len(texts) > 8
    same, total = agreement(tokenizer, [*ODD, *texts])
    assert same / total > (0.95 if name == "roberta-base" else 0.9999)
    figure(f"{name}: share of tokens of odd texts whose word start is not the tokenizer's", 1 - same / total)


def test_an_added_token_with_characters_of_the_byte_alphabet_is_no_sequence_of_bytes(trained):
    tokenizer = copy.deepcopy(trained["byte-level BPE"])
    tokenizer.add_tokens(["é two", "日x"])
    ids = tokenizer("one é two three日x", add_special_tokens=False)["input_ids"]
    names, starts = tokenizer.convert_ids_to_tokens(ids), words_of(tokenizer).starts(np.array([ids]))[0]
    assert {"é two", "日x"} <= set(names)
    assert all(starts[names.index(name)] for name in ("é two", "日x"))


def test_a_number_without_a_token_says_nothing_of_words():
    edges = _byte_level(["", "a", "Ġb"])
    assert (edges.begins.tolist(), edges.ends.any(), edges.lone.any()) == ([False, False, True], False, False)


def test_special_tokens_are_words_and_begin_one(trained):
    """Also where the text goes on in the middle of a word, and where a word is cut by the block's beginning."""
    for kind, tokenizer in trained.items():
        words = words_of(tokenizer)
        ids = tokenizer("planetary", add_special_tokens=False)["input_ids"]
        assert len(ids) > 1
        block = [*ids[1:], tokenizer.eos_token_id, tokenizer.bos_token_id, *ids, tokenizer.mask_token_id, *ids[1:]]
        starts = words.starts(np.array([block, block], np.int32))
        inside = [True] + [False] * (len(ids) - 1)
        assert starts[0].tolist() == [*inside[:-1], True, True, *inside, True, *inside[:-1]], kind
        assert (starts[0] == starts[1]).all()


def test_the_rows_of_a_batch_do_not_depend_on_each_other(trained):
    words = words_of(trained["byte-level BPE"])
    blocks = np.random.default_rng(0).integers(0, 700, (40, 33)).astype(np.int32)
    together = words.starts(blocks)
    assert 0.2 < together.mean() < 0.95
    for row, block in enumerate(blocks):
        assert (words.starts(block[None]) == together[row]).all()
    assert isinstance(words, Words)
    assert words.starts(blocks[:, :1]).all()
    assert words.starts(blocks[:0]).shape == (0, 33)


def character_level() -> PreTrainedTokenizerFast:
    """Characters, with a mark in place of the space: the mark alone makes no words."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, "▁", *"abcdefghij"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


@pytest.mark.parametrize("make", [ByT5Tokenizer, CanineTokenizer, character_level])
def test_a_tokenizer_without_words_is_refused_in_one_line(make):
    with pytest.raises(ConfigError, match=r"^--mask_unit: \w+ .*--mask_unit token") as caught:
        words_of(make())
    assert "\n" not in str(caught.value)


SENTENCES = {
    "Chinese": "河边的山上有一盏灯，窗外是花园。人们看见水和火。",
    "Japanese": "川のそばの山にランプがあり、窓の外は庭です。",
    "Thai": "แม่น้ำภูเขาตะเกียงหน้าต่างสวนจดหมายกาต้มน้ำท่าเรือฤดูหนาว",
    "Khmer": "ទន្លេភ្នំចង្កៀងបង្អួចសួនច្បារ",
    "Burmese": "မြစ်တောင်မီးအိမ်ပြတင်းပေါက်ဥယျာဉ်",
}


def of_sentences(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a kind that knows the characters of SENTENCES."""
    make, options = KINDS[kind]
    tokenizer = make(**options)
    more = {"unk_token": "<unk>"} if kind == "Unigram" else {"min_frequency": 9}
    texts = [" ".join(SENTENCES.values())] * 9
    tokenizer.train_from_iterator(texts, vocab_size=400, special_tokens=SPECIAL_TOKENS, show_progress=False, **more)
    if kind == "byte-level BPE":
        return as_roberta(tokenizer, 512)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_script_has_no_spaces_no_sentence_is_a_word(kind: str):
    tokenizer = of_sentences(kind)
    words = words_of(tokenizer)
    for language, text in SENTENCES.items():
        ids = np.array([tokenizer(text, add_special_tokens=False)["input_ids"]], np.int32)
        characters = sum(unicodedata.category(character)[0] != "M" for character in text)
        assert int(words.starts(ids).sum()) <= characters + 2, language
        assert mean_word_length(words, ids, tokenizer.all_special_ids) < LONG_WORD / 2, language


def test_marks_stay_with_the_character_before_them():
    tokens = ["<s>", "ก", "##ี", "##่", "##ก", "x", "##ก", "##x", "##y"]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *tokens[1:]])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)
    ids = np.array([[vocabulary[token] for token in tokens]], np.int32)
    assert words_of(tokenizer).starts(ids)[0].tolist() == [True, True, False, False, True, True, True, True, False]


def test_the_length_of_a_word_is_seen_from_its_tokens(trained):
    tokenizer = trained["WordPiece"]
    words = words_of(tokenizer)
    parts = [token for name, token in tokenizer.get_vocab().items() if name.startswith("##")][:4]
    whole, special = tokenizer.get_vocab()["a"], tokenizer.all_special_ids
    block = [tokenizer.bos_token_id, whole, *parts, whole, whole, tokenizer.pad_token_id]
    for count in (1, 3):
        assert mean_word_length(words, np.array([block] * count, np.int32), special) == (5 * 5 + 1 + 1) / 7
    assert mean_word_length(words, np.full((2, 4), tokenizer.pad_token_id, np.int32), special) == 0.0


class OneWord:
    """Blocks of one letter, again and again."""

    block_size, has_pieces = 32, False

    def __init__(self, token: int):
        self.token = token

    def __len__(self) -> int:
        return 4

    def read(self, indices: np.ndarray) -> np.ndarray:
        return np.full((len(indices), 32), self.token, np.int32)


def test_long_words_are_named_before_training(prepared: Path, capsys):
    data = open_prepared(prepared)
    tokenizer = load_tokenizer(str(data.tokenizer_dir))
    for blocks, warned in ((data.blocks("train"), False), (OneWord(tokenizer.get_vocab()["a"]), True)):
        train_data = TrainData(data.manifest, str(data.tokenizer_dir), blocks, None)
        words_for(TrainConfig(output_dir="", mask_unit="word"), train_data)
        said = capsys.readouterr()
        assert "the word of a token has" in said.out
        assert ("words of 32.0 tokens are few in a block" in said.err) == warned


# How the Unicode names of letters and marks begin in the scripts that the table lists.
SPACELESS_NAMES = (
    *("THAI ", "LAO ", "TIBETAN ", "MYANMAR ", "KHMER ", "TAI ", "NEW TAI LUE ", "BALINESE ", "JAVANESE ", "CHAM "),
    *("HIRAGANA ", "KATAKANA ", "KATAKANA-HIRAGANA ", "HALFWIDTH KATAKANA", "COMBINING KATAKANA", "HENTAIGANA "),
    *("BOPOMOFO ", "CJK ", "YI ", "IDEOGRAPHIC ITERATION", "IDEOGRAPHIC CLOSING", "IDEOGRAPHIC NUMBER"),
    *("VERTICAL KANA", "VERTICAL IDEOGRAPHIC"),
)


@pytest.mark.parametrize(
    ("raw", "kind"), [(b"\xdf", LETTER), (b"\xe0", LETTER), (b"\xef", LETTER), (b"\xf0", OTHER), (b"\xf4", OTHER)]
)
def test_the_first_byte_of_a_character_says_what_most_of_them_are(raw: bytes, kind: int):
    assert _kind_of_part(raw) == kind


def test_the_first_and_last_characters_of_scripts_without_spaces_are_words_of_their_own():
    edges = [character for both in SPACELESS for character in map(chr, both)]
    for character in edges:
        kind = {"L": ALONE, "M": MARKS}.get(unicodedata.category(character)[0])
        assert kind is None or _kind_of(character) == kind, hex(ord(character))


def test_the_table_of_scripts_without_spaces_matches_unicode_names():
    wrong = []
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.category(character)[0] in "LM":
            named = unicodedata.name(character, "").startswith(SPACELESS_NAMES)
            if named != any(first <= code <= last for first, last in SPACELESS):
                wrong.append(unicodedata.name(character, hex(code)))
    assert wrong == ["VERTICAL IDEOGRAPHIC ITERATION MARK"]  # U+303B, which the table leaves out
