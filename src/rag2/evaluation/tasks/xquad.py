"""XQuAD (Artetxe et al. 2020) in English, or any file in the format of SQuAD v1.1.

`{"data": [{"title", "paragraphs": [{"context", "qas": [QA, ..]}, ..]}, ..]}`, where a QA is
`{"id", "question", "answers": [{"text"}, ..]}`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag2.evaluation.tasks.source import Item, Malformed, by_hash, existing, field, json_file
from rag2.registry import UserError
from rag2.types import Document


def read(source: Path) -> Iterator[Item]:
    """Paragraphs as documents and open questions, each with its paragraph as evidence.

    `source` is the folder with xquad.en.json, or one such file. An article's questions stay
    together: its hash puts 40 % of articles into train, 20 % validation, 40 % test.
    """
    path = source / "xquad.en.json" if source.is_dir() else existing(source)
    try:
        articles = field(json_file(path), "data", list)
    except Malformed as reason:
        raise UserError(f"{path}: {reason}") from None
    for number, article in enumerate(articles):
        place = f"{path.name}: data[{number}]"
        try:
            title, paragraphs = field(article, "title", str), field(article, "paragraphs", list)
        except Malformed as reason:
            yield place, str(reason)
            continue
        for index, paragraph in enumerate(paragraphs):
            yield from _paragraph(f"{place}.paragraphs[{index}]", title, index, paragraph)


def _paragraph(place: str, title: str, index: int, paragraph: Any) -> Iterator[Item]:
    id = f"{title}/{index}"
    try:
        context, asked = field(paragraph, "context", str), field(paragraph, "qas", list)
    except Malformed as reason:
        yield place, str(reason)
        return
    yield place, Document(id, context, title.replace("_", " "), {"article": title})
    for number, qa in enumerate(asked):
        where = f"{place}.qas[{number}]"
        try:
            texts = [field(answer, "text", str) for answer in field(qa, "answers", list)]
            yield (
                where,
                {
                    "id": field(qa, "id", str),
                    "question": field(qa, "question", str),
                    "answers": list(dict.fromkeys(texts)),
                    "split": by_hash(title),
                    "evidence": [id],
                    "metadata": {"article": title},
                },
            )
        except Malformed as reason:
            yield where, str(reason)
