"""How facts are said: questions and statements with places for the columns of a fact table.

`{name}` is a column of the table, `{a name}` the same with its article; a capital letter (`{Name}`, `{A name}`) begins
a sentence. A statement is true of every row that has a value in all of its topic's columns.

    say("{A name} is {a group}.", {"name": "owl", "group": "bird"})        # An owl is a bird.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources

Row = dict[str, str]

_PLACE = re.compile(r"\{([aA] )?(\w+)\}")
# By sound, not by letter: a unit, a European, a one-way street; an hour, an uncle.
_VOWEL_SOUND = re.compile(
    r"(?:hour|honest|heir|(?!eu|ewe|one\b|once|uni|ura|uri|use|usu|uku|ute)[aeiou])", re.IGNORECASE
)
_SUBJECT = re.compile(r"(?:The \{name\}|\{Name\}|\{A name\}) ")


@dataclass(frozen=True)
class Topic:
    """One thing that can be asked about an entity: the questions, and the statements that answer them.

    `weight` says how often it is asked, against the other topics of its domain.
    """

    questions: tuple[str, ...]
    statements: tuple[str, ...]
    weight: int = 1

    @cached_property
    def columns(self) -> frozenset[str]:
        """Return the columns that a row needs."""
        return frozenset(
            column.lower() for text in self.questions + self.statements for _, column in _PLACE.findall(text)
        )


@dataclass(frozen=True)
class Domain:
    """One fact table: how often it is talked about, and what about it.

    `pronoun` can stand for an entity that the sentence before was about; empty if none fits them all.
    """

    table: str
    weight: int
    topics: tuple[Topic, ...]
    pronoun: str = "It"

    def rows(self, topic: Topic) -> tuple[Row, ...]:
        """Return the rows that know everything the topic needs; well-known ones as often as their column `times`
        says."""
        return _rows(self.table, topic.columns)


@cache
def read_table(table: str) -> tuple[Row, ...]:
    """Return the rows of a fact table."""
    text = resources.files(__package__).joinpath("facts", f"{table}.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))


@cache
def _rows(table: str, columns: frozenset[str]) -> tuple[Row, ...]:
    known = (row for row in read_table(table) if all(row[column] for column in columns))
    return tuple(row for row in known for _ in range(int(row.get("times") or 1)))


def say(template: str, row: Row) -> str:
    """Fill a template's places with a row's values."""

    def fill(match: re.Match[str]) -> str:
        article, column = match.groups()
        value = row[column.lower()]
        if article:
            value = f"{'an' if _VOWEL_SOUND.match(value) else 'a'} {value}"
        begins_sentence = (article or column)[0].isupper()
        return value[0].upper() + value[1:] if begins_sentence else value

    return _PLACE.sub(fill, template)


def begins_with_entity(template: str) -> bool:
    """Return whether the entity is the subject of the sentence, so that a pronoun can stand for it."""
    return _SUBJECT.match(template) is not None


def with_pronoun(template: str, pronoun: str) -> str:
    """Return the template with a pronoun for its subject: `{A name} eats {diet}.` -> `It eats {diet}.`"""
    return _SUBJECT.sub(f"{pronoun} ", template)
