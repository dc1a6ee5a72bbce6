"""Answers to open questions -> results.json, samples_<arm>.jsonl, report.md and a table."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from rag2 import artifact
from rag2.evaluation import squad, stats
from rag2.evaluation.open_questions import Answers, Choice
from rag2.evaluation.questions import to_row
from rag2.evaluation.results import FORMAT
from rag2.evaluation.score import Bools, Floats
from rag2.types import Question, Retrieved

COLUMNS = (
    *("arm", "retriever", "K", "EM", "95 %", "F1", "95 %"),
    *("recall@1", "recall@K", "dropped"),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenResult:
    """What one arm wrote to the test questions, from the best `k` chunks of its retriever.

    `retrieved` holds these chunks, dropped ones too; `choice` is None where K was given.
    """

    name: str
    questions: tuple[Question, ...]
    answers: Answers
    retriever: str | None = None
    k: int = 0
    retrieved: tuple[tuple[Retrieved, ...], ...] = ()
    choice: Choice | None = None
    recall_at_1: float | None = None
    recall_at_k: float | None = None
    eval_seconds: float = 0.0

    @property
    def exact(self) -> Bools:
        """Whether each answer is one of the right ones, normalised [Q]."""
        pairs = zip(self.answers.texts, self.questions, strict=True)
        return np.array([squad.exact_match(text, q.answers) for text, q in pairs], dtype=np.bool_)

    @property
    def f1(self) -> Floats:
        """SQuAD's F1 of each answer [Q]."""
        return self.answers.f1(self.questions)


