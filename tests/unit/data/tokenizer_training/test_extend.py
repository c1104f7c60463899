"""A pretrained tokenizer gets tokens of another domain; all that it had and did before stays."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import models

from cloze.cli import main
from cloze.cli.commands import tokenizer as command
from cloze.config import TokenizerConfig
from cloze.data.tokenizer_training.bpe_merges import learn_merges
from cloze.data.tokenizer_training.extend import Saving, extend_tokenizer
from cloze.data.tokenizer_training.train import train_tokenizer
from cloze.data.tokenizers.load import load_tokenizer
from cloze.data.tokenizers.select_encoder import NASTY_TEXTS, choose_encoder
from cloze.tools.demo.corpus import write_corpus

PARTS = ["cardio", "myo", "patho", "neuro", "itis", "ectomy", "osis", "gram", "logy", "pathy", "cyto", "hepato"]
OTHER_TEXTS = ["The Milky Way is a spiral galaxy.", "naïve café 12.5 km, über 北京 🙂!", "don't   stop\nhere"]
KINDS = ["bpe", "wordpiece", "unigram"]


def domain_texts(count: int) -> list[str]:
    """Texts of a medicine that does not exist, from words that a general corpus has never seen."""
    draw = random.Random(0)
    words = ["".join(draw.sample(PARTS, draw.randint(2, 3))) for _ in range(60)]
    plain = ["the", "patient", "has", "a", "severe", "case", "of", "and", "was", "given"]
    return [" ".join(draw.choice(words if draw.random() < 0.4 else plain) for _ in range(30)) for _ in range(count)]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """general.jsonl, domain.txt, and a tokenizer of each kind trained on the former."""
    folder = tmp_path_factory.mktemp("extend")
    write_corpus(folder / "general.jsonl", num_threads=60)
    (folder / "domain.txt").write_text("\n".join(domain_texts(150)))
    for kind in KINDS:
        train_tokenizer(
            TokenizerConfig(
                dataset_name=str(folder / "general.jsonl"),
                text_field="answers.text",
                output=str(folder / kind),
                kind=kind,
                vocab_size=500,
            )
        )
    return folder


@pytest.fixture(scope="module")
def extended(places: Path):
    found = {}
    for kind in KINDS:
        config = TokenizerConfig(
            dataset_name=str(places / "domain.txt"),
            output=str(places / f"{kind}-extended"),
            extend=str(places / kind),
            new_tokens=50,
        )
        _, saving = extend_tokenizer(config)
        found[kind] = load_tokenizer(str(places / kind)), load_tokenizer(config.output), saving
    return found


def made_of(old, new) -> dict[int, list[int]]:
    """New token -> the old tokens that its text is cut into, asked of the old tokenizer's model."""
    names = {token: name for name, token in new.get_vocab().items()}
    model = old.backend_tokenizer.model
    return {token: [one.id for one in model.tokenize(names[token])] for token in range(len(old), len(new))}


def in_old_tokens(ids: list[int], parts: dict[int, list[int]]) -> list[int]:
    return [old for token in ids for old in parts.get(token, [token])]


@pytest.mark.parametrize("kind", KINDS)
def test_old_tokens_keep_their_ids_and_new_ones_follow(extended, kind: str):
    old, new, saving = extended[kind]
    assert old.get_vocab().items() <= new.get_vocab().items()
    assert sorted(set(new.get_vocab().values()) - set(old.get_vocab().values())) == list(range(len(old), len(new)))
    assert len(new) == len(old) + saving.added == len(old) + 50
    assert (new.mask_token_id, new.pad_token_id) == (old.mask_token_id, old.pad_token_id)
    assert new(OTHER_TEXTS[0])["input_ids"][:1] == old(OTHER_TEXTS[0])["input_ids"][:1]
    assert type(new) is type(old)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_text_is_cut_as_before_but_for_neighbours_that_became_one(extended, kind: str):
    old, new, _ = extended[kind]
    parts = made_of(old, new)
    for text in [*domain_texts(40), *OTHER_TEXTS, *NASTY_TEXTS[:12]]:
        assert in_old_tokens(new(text, verbose=False)["input_ids"], parts) == old(text, verbose=False)["input_ids"]


def test_wordpiece_cuts_words_as_before_that_do_not_begin_with_a_new_token(extended):
    old, new, _ = extended["wordpiece"]
    added = tuple(new.convert_ids_to_tokens(list(range(len(old), len(new)))))
    for text in [*OTHER_TEXTS, *NASTY_TEXTS[:12]]:
        kept = " ".join(word for word in text.split() if not word.startswith(added))
        assert new(kept)["input_ids"] == old(kept)["input_ids"]
    for word in added:
        assert len(new(word, add_special_tokens=False)["input_ids"]) == 1 < len(old(word)["input_ids"]) - 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_to_be_saved_is_what_the_tokenizers_save(extended, kind: str):
    old, new, saving = extended[kind]
    for tokenizer, said in ((old, saving.before), (new, saving.after)):
        assert said == sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in domain_texts(150))
    assert saving.after < 0.7 * saving.before


def with_one_token(places: Path, kind: str, folder: Path) -> Saving:
    """What the best single token of the domain saves."""
    source = {"dataset_name": str(places / "domain.txt"), "extend": str(places / kind)}
    return extend_tokenizer(TokenizerConfig(**source, output=str(folder / "one"), new_tokens=1))[1]


