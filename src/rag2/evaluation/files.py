"""What an evaluation left on disk -> what the report is made of.

Everything here was written by us, so a file that does not fit is a user's mistake about which.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rag2.evaluation.curves import Logs
from rag2.evaluation.html import LIMIT, Samples, spread
from rag2.evaluation.results import FORMAT
from rag2.evaluation.verdict import Results
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError, nearest

KEYS = {"task", "n", "seed", "arms", "paired", "k_selection", "environment"}


def read_results(directory: Path) -> Results:
    """results.json of a directory; raises UserError if there is none or it is another format."""
    if not directory.is_dir():
        beside = [p.name for p in directory.parent.iterdir()] if directory.parent.is_dir() else []
        raise UserError(
            f"results={str(directory)!r} is not a directory.{nearest(directory.name, beside)}"
        )
    return read_file(directory / "results.json", f"results={str(directory)!r}")


def read_file(path: Path, given: str) -> Results:
    """The same from the file itself; `given` is what the user called its directory."""
    if not path.is_file():
        there = path.parent.is_dir() and path.name == "results.json"
        what = "there is no results.json in it" if there else "there is no such file or directory"
        raise UserError(f"{given}: {what}")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not JSON") from None
    found = results.get("format") if isinstance(results, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} has format {str(found)[:40]!r}; this version reads {FORMAT!r}")
    if "f1_interval" in results:
        raise UserError(f"{path} is of open questions: its report is the report.md beside it")
    missing = ", ".join(sorted(KEYS - results.keys()))
    if missing or not results["arms"]:
        raise UserError(f"{path} is incomplete: no {missing or 'arms'}")
    return results


def read_samples(directory: Path, arms: Iterable[str], limit: int = LIMIT) -> Samples:
    """At most `limit` evenly spread rows of each arm's samples; arms without a file are left out.

    Raises UserError if two arms answered different questions.
    """
    samples: dict[str, list[dict[str, Any]]] = {}
    asked: list[str] | None = None
    for arm in arms:
        path = directory / f"samples_{arm}.jsonl"
        if not path.is_file():
            continue
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        try:
            rows = [json.loads(lines[row]) for row in spread(len(lines), limit)]
            ids = [str(row["doc"]["id"]) for row in rows] + [str(len(lines))]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} holds a line that is no sample") from None
        if asked not in (None, ids):
            raise UserError(
                f"{path} answers other questions than the samples of {next(iter(samples))}"
            )
        samples[arm], asked = rows, ids
    return samples


def read_passages(kb: Path, samples: Samples) -> Mapping[int, str]:
    """Texts, by chunk id, of what the samples retrieved; raises UserError if `kb` is none."""
    needed = {
        item["chunk"] for rows in samples.values() for row in rows for item in row["retrieved"]
    }
    with KnowledgeBase(kb) as base:
        return {chunk.id: chunk.passage for chunk in base.chunks() if chunk.id in needed}


def read_logs(directory: Path) -> Logs:
    """log.jsonl of every stage below `directory`, by the stage's name; a half line at the end, as
    a run that goes on leaves it, is not read."""
    logs = {}
    for path in sorted(directory.glob("*/log.jsonl")):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        try:
            logs[path.parent.name] = [json.loads(line) for line in lines]
        except ValueError:
            raise UserError(f"{path} holds a line that is not JSON") from None
    return logs
