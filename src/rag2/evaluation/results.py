"""What each arm answered -> the numbers of results.json: accuracies, paired tests, 2x2 table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rag2.evaluation import contrasts, stats
from rag2.evaluation.contrasts import labels
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.score import Bools

FORMAT = "rag2.results/1"


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
        "paired": contrasts.paired(named, groups, seed, contrasts.EQUAL if equal else {}),
        "pairwise": contrasts.pairwise(named),
        "k_selection": _k_selection(arms),
        "environment": dict(environment),
    }
    grid = contrasts.grid(arms, seed)
    if grid:
        results["grid_2x2"] = grid
    if by_seed:
        results["seeds"] = {
            str(key): {arm.name: {"accuracy": arm.accuracy, "k": arm.k} for arm in runs}
            for key, runs in by_seed.items()
        }
    return tidy(results)


def strip_times(results: Any) -> Any:
    """A copy without what a clock or the machine's memory said, so that runs compare equal.

    That is every key that ends in `_seconds`, `latency_ms` and `peak_memory_bytes`.
    """
    if isinstance(results, Mapping):
        measured = ("_seconds", "latency_ms", "peak_memory_bytes")
        return {key: strip_times(results[key]) for key in results if not key.endswith(measured)}
    return [strip_times(item) for item in results] if isinstance(results, list) else results


def _arm(arm: ArmResult, groups: Sequence[str], base: ArmResult | None) -> dict[str, Any]:
    right, n = int(arm.correct.sum()), len(arm.questions)
    return {
        "accuracy": arm.accuracy,
        "stderr": stats.stderr(right, n),
        "ci95": stats.wilson(right, n),
        "relative_gain": arm.accuracy / base.accuracy - 1 if base and base.accuracy else None,
        "acc_norm": _share(arm.correct_by_length.get("acc_norm")),
        "acc_bytes": _share(arm.correct_by_length.get("acc_bytes")),
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
        "unrelated_nats": arm.unrelated_nats,
        "two_hop_accuracy": arm.two_hop_accuracy,
        "readings": {name: _reading(found, n) for name, found in arm.readings.items()},
        "by_k": _by_k(arm),
        "groups": {key: found for key in groups if (found := _group(arm, key))},
        "train_seconds": arm.train_seconds,
        "eval_seconds": arm.eval_seconds,
        "eval_tokens": arm.eval_tokens,
        "peak_memory_bytes": arm.peak_memory_bytes,
        "trained_parameters": arm.trained_parameters,
        "train_tokens": arm.train_tokens,
        "ship_bytes": arm.ship_bytes,
        "inference_flops": arm.inference_flops,
        "latency_ms": arm.latency,
        "document_seconds": arm.document_seconds,
        "dropped_chunks": arm.dropped_chunks,
        **(_hybrid(arm) if arm.members else {}),
        **({"parameters": chosen} if (chosen := _parameters(arm)) else {}),
    }


def _hybrid(arm: ArmResult) -> dict[str, Any]:
    return {
        "members": arm.members,
        "retrieved_share": arm.retrieved_share,
        "control_retrieved_share": arm.control_retrieved_share,
    }


def _parameters(arm: ArmResult) -> dict[str, Any]:
    """What validation chose besides K, temperature and reading."""
    return dict(arm.choice.parameters) if arm.choice else {}


def _intervals(arm: ArmResult) -> dict[str, tuple[float, float]]:
    """Wilson's interval of every other share of questions that the arm has."""
    n = len(arm.questions)
    shares = {
        "acc_norm": (_share(arm.correct_by_length.get("acc_norm")), n),
        "acc_bytes": (_share(arm.correct_by_length.get("acc_bytes")), n),
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


def _group(arm: ArmResult, key: str) -> dict[str, dict[str, Any]]:
    found = {}
    for label, where_Q in labels(arm, key).items():
        right, n = int(arm.correct[where_Q].sum()), int(where_Q.sum())
        found[label] = {"accuracy": right / n, "n": n, "ci95": stats.wilson(right, n)}
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


def tidy(value: Any) -> Any:
    """Plain JSON types; floats to six significant digits, so that noise in the last bits is not
    a difference between two runs; NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, Mapping):
        return {str(key): tidy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(item) for item in value]
    if isinstance(value, np.generic):
        return tidy(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value