def test_no_other_choice_of_one_token_saves_more(places: Path, tmp_path: Path):
    """All pairs of neighbouring tokens, counted the slow way."""
    old = load_tokenizer(str(places / "bpe"))
    counts: dict[tuple[int, int], int] = {}
    for text in domain_texts(150):
        ids = old(text, add_special_tokens=False)["input_ids"]
        words = old(text, add_special_tokens=False).word_ids()
        for (one, other), (here, there) in zip(pairwise(ids), pairwise(words), strict=True):
            if here == there:
                counts[one, other] = counts.get((one, other), 0) + 1
    saving = with_one_token(places, "bpe", tmp_path)
    assert saving.before - saving.after == max(counts.values())


def test_no_other_word_saves_a_wordpiece_tokenizer_more(places: Path, tmp_path: Path):
    """Every word of the domain tried as the new token, also for the words that only begin with it."""
    old = load_tokenizer(str(places / "wordpiece"))
    vocabulary = old.backend_tokenizer.get_vocab()
    words = Counter(word for text in domain_texts(150) for word in text.split())

    def tokens_with(new: dict[str, int]) -> int:
        model = models.WordPiece(vocab={**vocabulary, **new}, unk_token="[UNK]")
        return sum(len(model.tokenize(word)) * count for word, count in words.items())

    saving = with_one_token(places, "wordpiece", tmp_path)
    assert saving.before == tokens_with({})
    assert saving.after == min(tokens_with({word: len(vocabulary)}) for word in words)


def test_gigatoken_gives_the_ids_of_an_extended_tokenizer(extended):
    pytest.importorskip("gigatoken")
    assert choose_encoder(extended["bpe"][1], "auto", False, domain_texts(20)).backend == "gigatoken"


def test_the_command_tells_what_it_saved_and_what_to_do_next(places: Path, tmp_path: Path, capsys):
    command.run(
        TokenizerConfig(
            dataset_name=str(places / "domain.txt"),
            output=str(tmp_path / "t"),
            extend=str(places / "bpe"),
            new_tokens=5,
        )
    )
    said = capsys.readouterr().out
    assert "5 tokens added; the corpus' words: " in said
    assert f"cloze grow MODEL --tokenizer {tmp_path / 't'}" in said


@pytest.mark.parametrize("name", ["roberta-base", "bert-base-uncased"])
def test_real_tokenizers_can_be_extended(shared_data: Path, places: Path, tmp_path: Path, name: str, figure):
    source = shared_data / "tokenizers" / name
    config = TokenizerConfig(
        dataset_name=str(places / "domain.txt"), output=str(tmp_path / "t"), extend=str(source), new_tokens=40
    )
    _, saving = extend_tokenizer(config)
    old, new = load_tokenizer(str(source)), load_tokenizer(config.output)
    assert saving.after < 0.75 * saving.before
    figure(
        f"{name} with 40 tokens of a made-up domain: share of the domain's tokens saved",
        1 - saving.after / saving.before,
    )
    assert new.mask_token_id == old.mask_token_id
    parts = made_of(old, new)
    for text in [*domain_texts(20), *OTHER_TEXTS, *NASTY_TEXTS[:12]]:
        ids = new(text, verbose=False)["input_ids"]
        if name == "roberta-base":
            assert in_old_tokens(ids, parts) == old(text, verbose=False)["input_ids"]
        elif text in OTHER_TEXTS:
            assert ids == old(text)["input_ids"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--extend", "bpe", "--min_frequency", "100000"], "domain.txt: there is nothing to add"),
        (["--extend", "bpe", "--new_tokens", "0"], "--new_tokens: must be at least 1"),
        (["--extend", "nowhere/at/all"], "cannot load the tokenizer"),
        (["--extend", "bpe", "--kind", "unigram"], "--kind: .* is BPE; leave it out"),
        (["--extend", "slow"], "EsmTokenizer has no tokenizer.json, and cannot be extended"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_what_cannot_be_extended_is_one_line(
    places: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, flags: list[str], line: str
):
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *"LAGV", "<mask>"]))
    (slow / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "EsmTokenizer"}))
    flags = [str(slow) if flag == "slow" else str(places / "bpe") if flag == "bpe" else flag for flag in flags]
    with pytest.raises(SystemExit) as left:
        main(["tokenizer", "--dataset_name", str(places / "domain.txt"), "--output", str(tmp_path / "t"), *flags])
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert len(said.splitlines()) == 1
    assert re.search(line, said), said
    assert not (tmp_path / "t").exists()


def test_merges_are_learned_as_by_counting_anew_after_each():
    draw = random.Random(1)
    words = [("".join(draw.choices("abc", k=draw.randint(1, 9))), draw.randint(1, 9)) for _ in range(200)]
    found = learn_merges([(list(word), count) for word, count in words], 30, 2, set("abc"))
    cuts = [(list(word), count) for word, count in words]
    expected: list[tuple[str, str]] = []
    while len(expected) < 30:
        counts: dict[tuple[str, str], int] = {}
        for tokens, count in cuts:
            for pair in pairwise(tokens):
                counts[pair] = counts.get(pair, 0) + count
        made = {one + other for one, other in expected}
        left = {pair: count for pair, count in counts.items() if "".join(pair) not in made and count >= 2}
        if not left:
            break
        best = min(left, key=lambda pair: (-left[pair], pair))
        expected.append(best)
        cuts = [(merged(tokens, best), count) for tokens, count in cuts]
    assert found == expected
    assert len(found) == 30


def merged(tokens: list[str], pair: tuple[str, str]) -> list[str]:
    rest, done = list(tokens), []
    while rest:
        if tuple(rest[:2]) == pair:
            done.append(rest.pop(0) + rest.pop(0))
        else:
            done.append(rest.pop(0))
    return done
