"""FairytaleQA (Xu et al. 2022): stories in sections, open questions with the sections' numbers.

The folder is `data-by-train-split` of the original, or what holds it; in it are
`questions/SPLIT/NAME-questions.csv` and `section-stories/SPLIT/NAME-story.csv`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag2.evaluation.tasks.source import Item, Malformed, csv_table, existing, field
from rag2.types import Document

SPLITS = {"train": "train", "val": "validation", "test": "test"}
# One annotator's answer each; the other columns are rewordings, which the paper's scores leave out.
ANSWERS = ("answer1", "answer4")


def read(source: Path) -> Iterator[Item]:
    """Sections as documents, then the questions with their sections as evidence.

    Splits are the authors' own. Question numbers repeat inside some stories, so an id is the story
    and the row. Raises UserError if a folder of the data set is missing.
    """
    inside = source / "data-by-train-split"
    root = inside if inside.is_dir() else source
    for kind, suffix, rows in (
        ("section-stories", "-story", _sections),
        ("questions", "-questions", _questions),
    ):
        folders = {name: existing(root / kind / name) for name in SPLITS}
        for name, folder in folders.items():
            for path in sorted(folder.glob("*.csv")):
                story = path.stem.removesuffix(suffix)
                yield from rows(path, f"{kind}/{name}/{path.name}", story, SPLITS[name])


def _sections(path: Path, name: str, story: str, split: str) -> Iterator[Item]:
    for place, row in csv_table(path, name):
        try:
            if isinstance(row, Malformed):
                raise row
            id, text = _id(story, field(row, "section", str)), field(row, "text", str)
        except Malformed as reason:
            yield place, str(reason)
        else:
            yield place, Document(id, text, story.replace("-", " "), {"story": story})


def _questions(path: Path, name: str, story: str, split: str) -> Iterator[Item]:
    for number, (place, row) in enumerate(csv_table(path, name), 1):
        try:
            if isinstance(row, Malformed):
                raise row
            sections = field(row, "cor_section", str).split(",")
            answers = [field(row, key, str).strip() for key in ANSWERS]
            metadata: dict[str, Any] = {"story": story, "attribute": row.get("attribute1", "")}
            yield (
                place,
                {
                    "id": f"{story}/q{number}",
                    "question": field(row, "question", str),
                    "answers": list(dict.fromkeys(answer for answer in answers if answer)),
                    "split": split,
                    "evidence": [_id(story, section) for section in sections],
                    "metadata": metadata | {"explicit": row.get("ex-or-im1", "")},
                },
            )
        except Malformed as reason:
            yield place, str(reason)


def _id(story: str, section: str) -> str:
    return f"{story}/{section.strip()}"
