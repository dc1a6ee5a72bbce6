"""CSV files in the shape of MMLU, generated or given, and lm-evaluation-harness's tasks on them."""

import csv
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rag2.types import Question

SUBJECTS = ["anatomy", "astronomy", "college_biology", "college_chemistry", "prehistory"]
DESCRIPTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"
TEXTS = {
    "letters": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
    "D. {{choices[3]}}\nAnswer:",
    "cloze": "Question: {{question.strip()}}\nAnswer:",
}
WORDS = [
    *("the", "orbit", "of", "a", "planet", "nerve", "bone", "cell", "is", "about", "two", "first"),
    *(
        "carbon",
        "tools",
        "were",
        "found",
        "in",
        "which",
        "1987",
        "3.5",
        "x^2",
        "H2O",
        "\u03b2-decay",
    ),
    *(
        "\u00e9tude",
        '"quoted"',
        "comma,",
        "half-life",
        "{{braces}}",
        "\u65e5\u672c",
        "\n\n",
        "  ",
        "\t",
    ),
]


def folder(tmp_path: Path, dice: random.Random, count: int) -> Path:
    """DIR/mmlu as RAG2_DATA=DIR names it, else generated with `count` test questions a subject."""
    if given := os.environ.get("RAG2_DATA"):
        return Path(given) / "mmlu"
    for name in ("dev", "test"):
        (tmp_path / "mmlu" / name).mkdir(parents=True)
        for subject in SUBJECTS:
            path = tmp_path / "mmlu" / name / f"{subject}_{name}.csv"
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(_row(dice) for _ in range(5 if name == "dev" else count))
    return tmp_path / "mmlu"


def _row(dice: random.Random) -> list[str]:
    """No header: question, A, B, C, D, letter; spaces at the ends, as the real files have."""
    choices: set[str] = set()
    while len(choices) < 4:
        choices.add(" ".join(dice.choices(WORDS, k=dice.randint(1, 6))).strip() or "none")
    question = " ".join(dice.choices(WORDS, k=dice.randint(4, 25))) + dice.choice(["?", "? ", "_"])
    return [dice.choice(["", " "]) + question, *choices, dice.choice("ABCD")]


def read(data: Path, name: str, subject: str) -> list[Question]:
    """The questions of one file."""
    with (data / name / f"{subject}_{name}.csv").open(newline="", encoding="utf-8") as file:
        return [
            Question(
                f"{subject}-{name}-{number}",
                question,
                tuple(choices),
                "ABCD".index(letter),
                metadata={"subject": subject},
            )
            for number, (question, *choices, letter) in enumerate(csv.reader(file))
        ]


def write(path: Path, questions: Iterable[Question]) -> Path:
    """The questions as the JSON lines that a task reads."""
    rows = [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task(
    name: str, files: dict[str, Path], format: str, shots: int, subject: str, mutual: bool = False
) -> dict[str, Any]:
    """MMLU's own task, its data from local files; `mutual` adds the choices without context."""
    metrics = ["acc", "acc_mutual_info"] if mutual else ["acc"]
    data_files = {name: str(path) for name, path in files.items()}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": data_files,
            "cache_dir": str(files["test"].parent / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "description": DESCRIPTION.replace("{subject}", subject.replace("_", " ")),
        "doc_to_text": TEXTS[format],
        "doc_to_choice": list("ABCD") if format == "letters" else "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": m, "aggregation": "mean"} for m in metrics],
        "num_fewshot": shots,
    }
