"""Numbers of results.json -> the one sentence they support, and how numbers are written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rag2.evaluation.contrasts import CONTROLS, holds

ALPHA = 0.05
Results = Mapping[str, Any]


def verdict(results: Results) -> str:
    """One sentence on what the table shows about joint training, win or lose, with its numbers.

    The rival is the strongest arm that is no control and holds no jointly trained half. It is
    picked after seeing the results, so the p value is the one adjusted for all contrasts.
    """
    arms, subject = results["arms"], "joint"
    rivals = {
        name: arm
        for name, arm in arms.items()
        if name not in (subject, *CONTROLS) and not holds(arm, subject)
    }
    if subject not in arms or not rivals:
        real = {name: arm for name, arm in arms.items() if name not in CONTROLS} or arms
        top = max(arm["accuracy"] for arm in real.values())
        best = [name for name, arm in real.items() if arm["accuracy"] == top]
        if len(real) == 1:
            return f"{best[0]} answers {percent(top)} of {results['n']} questions."
        return (
            f"{' and '.join(best)} {'score' if len(best) > 1 else 'scores'} highest with "
            f"{percent(top)} of {results['n']} questions; {subject} was not run beside another arm."
        )
    rival = max(rivals, key=lambda name: rivals[name]["accuracy"])
    test = next(row for row in results["paired"] if (row["a"], row["b"]) == (subject, rival))
    sure = test["holm_p"] < ALPHA
    if test["difference"] > 0:
        claim = f"{subject} beats" if sure else f"{subject} is ahead, perhaps by chance, of"
        claim = f"{claim} {rival}, the strongest arm without a jointly trained half"
    elif test["difference"] < 0:
        claim = f"{rival} beats it" if sure else f"{rival} is ahead, perhaps by chance"
        claim = f"{subject} does not win: {claim}"
    else:
        claim = f"{subject} does not win: {rival} answers as many questions right"
    own = arms[subject]["accuracy"]
    halves = [
        f"{name} {percent(arm['accuracy'])}"
        for name, arm in arms.items()
        if name not in (*rivals, *CONTROLS) and arm["accuracy"] > own
    ]
    return (
        f"{claim} ({percent(own)} against {percent(arms[rival]['accuracy'])}, "
        f"difference {points(test['difference'])} {interval(test['ci95'], points)} points, "
        f"Holm-adjusted p = {test['holm_p']:.2g}, n = {results['n']})"
        + (f"; arms with one of its halves score higher still: {', '.join(halves)}" * bool(halves))
        + "."
    )


def percent(share: float | None) -> str:
    """A share as `75.0 %`; `-` where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def points(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.1f}"


def _plain(share: float) -> str:
    return f"{100 * share:.1f}"


def interval(bounds: Sequence[float], form: Callable[[float], str] = _plain) -> str:
    """Two bounds in brackets, in percent unless `form` says otherwise."""
    return f"[{form(bounds[0])}, {form(bounds[1])}]"
