"""What each arm answered -> the numbers of results.json: accuracies, paired tests, 2x2 table."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rag2.evaluation import stats
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.score import Bools

FORMAT = "rag2.results/1"
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
)
# What the two arms of a contrast were given alike, so that the method alone can differ.
EQUAL = {
    ("joint", "sft_rag"): "equal supervision: the same questions and answers, steps and chunks",
    ("frozen_rag", "ft"): "equal supervision: the documents and no training question",
}


def summarize(
    task: str,
    arms: Sequence[ArmResult],
    *,
    seed: int,
    environment: Mapping[str, Any],
    groups: Sequence[str] = ("wording", "subject"),
    equal: bool = False,
    by_seed: Mapping[int, Sequence[ArmResult]] | None = None,
) -> dict[str, Any]:
    """The content of results.json for arms that answered the same questions in the same order.

    `groups` are question metadata keys to break accuracies down by; `equal` says that the arms were
    trained by the stages of their names, so that contrasts at equal supervision may be called so;
    with several seeds pass the pooled arms as `arms` and the single runs as `by_seed`.
    """
    asked = [question.id for question in arms[0].questions]
    for arm in arms:
        assert [question.id for question in arm.questions] == asked, f"{arm.name} is not paired"
    named = {arm.name: arm for arm in arms}
    assert len(named) == len(arms), [arm.name for arm in arms]
    results = {
        "format": FORMAT,
        "task": task,
        "n": len(asked),
        "seed": seed,
        "interval": "wilson",
        "arms": {name: _arm(arm, groups, named.get("base")) for name, arm in named.items()},
        "paired": _paired(named, groups, seed, EQUAL if equal else {}),
        "pairwise": _pairwise(named),
        "k_selection": _k_selection(arms),
        "environment": dict(environment),
    }
    grid = _grid(arms, seed)
    if grid:
        results["grid_2x2"] = grid
    if by_seed:
        results["seeds"] = {
            str(key): {arm.name: {"accuracy": arm.accuracy, "k": arm.k} for arm in runs}
            for key, runs in by_seed.items()
        }
    return _tidy(results)


def strip_times(results: Any) -> Any:
    """A copy without what a clock or the machine's memory said, so that runs compare equal.

    That is every key that ends in `_seconds`, and `peak_memory_bytes`.
    """
    if isinstance(results, Mapping):
        measured = ("_seconds", "peak_memory_bytes")
        return {key: strip_times(results[key]) for key in results if not key.endswith(measured)}
    return [strip_times(item) for item in results] if isinstance(results, list) else results


def contrasts(names: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of arms to test: joint against every arm, then the fixed questions of the field."""
    arms = [name for name in names if name not in CONTROLS]
    first = [("joint", name) for name in arms if name != "joint"] if "joint" in arms else []
    return first + [pair for pair in CONTRASTS if pair[0] in arms and pair[1] in arms]


def _arm(arm: ArmResult, groups: Sequence[str], base: ArmResult | None) -> dict[str, Any]:
    right, n = int(arm.correct.sum()), len(arm.questions)
    return {
        "accuracy": arm.accuracy,
        "stderr": stats.stderr(right, n),
        "ci95": stats.wilson(right, n),
        "relative_gain": arm.accuracy / base.accuracy - 1 if base and base.accuracy else None,
        "acc_norm": float(np.mean(arm.correct_norm)),
        "acc_bytes": float(np.mean(arm.correct_bytes)),
        "acc_mutual_info": _share(arm.correct_mutual),
        "debiased_accuracy": _share(arm.debiased_Q),
        "intervals": _intervals(arm),
        "retriever": arm.retriever,
        "generator": arm.generator,
        "reading": arm.reading,
        "k": arm.k,
        "temperature": arm.temperature,
        "recall_at_1": arm.recall_at_1,
        "recall_at_k": arm.recall_at_k,
        "control_accuracy": arm.control_accuracy,
        "two_hop_accuracy": arm.two_hop_accuracy,
        "readings": {name: _reading(found, n) for name, found in arm.readings.items()},
        "by_k": _by_k(arm),
        "groups": {key: found for key in groups if (found := _group(arm, key))},
        "train_seconds": arm.train_seconds,
        "eval_seconds": arm.eval_seconds,
        "eval_tokens": arm.eval_tokens,
        "peak_memory_bytes": arm.peak_memory_bytes,
        "trained_parameters": arm.trained_parameters,
        "dropped_chunks": arm.dropped_chunks,
    }


def _intervals(arm: ArmResult) -> dict[str, tuple[float, float]]:
    """Wilson's interval of every other share of questions that the arm has."""
    n = len(arm.questions)
    shares = {
        "acc_norm": (float(np.mean(arm.correct_norm)), n),
        "acc_bytes": (float(np.mean(arm.correct_bytes)), n),
        "acc_mutual_info": (_share(arm.correct_mutual), n),
        "debiased_accuracy": (_share(arm.debiased_Q), n),
        "recall_at_1": (arm.recall_at_1, n),
        "recall_at_k": (arm.recall_at_k, n),
        "control_accuracy": (arm.control_accuracy, arm.asked_beside.get("control", 0)),
        "two_hop_accuracy": (arm.two_hop_accuracy, arm.asked_beside.get("two_hop", 0)),
    }
    return {
        key: stats.wilson(round(share * count), count)
        for key, (share, count) in shares.items()
        if share is not None and count
    }


