"""Kills a process that searches, publishes and compacts through a live index, again and again.

    python tests/live_kills.py --kills 100 --seed 7
    python tests/live_kills.py --kills 8 --planted "generation as it was"

Changes are those of `kb_kills.py`. Between them the process publishes generations, swaps in late
ones, and compacts. After every kill a fresh live index must answer as the state of the file's
version does, and no file may hold a text that a compaction has erased which was told. `--planted`
goes on with mistakes, which must be found. The last line is JSON.
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from kb_kills import CHUNKER, MEMORY, apply, change, killed

from hashed import embedder, vectors
from rag2.index.flat import Flat
from rag2.kb.store import KnowledgeBase
from rag2.live.live import Live
from rag2.live.part import Part
from rag2.types import Document

FAULTS = ("generation as it was", "told before the compaction")
LONGEST = 0.2  # seconds that a writer lives


def write_live(path: Path, seed: int, told: int, fault: str | None) -> None:
    """The same through a live index; tell compactions too, as `cVERSION`."""
    dice, launched = random.Random(), []
    with opened(path) as live, KnowledgeBase(path) as kb:
        there = {document.id: document.text for document in kb.documents()}
        version = kb.version
        os.write(told, b"0\n")
        while True:
            with live.batch():
                for _ in range(dice.randrange(1, 6)):
                    version += 1
                    id, text = change(seed, version, there)
                    apply(there, id, text)
                    if text is None:
                        live.remove([id])
                    else:
                        live.put([Document(id, text)], CHUNKER)
            os.write(told, f"{version}\n".encode())
            what = dice.choice(("search", "launch", "swap", "refresh", "compact"))
            if what == "search":
                live.search(["change"], 3)
            elif what == "launch":
                launched.append(live.snapshot())
            elif what == "swap" and launched:
                live.swap(launched.pop(dice.randrange(len(launched))).build(live.backend))
            elif what == "refresh":
                live.refresh()
            elif what == "compact":
                if fault == "told before the compaction":
                    os.write(told, f"c{version}\n".encode())
                live.compact()
                os.write(told, f"c{version}\n".encode())


def opened(path: Path) -> Live:
    """The live index of the file, with its folder of generations."""
    return Live(path, embedder(), Flat(device="cpu"), path.parent / "generations")


def warm_up(folder: Path) -> None:
    """Import what a writer imports on its way, before it is forked: half its life went there."""
    folder.mkdir()
    KnowledgeBase(folder / "kb.sqlite", create=True).close()
    with opened(folder / "kb.sqlite") as live:
        live.put([Document("a", "a")], CHUNKER)
        live.refresh()
        live.compact()


def as_it_was() -> Any:
    """A mistake: of a generation all rows are found, whatever has gone since."""
    of = Part.of.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def every(cls: Any, index: Any, namespaces: Any) -> Part:
        return of(cls, index, dict.fromkeys(index.ids_N.tolist(), ""))

    return mock.patch.object(Part, "of", classmethod(every))


def wrong_answers(path: Path, live: dict[str, str], fault: str | None) -> list[str]:
    """What of a fresh live index is not the answer of this state."""
    query_D = vectors(["change"])[0]
    lines = [line for text in live.values() for line in text.split("\n")]
    wanted = sorted(zip((-vectors(lines) @ query_D).tolist(), lines, strict=True))
    planted = as_it_was() if fault == "generation as it was" else contextlib.nullcontext()
    with planted, opened(path) as fresh:
        found = fresh.nearest(query_D[None], 10_000)
        scores, ids = found.scores_BK[0].tolist(), found.ids_BK[0].tolist()
        texts = [chunk.text for chunk in found.chunks()]
    wrong = []
    if sorted(zip((-score for score in scores), texts, strict=True)) != wanted:
        wrong.append("the live index does not answer as this version")
    if [*zip(scores, ids, strict=True)] != sorted(
        zip(scores, ids, strict=True), key=lambda hit: (-hit[0], hit[1])
    ):
        wrong.append("the answer is not in order")
    return wrong


def traces(folder: Path, erased: set[str]) -> list[str]:
    """Files with a text that a compaction has erased."""
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [
        f"{path.name} holds {text!r}, which was erased"
        for path, data in files.items()
        for text in erased
        if text.encode() in data
    ]


def ran(kills: int, seed: int, fault: str | None) -> dict[str, Any]:
    """What came of so many kills."""
    tally: Counter[str] = Counter()

    def look(
        path: Path, live: dict[str, str], gone: dict[int, list[str]], compacted: int
    ) -> list[str]:
        tally["within a publication"] += any(path.parent.glob("generations/.*.staging-*"))
        tally["compactions told"] += compacted > 0
        erased = {text for n in range(1, compacted + 1) for text in gone.get(n, [])}
        return traces(path.parent, erased) + wrong_answers(path, live, fault)

    with tempfile.TemporaryDirectory(prefix="rag2-live-kills-", dir=MEMORY) as folder:
        warm_up(Path(folder) / "other")
        found = killed(Path(folder), kills, seed, fault, write_live, look, LONGEST)
    return {**found, **tally}


def main() -> None:
    """Run; exit status 1 if anything was lost or differed, or a planted mistake was not found."""
    arguments = argparse.ArgumentParser(description="Kill writers through a live index.")
    arguments.add_argument("--kills", type=int, default=100)
    arguments.add_argument("--seed", type=int, default=secrets.randbits(31))
    arguments.add_argument("--planted", nargs="*", choices=FAULTS, default=[], help="mistakes")
    asked = arguments.parse_args()
    found = ran(asked.kills, asked.seed, None)
    found["planted"] = {fault: ran(100, asked.seed, fault)["wrong"] for fault in asked.planted}
    sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(bool(found["wrong"]) or not all(found["planted"].values()))


if __name__ == "__main__":
    main()
