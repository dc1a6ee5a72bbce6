"""An evaluation of questions, chunks and names that try to break out of where they are written."""

from pathlib import Path
from typing import Any

import numpy as np

from made import ENVIRONMENT
from rag2.evaluation import report, results
from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.score import Scores
from rag2.evaluation.select import Choice
from rag2.types import Question

TEXTS = (
    "</script><script>window.broken = 1</script>",
    '<img src="http://example.invalid/x.png" onerror="window.broken = 1">',
    "quotes \" ' ` and braces {{ 7 * 7 }} {% raw %} ${window.broken = 1} {# #}",
    "<!--<script> 日本語 é 𝄞 \u2028 \u202e &amp; &lt; | \\",
    "\"'><svg onload='window.broken = 1'>",
    "]]></style><style>* { display: none }",
)
PASSAGES = {chunk: f"{TEXTS[chunk % len(TEXTS)]}\nchunk {chunk}" for chunk in range(40)}
LOGS = {
    "base": [{"step": step, "loss": 3.0 / (step + 1)} for step in range(400)],
    "retriever": [{"step": step, "loss": 1.0, "recall": step / 9} for step in range(9)],
}


def questions(n: int) -> tuple[Question, ...]:
    """Multiple-choice questions, each of another text, the last choice right."""
    return tuple(
        Question(
            f"id-{i} {TEXTS[i % len(TEXTS)]}",
            f"question {i}: {TEXTS[i % len(TEXTS)]}",
            tuple(f"{i} {j} {text}" for j, text in enumerate(TEXTS[: 2 + i % 3])),
            1 + i % 3,
            metadata={"wording": ("seen", "unseen")[i % 2], "kind": TEXTS[i % 2], "n": i},
        )
        for i in range(n)
    )


def make_arms(rng: np.random.Generator, n: int) -> list[ArmResult]:
    """base, frozen_rag and joint on the same questions."""
    asked, choice = questions(n), Choice(k=2, temperature=1.0, validation_accuracy=0.5)
    missing_QC = np.arange(4) >= np.array([len(q.choices) for q in asked])[:, None]

    def scores() -> Scores:
        logp_QKC = np.where(missing_QC[:, None], -np.inf, -rng.exponential(5.0, (n, 3, 4)))
        return Scores(
            logp_QKC=logp_QKC,
            closed_QC=logp_QKC[:, 0],
            scores_QK=-np.sort(-rng.normal(0.0, 3.0, (n, 3)), axis=1),
            ids_QK=np.argsort(rng.random((n, 40)), axis=1)[:, :3].astype(np.int64),
        )

    rag: dict[str, Any] = {"recall_at_1": 0.5, "recall_at_k": 0.75, "eval_seconds": 2.0}
    return [
        ArmResult.of("base", asked, scores(), eval_seconds=1.0),
        ArmResult.of("frozen_rag", asked, scores(), choice, retriever="warm", **rag),
        ArmResult.of("joint", asked, scores(), choice, retriever="joint", generator="joint", **rag),
    ]


def summary(arms: list[ArmResult]) -> dict[str, Any]:
    """Their results.json, of a task with a hostile name."""
    return results.summarize(f"task {TEXTS[0]}", arms, seed=0, environment=ENVIRONMENT)


def write(directory: Path, rng: np.random.Generator, n: int) -> tuple[dict[str, Any], Path]:
    """An evaluation's directory, as `eval compare` would leave it: (results, report.html)."""
    arms = make_arms(rng, n)
    found = summary(arms)
    report.write(directory, found, arms, passages=PASSAGES, logs=LOGS)
    return found, directory / "report.html"
