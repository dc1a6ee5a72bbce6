"""Arms against each other: which pairs are tested, by what tests, adjusted for how many looks."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rag2.evaluation import stats
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.score import Bools

CONTROLS = ("majority", "random_rag", "gold_rag")
# Beside joint against everything: fine-tune or retrieve, and does either add to the other?
CONTRASTS = (
    ("ft", "base"),
    ("sft", "base"),
    ("frozen_rag", "base"),
    ("frozen_rag", "ft"),
    ("frozen_rag", "sft"),
    ("ft_rag", "frozen_rag"),
    ("sft_rag", "frozen_rag"),
    ("sft_rag", "sft"),
    # Does it earn what it adds to plain retrieval?
    ("hybrid_rag", "frozen_rag"),
    ("ensemble", "frozen_rag"),
    ("router", "frozen_rag"),
    ("staged", "frozen_rag"),
)
# What the two arms of a contrast were given alike, so that the method alone can differ.
EQUAL = {
    ("joint", "sft_rag"): "equal supervision: the same questions, as many steps and chunks",
    ("frozen_rag", "ft"): "equal supervision: the documents and no training question",
}


def holds(arm: Mapping[str, Any], half: str) -> bool:
    """Whether the arm's retriever or (one) generator, as results.json has it, is that half."""
    return half in (arm["retriever"], *str(arm["generator"]).split(" + "))


def pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of arms to test: joint against every arm, then the fixed questions of the field."""
    arms = [name for name in names if name not in CONTROLS]
    first = [("joint", name) for name in arms if name != "joint"] if "joint" in arms else []
    return first + [pair for pair in CONTRASTS if pair[0] in arms and pair[1] in arms]


def paired(
    arms: Mapping[str, ArmResult],
    groups: Sequence[str],
    seed: int,
    equal: Mapping[tuple[str, str], str],
) -> list[dict[str, Any]]:
    tested = pairs(arms)
    tests = [stats.paired(arms[a].correct, arms[b].correct, seed=seed) for a, b in tested]
    adjusted = stats.holm([test.mcnemar_p for test in tests])
    return [
        {
            "a": a,
            "b": b,
            "difference": test.difference,
            "ci95": test.ci95,
            "mcnemar_p": test.mcnemar_p,
            "holm_p": p,
            "a_only": test.a_only,
            "b_only": test.b_only,
            "equal": equal.get((a, b)),
            "groups": _paired_groups(arms[a], arms[b], groups, seed),
        }
        for (a, b), test, p in zip(tested, tests, adjusted, strict=True)
    ]


def _paired_groups(
    a: ArmResult, b: ArmResult, groups: Sequence[str], seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """The same test within each group (subject, wording), its p adjusted for all groups of a key.

    A look inside a contrast, no new claim about the whole.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key in groups:
        rows = labels(a, key)
        tests = [stats.paired(a.correct[q], b.correct[q], seed=seed) for q in rows.values()]
        adjusted = stats.holm([test.mcnemar_p for test in tests])
        for label, test, p in zip(rows, tests, adjusted, strict=True):
            row = {"difference": test.difference, "ci95": test.ci95, "mcnemar_p": test.mcnemar_p}
            found.setdefault(key, {})[label] = row | {"holm_p": p}
    return found


def pairwise(arms: Mapping[str, ArmResult]) -> dict[str, Any]:
    """Every arm against every other: differences, and exact p adjusted for all these pairs."""
    names = list(arms)
    couples = list(itertools.combinations(range(len(names)), 2))
    right = [arms[name].correct for name in names]
    p_values = [stats.mcnemar_of(right[i], right[j]) for i, j in couples]
    difference: list[list[float | None]] = [[None] * len(names) for _ in names]
    adjusted: list[list[float | None]] = [[None] * len(names) for _ in names]
    for (i, j), p in zip(couples, stats.holm(p_values), strict=True):
        gap = float(np.mean(right[i])) - float(np.mean(right[j]))
        difference[i][j], difference[j][i] = gap, -gap
        adjusted[i][j] = adjusted[j][i] = p
    return {"arms": names, "difference": difference, "holm_p": adjusted}


def grid(arms: Sequence[ArmResult], seed: int) -> dict[str, Any] | None:
    """Which half earned the gain: accuracy by retriever (rows) and generator (columns)."""
    sides = {"retriever": ("warm", "joint"), "generator": ("sft", "joint")}
    cells: dict[tuple[str, str], ArmResult] = {}
    for arm in arms:
        cell = (arm.retriever or "", arm.generator)
        if cell in itertools.product(*sides.values()):
            cells.setdefault(cell, arm)  # the first of several readings, in the order of the arms
    if len(cells) < 4:
        return None
    right = {cell: arm.correct.astype(float) for cell, arm in cells.items()}
    ws, wj, js, jj = (right[r, g] for r, g in itertools.product(*sides.values()))
    effects = {
        "retriever": (js + jj - ws - wj) / 2,
        "generator": (wj + jj - ws - js) / 2,
        "interaction": (jj - js) - (wj - ws),
    }
    return {
        **sides,
        "arms": [[cells[r, g].name for g in sides["generator"]] for r in sides["retriever"]],
        "accuracy": [
            [cells[r, g].accuracy for g in sides["generator"]] for r in sides["retriever"]
        ],
        "effects": {
            name: {
                "difference": float(np.mean(values)),
                "ci95": stats.bootstrap_mean(values, seed=seed),
            }
            for name, values in effects.items()
        },
    }


def labels(arm: ArmResult, key: str) -> dict[str, Bools]:
    """Which questions have each value of a metadata key."""
    label_Q = np.array([str(question.metadata.get(key, "")) for question in arm.questions])
    return {str(label): label_Q == label for label in np.unique(label_Q) if label}
