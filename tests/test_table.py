"""Rows of tables that are too long are skipped to their ends: no part of one is taken for a row."""

import random
import re

import pytest

from rag2.kb import table
from rag2.kb.plain import read_csv, read_jsonl
from rag2.kb.table import Malformed, csv_rows

BREAK = re.compile("\r\n|[\r\n]")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 60 characters at most, of longer ones 7 at a time."""
    monkeypatch.setattr(table, "LIMIT", 60)
    monkeypatch.setattr(table, "SKIP", 7)


@pytest.mark.parametrize("length", range(61, 90))
def test_a_carriage_return_ends_no_line_of_jsonl(tmp_path, length: int):
    path = tmp_path / "a.jsonl"
    smuggled = '{"text": "smuggled"}'
    path.write_text("x" * length + f'\r{smuggled}\n{{"text": "good"}}\n', newline="")
    long, good = read_jsonl(path, "a")
    assert long[0] == "a:1" and str(long[1]) == "a row of more than 60 characters"
    assert good == ("a:2", {"text": "good"})


def test_the_lines_of_a_cell_that_is_too_long_are_no_rows(tmp_path):
    path = tmp_path / "a.csv"
    cell = "\n".join(["one, two", '""three"", four'] * 9)
    path.write_text(f'text,n\n"{cell}",1\ngood,2\n"{cell}')
    rows = list(read_csv(path, "a"))
    assert [place for place, _ in rows] == ["a:2", "a:20", "a:21"]
    assert [isinstance(row, Malformed) for _, row in rows] == [True, False, True]
    assert rows[1][1] == {"text": "good", "metadata": {"n": "2"}}


def a_cell(dice: random.Random) -> tuple[str, str]:
    """A cell and how it stands in a file."""
    text = "".join(dice.choices('"",\n\rab', k=dice.choice([0, 1, 3, 9, 60])))
    if dice.random() < 0.3 and not re.search('^"|[,\r\n]', text):
        return text, text
    return text, '"' + text.replace('"', '""') + '"'


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_every_row_is_whole_or_rejected_whole(tmp_path, dice: random.Random, end: str):
    path = tmp_path / "a.csv"
    written, wanted, line = "", [], 1
    for _ in range(1000):
        cells = [a_cell(dice) for _ in range(dice.choice([2, 3, 5]))]
        row = ",".join(raw for _, raw in cells) + end
        wanted.append((f"a:{line}", [text for text, _ in cells] if len(row) <= 60 else None))
        line += len(BREAK.findall(row))
        written += row
    path.write_text(written, newline="")
    found = [
        (place, None if isinstance(row, Malformed) else row) for place, row in csv_rows(path, "a")
    ]
    assert found == wanted
    assert 150 < sum(cells is None for _, cells in found) < 850
