"""Tokenizers of three kinds from a corpus: the same one each time, and one that everything else works with."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from word_starts import agreement

from cloze.cli import main
from cloze.config import PrepareConfig, TokenizerConfig
from cloze.data.prepare.pipeline import prepare
from cloze.data.prepared.shards import open_prepared
from cloze.data.tokenizer_training.train import train_tokenizer
from cloze.data.tokenizer_training.unigram import best_cut, train_unigram
from cloze.data.tokenizer_training.word_counts import count_words
from cloze.data.tokenizers.load import load_tokenizer
from cloze.errors import DataError
from cloze.evaluation.vocabulary import token_bytes
from cloze.tools.demo.corpus import write_corpus

KINDS = ["bpe", "wordpiece", "unigram"]
AROUND = {"bpe": ("<s>", "</s>"), "wordpiece": ("[CLS]", "[SEP]"), "unigram": ("<s>", "</s>")}
TEXT = "The Milky Way is a spiral galaxy, it's said."


def train(corpus: Path, output: Path, kind: str, **more):
    source = {"dataset_name": str(corpus), "text_field": "answers.text", "output": str(output)}
    return train_tokenizer(TokenizerConfig(**source, kind=kind, **{"vocab_size": 600, **more}))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    write_corpus(path, num_threads=200)
    return path


@pytest.fixture(scope="module")
def folders(corpus: Path) -> dict[str, Path]:
    found = {kind: corpus.parent / kind for kind in KINDS}
    for kind, folder in found.items():
        train(corpus, folder, kind)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_one_corpus_gives_one_tokenizer_to_the_byte_whatever_the_threads(
    corpus: Path, folders: dict[str, Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    train(corpus, tmp_path / "again", kind)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folders[kind] / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_loads_again_with_its_special_tokens_and_gives_the_text_back(folders: dict[str, Path], kind: str):
    tokenizer = load_tokenizer(str(folders[kind]))
    assert len(tokenizer) == 600
    begin, end = AROUND[kind]
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == [begin, end]
    assert tokenizer.unk_token_id not in ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert decoded.replace(" ", "") == TEXT.replace(" ", "")
    assert decoded.startswith("The Milky Way is a spiral galaxy")
    masked = tokenizer(f"The {tokenizer.mask_token} Way")["input_ids"]
    assert masked.count(tokenizer.mask_token_id) == 1
    assert len({tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, ids[0], ids[-1]}) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_words_and_bytes_are_known_of_each_kind(corpus: Path, folders: dict[str, Path], kind: str):
    tokenizer = load_tokenizer(str(folders[kind]))
    texts = [" ".join(json.loads(line)["answers"]["text"]) for line in corpus.read_text().splitlines()[:40]]
    same, total = agreement(tokenizer, texts)
    assert same == total > 1000
    text = "The Milky Way"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = 0 if kind == "bpe" else 1  # a space is thought before the first word
    assert token_bytes(tokenizer)[ids].sum() == len(text) + first


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_small_letters_are_all_there_is_where_that_is_wanted(corpus: Path, tmp_path: Path, kind: str):
    tokenizer = train(corpus, tmp_path / "small", kind, do_lower_case=True)
    loaded = load_tokenizer(str(tmp_path / "small"))
    assert loaded(TEXT)["input_ids"] == loaded(TEXT.lower())["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert not any(name.lower() != name for name in set(loaded.get_vocab()) - set(loaded.all_special_tokens))


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_small_letters_keep_the_marks_that_make_them_words(tmp_path: Path, kind: str):
    hindi, other = "हिन्दी नदी पहाड़ चिट्ठी", "Café Ångström tiếng Việt"
    (tmp_path / "c.txt").write_text(f"{hindi} {other} {other.lower()}\n" * 50)
    values = {"dataset_name": str(tmp_path / "c.txt"), "kind": kind, "vocab_size": 100, "do_lower_case": True}
    train_tokenizer(TokenizerConfig(**values, output=str(tmp_path / "t")))
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    for text in (hindi, other):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert unicodedata.normalize("NFC", tokenizer.decode(ids)) == unicodedata.normalize("NFC", text.lower())


def test_accents_are_stripped_where_that_is_wanted(tmp_path: Path):
    (tmp_path / "c.txt").write_text("Café Ångström cafe angstrom\n" * 50)
    values = {"dataset_name": str(tmp_path / "c.txt"), "kind": "wordpiece", "vocab_size": 60, "output": ""}
    for lower in (False, True):
        values |= {"output": str(tmp_path / f"t{lower}"), "do_lower_case": lower, "strip_accents": True}
        train_tokenizer(TokenizerConfig(**values))
        tokenizer = load_tokenizer(values["output"])
        assert tokenizer("Café Ångström")["input_ids"] == tokenizer("Cafe Angstrom")["input_ids"]
        assert tokenizer.unk_token_id not in tokenizer("Café")["input_ids"]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_blocks_are_made_with_it(corpus: Path, folders: dict[str, Path], tmp_path: Path, kind: str):
    source = {"dataset_name": str(corpus), "text_field": "answers.text", "tokenizer_name": str(folders[kind])}
    prepare(PrepareConfig(**source, output=str(tmp_path / "p"), block_size=32, num_proc=1))
    blocks = open_prepared(tmp_path / "p").blocks("train")
    tokenizer = load_tokenizer(str(folders[kind]))
    first = tokenizer.decode(blocks.read(np.arange(2)).reshape(-1), skip_special_tokens=True)
    text = " ".join(json.loads(line)["answers"]["text"][0] for line in corpus.read_text().splitlines())
    assert "".join(first.split())[:40] in "".join(text.split())


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--kind", "wordpiece", "--vocab_size", "5"], "--vocab_size: must be at least 6"),
        (["--kind", "unigram", "--vocab_size", "20"], "--vocab_size: its .. characters alone are more than 15 pieces"),
        (
            ["--kind", "wordpiece", "--vocab_size", "40"],
            "--vocab_size: its .* characters and 5 special tokens are more",
        ),
        (["--do_lower_case"], "--do_lower_case: byte-level BPE keeps letters as they are"),
        (["--strip_accents"], "--strip_accents: bpe keeps accents"),
        (["--strip_accents", "--kind", "unigram"], "--strip_accents: unigram keeps accents"),
        (["--kind", "sentencepiece"], "kind"),
    ],
)
def test_what_cannot_be_trained_is_one_line(corpus: Path, tmp_path: Path, capsys, flags: list[str], line: str):
    source = ["tokenizer", "--dataset_name", str(corpus), "--text_field", "answers.text"]
    with pytest.raises(SystemExit) as left:
        main([*source, "--output", str(tmp_path / "t"), *flags])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert len(said.splitlines()) == 1
    assert re.search(line, said), said
    assert not (tmp_path / "t").exists()


def test_a_corpus_without_text_is_one_line(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n \n")
    for kind in KINDS:
        with pytest.raises(DataError, match="no text"):
            train_tokenizer(
                TokenizerConfig(dataset_name=str(tmp_path / "empty.txt"), output=str(tmp_path / "t"), kind=kind)
            )


@pytest.mark.parametrize(("kind", "size"), [("unigram", 100), ("bpe", 400), ("wordpiece", 100)])
def test_a_corpus_with_too_few_pieces_is_told(tmp_path: Path, capsys, kind: str, size: int):
    (tmp_path / "small.txt").write_text("one two three two one\n" * 20)
    config = TokenizerConfig(
        dataset_name=str(tmp_path / "small.txt"), output=str(tmp_path / "t"), kind=kind, vocab_size=size
    )
    tokenizer = train_tokenizer(config)
    assert f"the corpus gives {len(tokenizer)} tokens, not {size}" in capsys.readouterr().err
    assert len(tokenizer("one two three", add_special_tokens=False)["input_ids"]) == 3


def test_counts_of_frequent_words_are_exact_when_rare_ones_have_to_be_forgotten():
    texts = [f"the cat {number} the" for number in range(5_000)]
    counts = count_words(texts, str.split, limit=100)
    assert (counts["the"], counts["cat"]) == (10_000, 5_000)
    assert len(counts) <= 101
    assert list(count_words(["b a", "c a"], str.split)) == ["a", "b", "c"]


def test_a_unigram_model_finds_the_words_that_a_text_was_made_of():
    """Words of a made-up language, written without spaces: the pieces must be words, not what two of them share."""
    draw = random.Random(0)
    letters = "abcdefghijkl"
    lexicon = ["".join(draw.choices(letters, k=draw.randint(4, 7))) for _ in range(40)]
    counts: dict[str, int] = {}
    for _ in range(1_000):
        phrase = "".join(draw.choices(lexicon, k=3))
        counts[phrase] = counts.get(phrase, 0) + 1
    pieces = dict(train_unigram(counts, 52))
    assert len(set(lexicon) & pieces.keys()) >= 36
    total = sum(len(best_cut(phrase, pieces)) * count for phrase, count in counts.items())
    assert total < 1.15 * 3 * 1_000
    assert abs(sum(np.exp(list(pieces.values()))) - 1) < 0.05


def test_the_best_cut_is_the_likeliest_of_all():
    pieces = {"a": -3.0, "b": -3.5, "ab": -5.0, "ba": -4.0, "aba": -6.5}

    def all_cuts(word: str) -> list[list[str]]:
        if not word:
            return [[]]
        heads = (word[:end] for end in range(1, len(word) + 1))
        return [[head, *rest] for head in heads if head in pieces for rest in all_cuts(word[len(head) :])]

    for word in ("ab", "aba", "abab", "babba", "aababaab"):
        best = max(sum(map(pieces.__getitem__, cut)) for cut in all_cuts(word))
        assert sum(map(pieces.__getitem__, best_cut(word, pieces))) == pytest.approx(best)
    assert best_cut("aba", pieces, without="aba") == ["a", "ba"]