def _share(right_Q: Bools | None) -> float | None:
    return None if right_Q is None else float(np.mean(right_Q))


def _reading(found: Mapping[str, Any], n: int) -> dict[str, Any]:
    right = found["right"]
    rest = {key: value for key, value in found.items() if key != "right"}
    return {"accuracy": right / n, "ci95": stats.wilson(right, n)} | rest


def _by_k(arm: ArmResult) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for at in arm.by_k:
        right, n = int(at.correct_Q.sum()), len(at.correct_Q)
        rows.setdefault(at.choice.reading, []).append(
            {
                "k": at.choice.k,
                "temperature": at.choice.temperature,
                "accuracy": right / n,
                "ci95": stats.wilson(right, n),
                "validation_accuracy": at.choice.validation_accuracy,
            }
        )
    return rows


def _pairwise(arms: Mapping[str, ArmResult]) -> dict[str, Any]:
    """Every arm against every other: differences, and exact p adjusted for all these pairs."""
    names = list(arms)
    pairs = list(itertools.combinations(range(len(names)), 2))
    right = [arms[name].correct for name in names]
    p_values = [stats.mcnemar_of(right[i], right[j]) for i, j in pairs]
    difference: list[list[float | None]] = [[None] * len(names) for _ in names]
    adjusted: list[list[float | None]] = [[None] * len(names) for _ in names]
    for (i, j), p in zip(pairs, stats.holm(p_values), strict=True):
        gap = float(np.mean(right[i])) - float(np.mean(right[j]))
        difference[i][j], difference[j][i] = gap, -gap
        adjusted[i][j] = adjusted[j][i] = p
    return {"arms": names, "difference": difference, "holm_p": adjusted}


def _group(arm: ArmResult, key: str) -> dict[str, dict[str, Any]]:
    found = {}
    for label, where_Q in _labels(arm, key).items():
        right, n = int(arm.correct[where_Q].sum()), int(where_Q.sum())
        found[label] = {"accuracy": right / n, "n": n, "ci95": stats.wilson(right, n)}
    return found


def _labels(arm: ArmResult, key: str) -> dict[str, Bools]:
    """Which questions have each value of a metadata key."""
    label_Q = np.array([str(question.metadata.get(key, "")) for question in arm.questions])
    return {str(label): label_Q == label for label in np.unique(label_Q) if label}


def _paired(
    arms: Mapping[str, ArmResult],
    groups: Sequence[str],
    seed: int,
    equal: Mapping[tuple[str, str], str],
) -> list[dict[str, Any]]:
    pairs = contrasts(arms)
    tests = [stats.paired(arms[a].correct, arms[b].correct, seed=seed) for a, b in pairs]
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
        for (a, b), test, p in zip(pairs, tests, adjusted, strict=True)
    ]


def _paired_groups(
    a: ArmResult, b: ArmResult, groups: Sequence[str], seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """The same test within each group (subject, wording), its p adjusted for all groups of a key.

    A look inside a contrast, no new claim about the whole.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key in groups:
        labels = _labels(a, key)
        tests = [stats.paired(a.correct[q], b.correct[q], seed=seed) for q in labels.values()]
        adjusted = stats.holm([test.mcnemar_p for test in tests])
        for label, test, p in zip(labels, tests, adjusted, strict=True):
            row = {"difference": test.difference, "ci95": test.ci95, "mcnemar_p": test.mcnemar_p}
            found.setdefault(key, {})[label] = row | {"holm_p": p}
    return found


def _k_selection(arms: Sequence[ArmResult]) -> dict[str, Any]:
    chosen = {arm.name: arm.choice for arm in arms if arm.choice}
    oracle = {arm.name: arm.oracle for arm in arms if arm.oracle}
    return {
        "split": "validation",
        "chosen": {name: choice.k for name, choice in chosen.items()},
        "reading": {name: choice.reading for name, choice in chosen.items()},
        "temperature": {name: choice.temperature for name, choice in chosen.items()},
        "accuracy": {name: choice.validation_accuracy for name, choice in chosen.items()},
        "oracle_test": {name: best.k for name, best in oracle.items()},
        "oracle_test_accuracy": {name: best.test_accuracy for name, best in oracle.items()},
    }


def _grid(arms: Sequence[ArmResult], seed: int) -> dict[str, Any] | None:
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


def _tidy(value: Any) -> Any:
    """Plain JSON types; floats to six significant digits, so that noise in the last bits is not
    a difference between two runs; NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, Mapping):
        return {str(key): _tidy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tidy(item) for item in value]
    if isinstance(value, np.generic):
        return _tidy(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
