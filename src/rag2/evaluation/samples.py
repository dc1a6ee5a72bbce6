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


def write_samples(directory: Path, arm: ArmResult) -> Path:
    """Write samples_<arm>.jsonl, one question a line in the order asked, and return its path."""
    path = directory / f"samples_{arm.name}.jsonl"
    right = {
        "acc": arm.correct,
        **arm.correct_by_length,
        "acc_mutual_info": arm.correct_mutual,
        "debiased_accuracy": arm.debiased_Q,
    }
    metrics = {name: right_Q for name, right_Q in right.items() if right_Q is not None}
    picks_Q = arm.predictions
    retrieved = arm.retrieved or [()] * len(arm.questions)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in range(len(arm.questions)):
            sample = _sample(arm, row, list(metrics))
            sample |= {name: float(right_Q[row]) for name, right_Q in metrics.items()}
            sample |= {
                "prediction": int(picks_Q[row]),
                "retrieved": [_passage(item) for item in retrieved[row]],
            }
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    return path


def _sample(arm: ArmResult, row: int, metrics: Sequence[str]) -> dict[str, Any]:
    question, labels = arm.questions[row], arm.labels[row]
    context = arm.contexts[row] if arm.contexts else question.question
    assert len(labels) == len(question.choices), (question.id, len(labels))
    doc = to_row(question)
    # Floats as repr strings round-trip exactly. Whether an answer is the greedy one is not
    # computed: of a mixture there is none, and for the other arms nobody asks.
    answers = [[repr(float(logp)), "False"] for logp in arm.logp_QC[row, : len(labels)]]
    target = str(question.answer)
    return {
        "doc_id": row,
        "doc": doc,
        "target": target,
        "arguments": {
            f"gen_args_{index}": {"arg_0": context, "arg_1": f" {label}"}
            for index, label in enumerate(labels)
        },
        "resps": [[answer] for answer in answers],
        "filtered_resps": answers,
        "filter": "none",
        "metrics": list(metrics),
        "doc_hash": _sha256(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _sha256(context),
        "target_hash": _sha256(target),
    }


def _passage(item: Retrieved) -> dict[str, Any]:
    return {"chunk": item.chunk, "score": item.score, "posterior": item.posterior}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
