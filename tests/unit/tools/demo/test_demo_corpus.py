"""The sample corpus: plain true statements, the same bytes everywhere, in the shape of ELI5."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from repository import ROOT

from cloze.errors import ConfigError
from cloze.tools.demo.corpus import DOMAINS, NUM_THREADS, threads, write_corpus
from cloze.tools.demo.phrasing import read_table, say, with_pronoun

TOPICS = [
    pytest.param(domain, topic, id=f"{domain.table}-{i}")
    for domain in DOMAINS
    for i, topic in enumerate(domain.topics)
]


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, Any]]:
    return list(threads())


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """Every question and statement that the corpus can hold, whatever the seed."""
    said = []
    for domain in DOMAINS:
        for topic in domain.topics:
            for row in domain.rows(topic):
                said += [say(text, row) for text in topic.questions + topic.statements]
                if domain.pronoun:
                    said += [say(with_pronoun(text, domain.pronoun), row) for text in topic.statements]
    return said


def test_the_corpus_is_the_same_bytes_twice_and_under_another_hash_seed(tmp_path):
    code = "import sys; from cloze.tools.demo.corpus import write_corpus as write; "
    code += "write(sys.argv[1], seed=3, num_threads=400)"
    for hash_seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / hash_seed)],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
        )
    assert write_corpus(tmp_path / "here.jsonl", seed=3, num_threads=400) == 400
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == (tmp_path / "here.jsonl").read_bytes()


def test_another_seed_is_another_corpus_and_fewer_threads_are_its_beginning():
    assert list(threads(seed=0, num_threads=20)) == list(threads(seed=0, num_threads=50))[:20]
    titles = [[thread["title"] for thread in threads(seed, 50)] for seed in (0, 1)]
    assert titles[0] != titles[1]


def test_a_written_corpus_is_one_json_object_a_line_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "new" / "corpus.jsonl"
    assert write_corpus(path, num_threads=30) == 30
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == list(threads(0, 30))
    assert [file.name for file in path.parent.iterdir()] == ["corpus.jsonl"]


def test_a_corpus_of_nothing_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="at least 1"):
        write_corpus(tmp_path / "corpus.jsonl", num_threads=0)
    assert not list(tmp_path.iterdir())


def test_threads_have_exactly_the_fields_of_eli5(corpus):
    for thread in corpus:
        assert list(thread) == [
            "q_id", "title", "selftext", "document", "subreddit", "answers",
            "title_urls", "selftext_urls", "answers_urls",
        ]  # fmt: skip
        answers = thread["answers"]
        assert list(answers) == ["a_id", "text", "score"]
        assert len(answers["a_id"]) == len(answers["text"]) == len(answers["score"]) >= 1
        assert all(isinstance(score, int) for score in answers["score"])
        assert all(isinstance(text, str) for text in answers["text"])
        for field in ("q_id", "title", "selftext", "document", "subreddit"):
            assert isinstance(thread[field], str)
        for field in ("title_urls", "selftext_urls", "answers_urls"):
            assert thread[field] == {"url": []}
    assert Counter(thread["subreddit"] for thread in corpus).most_common(1)[0][0] == "askscience"


def test_ids_are_unique_and_no_thread_gives_an_answer_twice(corpus):
    assert len({thread["q_id"] for thread in corpus}) == len(corpus) == NUM_THREADS
    ids = [a_id for thread in corpus for a_id in thread["answers"]["a_id"]]
    assert len(set(ids)) == len(ids)
    assert all(len(set(thread["answers"]["text"])) == len(thread["answers"]["text"]) for thread in corpus)


def test_the_corpus_is_about_hundreds_of_things_in_more_than_ten_domains(corpus):
    entities = {f"{domain.table}: {row['name']}" for domain in DOMAINS for row in read_table(domain.table)}
    assert len(entities) >= 300
    assert len(DOMAINS) >= 10
    text = " ".join(answer for thread in corpus for answer in thread["answers"]["text"]).lower()
    silent = {entity for entity in entities if entity.split(": ")[1].lower() not in text}
    assert not silent


def test_every_answer_is_whole_sentences(corpus):
    for thread in corpus:
        assert re.fullmatch(r"[A-Z][^{}]*\?", thread["title"])
        for answer in thread["answers"]["text"]:
            assert re.fullmatch(r"[A-Z][^{}]*[.!]", answer), answer
            assert "  " not in answer
            for sentence in re.split(r"(?<=[.!]) ", answer):
                assert sentence[0].isupper(), answer


def test_no_answer_begins_with_a_pronoun(corpus):
    answers = [answer for thread in corpus for answer in thread["answers"]["text"]]
    assert any(" It " in answer for answer in answers)
    assert not [answer for answer in answers if re.match(r"It (?!was .*\bwho\b)", answer)]


def test_a_pronoun_follows_a_sentence_about_the_thing_it_stands_for(corpus):
    def bare(text: str) -> str:
        return re.sub(r"^(the|an?) ", "", text.lower())

    names = tuple(bare(row["name"]) for domain in DOMAINS for row in read_table(domain.table))
    checked = 0
    for thread in corpus:
        for answer in thread["answers"]["text"]:
            said = re.split(r"(?<=[.!]) ", answer)
            for before, sentence in pairwise(said):
                if re.match(r"It (?!was .*\bwho\b)", sentence):  # It was Jane Austen who wrote Emma.
                    assert bare(before).startswith(names), answer
                    checked += 1
    assert checked > 100


def test_sentences_have_no_gaps_and_one_full_stop(sentences):
    for sentence in sentences:
        assert re.fullmatch(r"\S+( \S+)+[.?]", sentence), sentence
        assert not re.search(r"[{}]|[ ,.?][.,?]|\bNone\b", sentence), sentence
        assert sentence[0].isupper(), sentence


def test_articles_fit_the_sound_that_follows(sentences):
    sounds_like_you = ("uni", "uran", "uku", "eu", "one", "use")
    silent_h = ("hour", "honest", "heir")
    seen: set[str] = set()
    for sentence in sentences:
        for article, word in re.findall(r"\b([Aa]n?) ([A-Za-z]+)", sentence):
            vowel = word.lower().startswith(silent_h) or (
                word[0].lower() in "aeiou" and not word.lower().startswith(sounds_like_you)
            )
            assert article.lower() == ("an" if vowel else "a"), sentence
            seen.add(f"{article.lower()} {word}")
    assert {"an owl", "an hour", "a ukulele", "a spiral", "an elliptical"} <= seen


def test_numbers_agree_with_what_they_count(sentences):
    wrong = r"\bone (moons|legs|sides|days)\b|\b(no|two|many) moon\b|\b(are|have) one\b"
    assert not [sentence for sentence in sentences if re.search(wrong, sentence)]


@pytest.mark.parametrize(("domain", "topic"), TOPICS)
def test_a_topic_has_facts_and_several_phrasings(domain, topic):
    assert len(domain.rows(topic)) >= 1
    assert len(set(topic.questions)) >= 2
    assert len(set(topic.statements)) >= 4
    assert len(topic.statements) == len(set(topic.statements))
    for statement in topic.statements:  # a thing and a fact: nothing that is true of everything
        assert len(set(re.findall(r"\{(?:an? )?(\w+)\}", statement.lower()))) >= 2, statement


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.table)
def test_a_table_says_a_thing_once_and_every_column_is_used(domain):
    table = read_table(domain.table)
    names = [row["name"] for row in table]
    assert len(set(names)) == len(names)
    for row in table:
        assert None not in row
        assert None not in row.values(), row
        assert all(value == value.strip() for value in row.values())
    used = frozenset().union(*(topic.columns for topic in domain.topics)) | {"times"}
    assert set(table[0]) <= used
    told = {row["name"] for topic in domain.topics for row in domain.rows(topic)}
    assert told == set(names)


def test_facts_that_must_be_one_to_one_are():
    elements = read_table("elements")
    numbers = [int(row["number"]) for row in elements]
    assert numbers == sorted(set(numbers))
    assert len({row["symbol"] for row in elements}) == len(elements)
    countries = read_table("countries")
    assert len({row["capital"] for row in countries}) == len(countries)
    calendar = {row["name"]: row for row in read_table("calendar")}
    for name, row in calendar.items():
        assert calendar[row["after"]]["before"] == name
        assert calendar[row["after"]]["kind"] == row["kind"]


def test_what_the_demo_asks_for_is_said_often_and_never_contradicted(corpus):
    said = Counter(
        sentence
        for thread in corpus
        for answer in thread["answers"]["text"]
        for sentence in re.split(r"(?<=[.!]) ", answer)
    )
    for words, least in (
        (("the milky way", "spiral"), 50),
        (("andromeda galaxy", "spiral"), 20),
        (("messier 87", "elliptical"), 20),
        (("large magellanic cloud", "irregular"), 10),
        (("france", "capital", "paris"), 10),
        (("dog ", "mammal"), 10),
        (("gold", "symbol", " au"), 5),
    ):
        found = {text: count for text, count in said.items() if all(word in text.lower() for word in words)}
        assert sum(found.values()) >= least, words
        assert len(found) >= 4, words
    for text in said:
        if "Milky Way" in text:
            assert "elliptical" not in text
            assert "irregular" not in text


def test_the_facts_travel_with_the_package():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"tools/demo/facts/*.csv"' in pyproject
