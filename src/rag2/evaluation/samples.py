"""One arm's answers -> samples_<arm>.jsonl in lm-evaluation-harness's shape, with its passages.

Paired-test scripts written for lm-evaluation-harness read these files as they are. `prompt_hash`
is that of the prompt without passages, so it is equal in all arms; what an arm read instead is in
`retrieved`, which lm-evaluation-harness has no room for.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rag2.evaluation.outcome import ArmResult
from rag2.evaluation.questions import to_row
from rag2.types import Retrieved


def write_samples(
    directory: Path,
    arm: ArmResult,
    contexts: Sequence[str] | None = None,
    continuations: Sequence[Sequence[str]] | None = None,
) -> Path:
    """Write samples_<arm>.jsonl, one question a line in the order asked, and return its path.

    `contexts` are the prompts without passages and `continuations` the scored strings, delimiter
    included (" A" where choices are letters); by default the question and " " + each choice.
    """
    contexts = contexts or [question.question for question in arm.questions]
    continuations = continuations or [
        [f" {choice}" for choice in question.choices] for question in arm.questions
    ]
    path = directory / f"samples_{arm.name}.jsonl"
    with path.open("w", encoding="utf-8", newline="\n") as file:
        picks_Q, correct_Q, correct_norm_Q = arm.predictions, arm.correct, arm.correct_norm
        retrieved = arm.retrieved or [()] * len(arm.questions)
        for row, (context, scored) in enumerate(zip(contexts, continuations, strict=True)):
            sample = _sample(arm, row, context, scored) | {
                "acc": float(correct_Q[row]),
                "acc_norm": float(correct_norm_Q[row]),
                "prediction": int(picks_Q[row]),
                "retrieved": [_passage(item) for item in retrieved[row]],
            }
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    return path


def _sample(arm: ArmResult, row: int, context: str, scored: Sequence[str]) -> dict[str, Any]:
    question = arm.questions[row]
    assert len(scored) == len(question.choices), (question.id, len(scored))
    doc = to_row(question)
    # Floats as repr strings round-trip exactly. A mixture has no greedy continuation, hence False.
    answers = [[repr(float(logp)), "False"] for logp in arm.logp_QC[row, : len(scored)]]
    target = str(question.answer)
    return {
        "doc_id": row,
        "doc": doc,
        "target": target,
        "arguments": {
            f"gen_args_{index}": {"arg_0": context, "arg_1": continuation}
            for index, continuation in enumerate(scored)
        },
        "resps": [[answer] for answer in answers],
        "filtered_resps": answers,
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "doc_hash": _sha256(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _sha256(context),
        "target_hash": _sha256(target),
    }


def _passage(item: Retrieved) -> dict[str, Any]:
    return {"chunk": item.chunk, "score": item.score, "posterior": item.posterior}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
