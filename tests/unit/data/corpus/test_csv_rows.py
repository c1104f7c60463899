"""Rows of CSV: broken ones and stray quotes are named, and no row is swallowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus_files import TEXTS, put, refused, texts_of

ROWS = [f"{number},{text}\n" for number, text in enumerate(TEXTS)]
BAD_CSV = {
    "to the end": ('7,"never closed\n', "record 31 (line 32): the quote that opens here is not closed properly"),
    "to the next quote": (
        '7,"never closed\n8,"closed"\n',
        "record 31 (line 32): the quote that opens here is not closed properly",
    ),
    "inside": ('7,"He said "hi" to me"\n', "record 31: not CSV"),
    "too many": ("7,Hello, world\n", "record 31: 3 fields, but the header has 2"),
    "too few": ("7\n", "record 31: 1 fields, but the header has 2"),
}


@pytest.mark.parametrize(("row", "expected"), BAD_CSV.values(), ids=BAD_CSV)
def test_a_broken_row_of_csv_is_named(tmp_path: Path, row: str, expected: str):
    put(tmp_path / "c.csv", "id,text\n" + "".join(ROWS[:30]) + row + "".join(ROWS[30:]))
    assert expected in refused(tmp_path / "c.csv")


PROSE = ["Why, oh why?\n\nBecause.", "One line,\nand one more,\nof prose", "No separators\nin these\nlines of text"]


def table(width: int, separator: str, texts: list[str]) -> str:
    """A file of rows `n, tag, ..., text` whose last column is not quoted."""
    names = ["id", *(f"tag{number}" for number in range(width - 2)), "text"]
    rows = [names, *([str(number), *["x"] * (width - 2), text] for number, text in enumerate(texts))]
    return "".join(separator.join(row[-width:]) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("suffix", "width", "last"),
    [("csv", 2, 30), ("csv", 2, 12), ("csv", 4, 11), ("tsv", 2, 11), ("tsv", 5, 30)],
    ids=["many rows", "two rows", "one row of four fields", "one row of tabs", "many rows of tabs"],
)
def test_two_stray_quotes_do_not_swallow_rows(tmp_path: Path, suffix: str, width: int, last: int):
    texts = [*TEXTS]
    texts[10], texts[last] = f'"{texts[10]}', f'{texts[last]}"'
    put(tmp_path / f"c.{suffix}", table(width, "\t" if suffix == "tsv" else ",", texts))
    assert "record 11: a quoted field takes in lines that look like rows" in refused(tmp_path / f"c.{suffix}")


def test_stray_quotes_may_stand_in_any_column_and_in_the_header(tmp_path: Path):
    rows = table(2, ",", TEXTS).splitlines(keepends=True)
    rows[11], rows[31] = f'"{rows[11]}', rows[31].replace(",", '",')
    put(tmp_path / "c.csv", "\r\n".join(row.strip() for row in rows))
    assert "record 11: a quoted field takes in lines that look like rows" in refused(tmp_path / "c.csv")
    put(tmp_path / "d.csv", 'text,"id\n' + "".join(f"{text},7\n" for text in TEXTS[:5]) + 'x,7"\ny,8\n')
    assert "a quoted field of the header takes in lines" in refused(tmp_path / "d.csv")


@pytest.mark.parametrize("width", [1, 2, 3])
def test_texts_of_several_lines_are_no_stray_quotes(tmp_path: Path, width: int, capsys: pytest.CaptureFixture[str]):
    texts = [*TEXTS, *(f'"{text}"' for text in PROSE)]
    put(tmp_path / "c.csv", table(width, ",", texts))
    assert texts_of(tmp_path / "c.csv") == [*TEXTS, *PROSE]
    assert "warning" not in capsys.readouterr().err


def test_the_only_long_row_of_a_single_column_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    texts = [*TEXTS]
    texts[10], texts[30] = f'"{texts[10]}', f'{texts[30]}"'
    put(tmp_path / "c.csv", table(1, ",", texts))
    assert len(texts_of(tmp_path / "c.csv")) == 40
    assert "c.csv, record 11 (line 12) is a quoted text of 21 lines" in capsys.readouterr().err


def test_the_separator_of_csv_is_not_guessed(tmp_path: Path):
    put(tmp_path / "c.tsv", "id\ttext\n1\tone, two\n")
    assert texts_of(tmp_path / "c.tsv") == ["one, two"]
    put(tmp_path / "c.csv", "id;text\n1;one, two\n")
    assert "its columns are separated by semicolons" in refused(tmp_path / "c.csv")
    put(tmp_path / "d.csv", "text,text\n1,2\n")
    assert "has 2 columns 'text'" in refused(tmp_path / "d.csv")


def test_a_table_of_very_many_columns_costs_no_more_than_its_bytes(tmp_path: Path):
    names = ",".join(f"c{number}" for number in range(300_000))
    put(tmp_path / "c.csv", f"{names},text\n" + "," * 300_000 + "words\n")
    assert texts_of(tmp_path / "c.csv") == ["words"]
    assert len(refused(tmp_path / "c.csv", text_field="body")) < 1000
