"""Rows of options that contain every pair of values: a covering array of strength two.

    refused = [{"engine": {"zero3"}, "compile": {"yes"}}]
    rows = covering_array({"engine": ["ddp", "zero3"], "compile": ["no", "yes"]}, refused)

A row has one value for each option. No row contains a refused combination.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations, product

Options = Mapping[str, Sequence[str]]
Refused = Mapping[str, Collection[str]]  # refused if each of these options has one of its values
Row = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]  # two of (option, value), in the order of the options


def covering_array(options: Options, refused: Sequence[Refused]) -> list[Row]:
    """Return rows that together contain every pair of values that is not refused, the same rows in every call.

    Each row starts with the first pair that is still missing. The other options follow, those with the most values
    first; each takes the value that adds the most missing pairs, or the first of several such values. Raises
    ValueError for a pair that is not refused itself but fits into no row.
    """
    missing = {pair: None for pair in pairs(options) if is_allowed(dict(pair), refused)}
    order = sorted(options, key=lambda option: -len(options[option]))
    rows: list[Row] = []
    while missing:
        first = next(iter(missing))
        row = _complete(dict(first), order, options, refused, missing)
        if row is None:
            raise ValueError(f"no row can contain {first}")
        rows.append({option: row[option] for option in options})
        for pair in pairs_of(rows[-1]):
            missing.pop(pair, None)
    return rows


def _complete(
    row: Row, order: Sequence[str], options: Options, refused: Sequence[Refused], missing: Collection[Pair]
) -> Row | None:
    """Return a row with a value for every option; None if no such row is allowed."""
    if not is_allowed(row, refused):
        return None
    option = next((each for each in order if each not in row), None)
    if option is None:
        return row

    def gain(value: str) -> int:
        one = (option, value)
        return sum((one, other) in missing or (other, one) in missing for other in row.items())

    for value in sorted(options[option], key=gain, reverse=True):
        found = _complete({**row, option: value}, order, options, refused, missing)
        if found is not None:
            return found
    return None


def is_allowed(row: Row, refused: Sequence[Refused]) -> bool:
    """Return whether a row, or a part of one, contains no refused combination."""
    return not any(all(row.get(option) in values for option, values in each.items()) for each in refused)


def pairs(options: Options) -> Iterator[Pair]:
    """Yield every pair of values of two different options."""
    for one, other in combinations(options, 2):
        for first, second in product(options[one], options[other]):
            yield (one, first), (other, second)


def pairs_of(row: Row) -> Iterator[Pair]:
    """Yield every pair of values in a row."""
    return combinations(row.items(), 2)
