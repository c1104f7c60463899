"""The sample corpus: threads of questions and answers in the shape of ELI5, made of plain true statements.

Small enough to be learned from nothing in minutes on a laptop, and rich enough that a model which has learned it
fills masks sensibly. The facts are tables written by hand (facts/*.csv), the phrasings are in `sky`, `science`,
`living`, `world` and `everyday`; everything is a pure function of the seed.

    write_corpus(Path("corpus.jsonl"))
    next(threads(seed=0, num_threads=1))["answers"]["text"]     # ["A zebra is a mammal. It eats grass."]
"""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from cloze.errors import ConfigError
from cloze.tools.demo import everyday, living, science, sky, world
from cloze.tools.demo.phrasing import Domain, Row, Topic, begins_with_entity, say, with_pronoun
from cloze.utils.atomic_files import disk_errors, write_text

NUM_THREADS = 10_000
DOMAINS = sky.DOMAINS + science.DOMAINS + living.DOMAINS + world.DOMAINS + everyday.DOMAINS

_NUM_ANSWERS = (1, 1, 1, 2, 2, 3)
_SUBREDDITS = ("askscience",) * 9 + ("explainlikeimfive",)
_SELFTEXTS = ("",) * 7 + ("Please explain it in simple words.", "We talked about this at school.")
_OPENERS = ("Good question!", "The answer is short.", "Here is what I know.")

T = TypeVar("T")
Weighted = TypeVar("Weighted", Domain, Topic)


def write_corpus(path: Path | str, seed: int = 0, num_threads: int = NUM_THREADS) -> int:
    """Write the corpus as JSON lines, whole or not at all; return the number of threads.

    Raises ConfigError for a number of threads below one, DiskError if nothing can be written.
    """
    if num_threads < 1:
        raise ConfigError("must be at least 1", where="num_threads")
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(thread, ensure_ascii=False) + "\n" for thread in threads(seed, num_threads)))
    return num_threads


def threads(seed: int = 0, num_threads: int = NUM_THREADS) -> Iterator[dict[str, Any]]:
    """Yield records with the fields of the original ELI5 dataset. Thread i is the same whatever `num_threads` is."""
    for number in range(num_threads):
        rng = random.Random(f"{seed}/{number}")  # seeded by a SHA-512 of the text, not by hash()
        domain = _pick_weighted(rng, DOMAINS)
        topic = _pick_weighted(rng, domain.topics)
        row = _pick(rng, domain.rows(topic))
        answers = list(dict.fromkeys(_answer(rng, domain, topic, row) for _ in range(_pick(rng, _NUM_ANSWERS))))
        q_id = f"s{seed}t{number:06d}"
        yield {
            "q_id": q_id,
            "title": say(_pick(rng, topic.questions), row),
            "selftext": _pick(rng, _SELFTEXTS),
            "document": "",
            "subreddit": _pick(rng, _SUBREDDITS),
            "answers": {
                "a_id": [f"{q_id}a{i}" for i in range(len(answers))],
                "text": answers,
                "score": sorted((1 + int(99 * rng.random()) for _ in answers), reverse=True),
            },
            "title_urls": {"url": []},
            "selftext_urls": {"url": []},
            "answers_urls": {"url": []},
        }


def _answer(rng: random.Random, domain: Domain, topic: Topic, row: Row) -> str:
    """Return one to three statements: the answer, and at random more about this entity or the same about another."""
    statement = _pick(rng, topic.statements)
    sentences = [say(statement, row)]
    more = [other for other in domain.topics if other is not topic and row in domain.rows(other)]
    if more and rng.random() < 0.5:
        next_statement = _pick(rng, _pick(rng, more).statements)
        if domain.pronoun and begins_with_entity(statement) and rng.random() < 0.5:
            next_statement = with_pronoun(next_statement, domain.pronoun)
        sentences.append(say(next_statement, row))
    if rng.random() < 0.3:
        another = _pick(rng, domain.rows(topic))
        if another is not row:
            sentences.append(say(_pick(rng, topic.statements), another))
    if rng.random() < 0.05:
        sentences.insert(0, _pick(rng, _OPENERS))
    return " ".join(sentences)


def _pick_weighted(rng: random.Random, choices: Sequence[Weighted]) -> Weighted:
    ends = list(accumulate(choice.weight for choice in choices))
    return choices[bisect_right(ends, int(rng.random() * ends[-1]))]


def _pick(rng: random.Random, choices: Sequence[T]) -> T:
    """Choose one of `choices`. Python guarantees the same `random()` in every version, but not the same `choice()`."""
    return choices[int(rng.random() * len(choices))]
