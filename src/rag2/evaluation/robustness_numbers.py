"""Measured arms -> the numbers of robustness.json, with intervals and differences to the base."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rag2.evaluation import confidence, perplexity, stats
from rag2.evaluation.perplexity import Perplexity
from rag2.evaluation.robustness import Measured
from rag2.evaluation.score import Bools, Floats

FORMAT = "rag2.robustness/1"


def summarize(
    task: str,
    measured: Sequence[Measured],
    surprise: Mapping[str, Mapping[str, Perplexity]],
    seed: int,
) -> dict[str, Any]:
    """The arms' numbers; differences are to arm `base` where it was run.

    `surprise` is the perplexity on each kind of text, by generator.
    """
    base = next((arm for arm in measured if arm.name == "base"), None)
    before = surprise.get("base", {}) if base else {}
    numbers = {}
    for arm in measured:
        own = surprise[arm.arm.generator]
        first = {} if arm.arm.generator == "base" else before
        numbers[arm.name] = _arm(arm, base, seed) | {
            "perplexity": {kind: _text(own[kind], first.get(kind), seed) for kind in own}
        }
    return {"format": FORMAT, "task": task, "seed": seed, "arms": numbers}


def rate(flags_Q: Bools) -> dict[str, Any] | None:
    """A share with its count, n and Wilson's 95 % interval; None of nothing."""
    count, n = int(flags_Q.sum()), len(flags_Q)
    if not n:
        return None
    return {"rate": count / n, "count": count, "n": n, "ci95": list(stats.wilson(count, n))}


def _arm(measured: Measured, base: Measured | None, seed: int) -> dict[str, Any]:
    """The arm's numbers as plain JSON types; differences are to `base`, paired by question."""

    def share(flag: str) -> dict[str, Any] | None:
        flags_Q = measured.flags.get(flag)
        counted = None if flags_Q is None else rate(flags_Q)
        if counted and flags_Q is not None and base is not None and base is not measured:
            row = asdict(stats.paired(flags_Q, base.flags[flag], seed=seed))
            counted["to_base"] = row | {"ci95": list(row["ci95"])}
        return counted

    test, choice = measured.answers["test"], measured.choice
    answered_Q = measured.flags["answered"]
    return {
        "generator": measured.arm.generator,
        "retriever": measured.arm.retriever,
        "reading": choice.reading if measured.arm.retriever else "closed",
        "k": choice.k,
        "temperature": choice.temperature,
        "accuracy": share("test"),
        "control": share("control"),
        "abstention": {
            "threshold": asdict(measured.threshold),
            "coverage": share("answered"),
            "selective_accuracy": rate(test.right_Q[answered_Q]),
            "confident_wrong": share("confident_wrong"),
            "absent_abstained": share("abstained"),
            "absent_confident_wrong": share("absent_confident_wrong"),
            "auroc_right": _auroc(
                test.confidence_Q[test.right_Q], test.confidence_Q[~test.right_Q], seed
            ),
            "auroc_answerable": _auroc(
                test.confidence_Q, measured.answers["absent"].confidence_Q, seed
            )
            if "absent" in measured.answers
            else None,
            "calibration_error": {
                "value": confidence.calibration_error(test.confidence_Q, test.right_Q),
                "ci95": list(
                    confidence.calibration_interval(test.confidence_Q, test.right_Q, seed)
                ),
                "n": len(test.right_Q),
            },
        },
        "consistency": {"same_choice": share("consistent"), "all_right": share("all_right")},
        "format": {
            "a_choice": share("wrote_choice"),
            "a_value": share("wrote_value"),
            "right": share("wrote_right"),
        },
        "faithfulness": _faithfulness(measured),
    }


def _auroc(upper: Floats, lower: Floats, seed: int) -> dict[str, Any] | None:
    value = confidence.auroc(upper, lower)
    interval = confidence.auroc_interval(upper, lower, seed)
    if value is None or interval is None:
        return None
    return {"value": value, "ci95": list(interval), "n": [len(upper), len(lower)]}


def _faithfulness(measured: Measured) -> dict[str, Any] | None:
    edits = measured.edits
    if not edits:
        return None
    read = rate(edits["followed"][edits["edit_read"]])
    return {name: rate(flags_Q) for name, flags_Q in edits.items()} | {"followed_where_read": read}


def _text(after: Perplexity, before: Perplexity | None, seed: int) -> dict[str, Any]:
    bounds = after.intervals(seed)
    row: dict[str, Any] = {
        "per_token": after.per_token,
        "ci95": bounds["per_token"],
        "per_word": after.per_word,
        "per_word_ci95": bounds["per_word"],
        "perplexity": after.perplexity,
        "n": len(after.nats_Q),
        "tokens": int(after.tokens_Q.sum()),
        "words": int(after.words_Q.sum()),
    }
    if before is not None:
        row["to_base"] = perplexity.difference(after, before, seed)
    return row
