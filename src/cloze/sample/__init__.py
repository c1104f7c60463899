"""The sample corpus: threads of questions and answers in the shape of ELI5, made of plain true statements.

Small enough to be learned from nothing in minutes on a laptop, and rich enough that a model which has learned it
fills masks sensibly. The facts are tables (facts/*.csv), the phrasings are in `templates`; everything is a pure
function of the seed.

    write_corpus(Path("corpus.jsonl"))
    next(threads(seed=0, num_threads=1))["answers"]["text"]
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from cloze.files import write_text
from cloze.sample.templates import DOMAINS, Domain

NUM_THREADS = 6000
_PLACE = re.compile(r"\{([aA] )?(\w+)\}")
_AN = re.compile(r"^(?:[aeio]|u(?!n[i]|ran|kul|s))", re.IGNORECASE)  # an apple, an uncle; but a unit, a ukulele
_ON_THE = ("farm", "coast")


def write_corpus(path: Path, seed: int = 0, num_threads: int = NUM_THREADS) -> int:
    """Write the corpus as JSON lines, whole or not at all; return the number of threads."""
    write_text(path, "".join(json.dumps(thread) + "\n" for thread in threads(seed, num_threads)))
    return num_threads


def threads(seed: int = 0, num_threads: int = NUM_THREADS) -> Iterator[dict[str, Any]]:
    """Records with the fields of the original ELI5 dataset."""
    for number in range(num_threads):
        rng = random.Random(f"{seed}/{number}")
        domain = rng.choices(DOMAINS, [domain.weight for domain in DOMAINS])[0]
        row = rng.choice(rows(domain.table))
        answers = list(dict.fromkeys(answer(rng, domain, row) for _ in range(rng.choice((1, 1, 2, 2, 3)))))
        q_id = f"s{seed}t{number:06d}"
        yield {
            "q_id": q_id,
            "title": say(rng.choice(domain.questions), row),
            "selftext": "",
            "document": "",
            "subreddit": "askscience",
            "answers": {
                "a_id": [f"{q_id}a{i}" for i in range(len(answers))],
                "text": answers,
                "score": sorted((rng.randint(1, 99) for _ in answers), reverse=True),
            },
            "title_urls": {"url": []},
            "selftext_urls": {"url": []},
            "answers_urls": {"url": []},
        }


def answer(rng: random.Random, domain: Domain, row: dict[str, str]) -> str:
    """One to four statements, the first about what was asked, some of the others about its neighbours."""
    statements = rng.sample(domain.statements, min(len(domain.statements), rng.randint(1, 3)))
    sentences = [say(statement, row) for statement in statements]
    if rng.random() < 0.4:
        sentences.append(say(rng.choice(domain.statements), rng.choice(rows(domain.table))))
    return " ".join(sentences)


def say(template: str, row: dict[str, str]) -> str:
    """Fill a template's places with a row's values."""

    def fill(match: re.Match[str]) -> str:
        article, column = match.groups()
        value = row[column.lower()]
        if article:
            value = f"{'an' if _AN.match(value) else 'a'} {value}"
        begins_sentence = (article or column)[0].isupper()
        return value[0].upper() + value[1:] if begins_sentence else value

    return _PLACE.sub(fill, template)


@cache
def rows(table: str) -> tuple[dict[str, str], ...]:
    """The rows of a fact table."""
    text = resources.files(__package__).joinpath("facts", f"{table}.csv").read_text(encoding="utf-8")
    found = tuple(csv.DictReader(text.splitlines()))
    if table == "animals":
        for row in found:
            row["home"] = f"{'on' if row['home'] in _ON_THE else 'in'} the {row['home']}"
    return found


def entities() -> set[str]:
    """Everything that the corpus knows something about."""
    return {f"{domain.table}: {row['name']}" for domain in DOMAINS for row in rows(domain.table)}
