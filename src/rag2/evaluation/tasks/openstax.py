"""An OpenStax textbook: its sections as documents and, where it has them, its review questions.

The folder holds `paragraphs.jsonl.gz`, rows `{"module", "title", "text"}` in the order of the book,
and perhaps `mc.jsonl`, rows `{"module", "title", "question", "choices", "answer"}`.
"""

from collections.abc import Iterator
from pathlib import Path

from rag2.evaluation.tasks.source import Item, Malformed, by_hash, field, jsonl_rows, strings
from rag2.types import Document


def read(source: Path) -> Iterator[Item]:
    """The sections, then the questions, each with its section as evidence.

    Ids begin with the folder's name: module numbers repeat from book to book. A section's questions
    stay together: its hash puts 40 % of sections into train, 20 % validation, 40 % test.
    """
    book = source.resolve().name
    yield from _sections(source / "paragraphs.jsonl.gz", book)
    if (source / "mc.jsonl").exists():
        yield from _questions(source / "mc.jsonl", book)


def _sections(path: Path, book: str) -> Iterator[Item]:
    """One document per module, its paragraphs apart by an empty line; at the place of the first."""
    places: dict[str, str] = {}
    titles: dict[str, str] = {}
    texts: dict[str, list[str]] = {}
    for place, row in jsonl_rows(path):
        try:
            if isinstance(row, Malformed):
                raise row
            module, title, text = (field(row, key, str) for key in ("module", "title", "text"))
        except Malformed as reason:
            yield place, str(reason)
            continue
        places.setdefault(module, place)
        titles.setdefault(module, title)
        texts.setdefault(module, []).append(text)
    for module, place in places.items():
        text = "\n\n".join(texts[module])
        yield place, Document(f"{book}/{module}", text, titles[module], {"book": book})


def _questions(path: Path, book: str) -> Iterator[Item]:
    numbers: dict[str, int] = {}
    for place, row in jsonl_rows(path):
        try:
            if isinstance(row, Malformed):
                raise row
            module = field(row, "module", str)
            numbers[module] = numbers.get(module, 0) + 1
            yield (
                place,
                {
                    "id": f"{book}/{module}/q{numbers[module]}",
                    "question": field(row, "question", str),
                    "choices": strings(row, "choices"),
                    "answer": field(row, "answer", int),
                    "split": by_hash(f"{book}/{module}"),
                    "evidence": [f"{book}/{module}"],
                },
            )
        except Malformed as reason:
            yield place, str(reason)
