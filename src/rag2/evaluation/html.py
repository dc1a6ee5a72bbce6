"""Numbers, samples, passages and figures -> report.html, one page that needs no other file.

Texts of questions and documents are foreign: the template escapes them, the question browser's
script writes them as text nodes, and the page's Content-Security-Policy runs that one script, by
its hash, and allows no request at all.
"""

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rag2.evaluation.canvas import Picture, role
from rag2.evaluation.columns import Section, Table
from rag2.evaluation.sections import sections
from rag2.evaluation.verdict import Results, verdict

PAGE = Path(__file__).parent / "page"
LIMIT = 200  # questions in the browser, which keeps the page at a few megabytes
# Under which heading a figure stands; these headings come even without a table of their own.
PLACES = {
    "Arms": ("accuracy", "relative_gain"),
    "Accuracy against K": ("by_k",),
    "Paired differences": ("significance",),
    "Cost": ("cost",),
    "Training": ("loss", "recall"),
}
Sample = Mapping[str, Any]
Samples = Mapping[str, Sequence[Sample]]


def html(
    results: Results,
    samples: Samples,
    passages: Mapping[int, str],
    pictures: Mapping[str, Picture],
    limit: int = LIMIT,
) -> str:
    """The page: every section and figure, and at most `limit` questions to look at one by one.

    `samples` are rows of samples_<arm>.jsonl, the same questions in the same order for every arm;
    `passages` are texts by chunk id, of which only those shown are put into the page.
    """
    script = (PAGE / "report.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # `tojson` escapes <, > and &, so that no text can end the script element it stands in.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("report.html.jinja").render(
        results=results,
        verdict=verdict(results),
        seeds=" + ".join(results.get("seeds", [str(results["seed"])])),
        sections=_titled(sections(results), pictures),
        places=PLACES,
        pictures=pictures,
        roles={name: role(name, arm) for name, arm in results["arms"].items()},
        is_table=lambda part: isinstance(part, Table),
        browser=browser(samples, passages, limit),
        style=(PAGE / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the positions 0 to count - 1, evenly spread and ascending."""
    return list(range(count)) if count <= limit else [n * count // limit for n in range(limit)]


def browser(samples: Samples, passages: Mapping[int, str], limit: int) -> dict[str, Any]:
    """What the question browser knows: arms, questions with each arm's answer, passages."""
    arms = {arm: rows for arm, rows in samples.items() if rows}
    if not arms:
        return {"arms": [], "questions": [], "passages": {}}
    counts = {len(rows) for rows in arms.values()}
    assert len(counts) == 1, {arm: len(rows) for arm, rows in arms.items()}
    kept = spread(counts.pop(), limit)
    questions = [_question({arm: rows[row] for arm, rows in arms.items()}) for row in kept]
    needed = {
        chunk for question in questions for answer in question["arms"] for chunk in _chunks(answer)
    }
    return {
        "arms": list(arms),
        "questions": questions,
        "passages": {str(chunk): passages[chunk] for chunk in sorted(needed & passages.keys())},
    }


def _question(by_arm: Mapping[str, Sample]) -> dict[str, Any]:
    """One question with every arm's log-likelihoods (nats), pick and retrieved chunks."""
    first = next(iter(by_arm.values()))
    doc = first["doc"]
    assert len({sample["doc"]["id"] for sample in by_arm.values()}) == 1, "arms are not paired"
    choices = doc.get("choices", doc.get("answers", ()))
    return {
        "number": first["doc_id"],
        "id": doc["id"],
        "question": doc["question"],
        "choices": list(choices),
        "answer": doc.get("answer", 0),
        "groups": {str(key): str(value) for key, value in doc.get("metadata", {}).items()},
        "prompt": first["arguments"]["gen_args_0"]["arg_0"] if first["arguments"] else "",
        "arms": [
            {
                "logp": [_rounded(float(answer[0][0])) for answer in sample["resps"]],
                "pick": sample["prediction"],
                "right": bool(sample["acc"]),
                "retrieved": [
                    [item["chunk"], _rounded(item["score"]), _rounded(item["posterior"])]
                    for item in sample["retrieved"]
                ],
            }
            for sample in by_arm.values()
        ],
    }


def _chunks(answer: Mapping[str, Any]) -> Iterable[int]:
    return (chunk for chunk, _, _ in answer["retrieved"])


def _rounded(value: float | None) -> float | None:
    """Four digits after the point; JSON has no infinity, which is how impossible choices score."""
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _titled(found: Sequence[Section], pictures: Mapping[str, Picture]) -> list[Section]:
    """The sections, and those that only have figures behind the section they follow in PLACES."""
    titles = {section.title for section in found}
    only_figures = [
        Section(title, ())
        for title, names in PLACES.items()
        if title not in titles and any(name in pictures for name in names)
    ]
    return [*found, *only_figures]