def summarize(
    task: str, arms: Sequence[OpenResult], *, seed: int, environment: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of results.json for arms that answered the same questions in the same order.

    `accuracy` is the exact match, with Wilson's interval; F1 has the percentile bootstrap's.
    """
    asked = [question.id for question in arms[0].questions]
    for arm in arms:
        assert [question.id for question in arm.questions] == asked, f"{arm.name} is not paired"
    chosen = {arm.name: arm.choice for arm in arms if arm.choice}
    return {
        "format": FORMAT,
        "task": task,
        "n": len(asked),
        "seed": seed,
        "interval": "wilson",
        "f1_interval": "bootstrap",
        "arms": {arm.name: _arm(arm, seed) for arm in arms},
        "paired": [_paired(a, b, seed) for b, a in itertools.combinations(arms, 2)],
        "k_selection": {
            "split": "validation",
            "chosen": {name: choice.k for name, choice in chosen.items()},
            "f1": {name: _short(choice.validation_f1) for name, choice in chosen.items()},
        },
        "environment": dict(environment),
    }


def write(
    directory: str | Path,
    results: Mapping[str, Any],
    arms: Sequence[OpenResult],
    contexts: Sequence[str],
    max_new_tokens: int,
) -> Path:
    """Write samples_<arm>.jsonl, report.md and, last, results.json; returns the path of that.

    `contexts` are the prompts without passages, equal in all arms as are their hashes.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        rows = (_sample(arm, row, text, max_new_tokens) for row, text in enumerate(contexts))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        artifact.replace(directory / f"samples_{arm.name}.jsonl", "".join(lines))
    artifact.replace(directory / "report.md", markdown(results))
    path = directory / "results.json"
    artifact.replace(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return path


def markdown(results: Mapping[str, Any]) -> str:
    """The table of arms and the paired tests as Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [_cells(name, arm) for name, arm in results["arms"].items()]
    lines = [f"# {results['task']}: {results['n']} open questions", ""]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *_tests(results)]) + "\n"


def terminal_table(results: Mapping[str, Any]) -> Table:
    """The table of arms for a terminal, the paired tests below it."""
    title = f"{results['task']}: {results['n']} open questions"
    table = Table(title=title, caption="\n".join(_tests(results)))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    for name, arm in results["arms"].items():
        table.add_row(*_cells(name, arm))
    return table


def _arm(arm: OpenResult, seed: int) -> dict[str, Any]:
    right, n = int(arm.exact.sum()), len(arm.questions)
    error = stats.stderr(right, n)
    return {
        "accuracy": _short(right / n),
        "exact_match": _short(right / n),
        "stderr": None if error is None else _short(error),
        "ci95": [_short(edge) for edge in stats.wilson(right, n)],
        "f1": _short(arm.f1.mean()),
        "f1_ci95": [_short(edge) for edge in stats.bootstrap_mean(arm.f1, seed=seed)],
        "retriever": arm.retriever,
        "generator": "base",
        "reading": "concat" if arm.retriever else "closed",
        "k": arm.k,
        "recall_at_1": arm.recall_at_1,
        "recall_at_k": arm.recall_at_k,
        "dropped_chunks": sum(arm.answers.dropped),
        "eval_seconds": arm.eval_seconds,
    }


def _paired(a: OpenResult, b: OpenResult, seed: int) -> dict[str, Any]:
    """Arm a against arm b: McNemar on the exact matches, bootstrap of the difference in F1."""
    test = stats.paired(a.exact, b.exact, seed=seed)
    gain_Q = a.f1 - b.f1
    return {
        "a": a.name,
        "b": b.name,
        "difference": _short(test.difference),
        "ci95": [_short(edge) for edge in test.ci95],
        "mcnemar_p": _short(test.mcnemar_p),
        "a_only": test.a_only,
        "b_only": test.b_only,
        "f1_difference": _short(gain_Q.mean()),
        "f1_ci95": [_short(edge) for edge in stats.bootstrap_mean(gain_Q, seed=seed)],
    }


def _sample(arm: OpenResult, row: int, context: str, max_new_tokens: int) -> dict[str, Any]:
    """One line in the shape that lm-evaluation-harness gives to `generate_until`."""
    question, text = arm.questions[row], arm.answers.texts[row]
    doc, target = to_row(question), question.gold
    settings = {"until": ["\n"], "max_gen_toks": max_new_tokens, "do_sample": False}
    found = arm.retrieved[row] if arm.retrieved else ()
    return {
        "doc_id": row,
        "doc": doc,
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": context, "arg_1": settings}},
        "resps": [[text]],
        "filtered_resps": [text],
        "filter": "none",
        "metrics": ["exact_match", "f1"],
        "doc_hash": _sha256(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _sha256(context),
        "target_hash": _sha256(target),
        "exact_match": float(squad.exact_match(text, question.answers)),
        "f1": squad.f1(text, question.answers),
        "retrieved": [
            {"chunk": item.chunk, "score": item.score, "posterior": None} for item in found
        ],
        "dropped": arm.answers.dropped[row],
    }


def _cells(name: str, arm: Mapping[str, Any]) -> tuple[str, ...]:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    def interval(ends: Sequence[float]) -> str:
        return f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"

    return (
        *(name, arm["retriever"] or "", str(arm["k"])),
        *(percent(arm["exact_match"]), interval(arm["ci95"])),
        *(percent(arm["f1"]), interval(arm["f1_ci95"])),
        *(percent(arm["recall_at_1"]), percent(arm["recall_at_k"]), str(arm["dropped_chunks"])),
    )


def _tests(results: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['a']} against {row['b']}: EM {100 * row['difference']:+.1f} points "
        f"[{100 * row['ci95'][0]:+.1f}, {100 * row['ci95'][1]:+.1f}], McNemar p = "
        f"{row['mcnemar_p']:.2g}; F1 {100 * row['f1_difference']:+.1f} points "
        f"[{100 * row['f1_ci95'][0]:+.1f}, {100 * row['f1_ci95'][1]:+.1f}]."
        for row in results["paired"]
    ]


def _short(value: float) -> float:
    """Six significant digits: noise in the last bits is no difference between two runs."""
    return float(f"{value:.6g}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
