"""MMLU (Hendrycks et al. 2021): CSV files without header, one per subject and split.

The folder is the one of the original archive: `dev/anatomy_dev.csv`, `val/...`, `test/...`, rows
`question,A,B,C,D,letter`. `dev` holds the five worked examples of each subject and becomes `train`.
"""

from collections.abc import Iterator
from pathlib import Path

from rag2.evaluation.tasks.source import Item, Malformed, existing
from rag2.kb.table import csv_rows

SPLITS = {"dev": "train", "val": "validation", "test": "test"}
LETTERS = "ABCD"


def read(source: Path) -> Iterator[Item]:
    """Every question; its subject, from the file's name, is in the metadata.

    An id is `subject/folder/row`, rows from 0 as lm-evaluation-harness counts them. Raises
    UserError if one of the three folders is missing.
    """
    folders = {name: existing(source / name) for name in SPLITS}
    for name, folder in folders.items():
        for path in sorted(folder.glob("*.csv")):
            subject = path.stem.removesuffix(f"_{name}")
            for number, (place, cells) in enumerate(csv_rows(path, f"{name}/{path.name}")):
                yield place, _question(f"{subject}/{name}/{number}", subject, name, cells)


def _question(id: str, subject: str, folder: str, cells: list[str] | Malformed) -> dict | str:
    if isinstance(cells, Malformed):
        return str(cells)
    if len(cells) != 2 + len(LETTERS):
        return f"{len(cells)} cells, not the {2 + len(LETTERS)} of question,A,B,C,D,letter"
    question, *choices, letter = cells
    if letter.strip() not in tuple(LETTERS):
        return f"answer {letter!r} is none of {', '.join(LETTERS)}"
    return {
        "id": id,
        "question": question,
        "choices": choices,
        "answer": LETTERS.index(letter.strip()),
        "split": SPLITS[folder],
        "metadata": {"subject": subject},
    }
