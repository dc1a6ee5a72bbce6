"""A living knowledge base beside a dict: random operations, and every answer must be the dict's.

    python tests/living.py --operations 1000000 --seed 7
    python tests/living.py --operations 20000 --fault "tombstones not replayed at swap"

Operations: add, put, remove, a batch, a change by another process, search (vectors and words, in
namespaces or all), refresh launched, built and swapped in later, crash (the files as they lie,
open, in the middle of a batch or not), reopen, compact. `--fault` plants a mistake, which must be
found. The last line is JSON.
"""

import argparse
import contextlib
import json
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

from hashed import embedder, vectors
from lines import Lines
from living_faults import FAULTS
from rag2.index.flat import Flat
from rag2.index.generation import Generation
from rag2.kb.store import KnowledgeBase
from rag2.live.live import Live
from rag2.live.snapshot import Snapshot
from rag2.registry import UserError
from rag2.types import Document

MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # there an fsync costs nothing
SPACES = ["", "a", "b"]
NAMES = [f"d{n}" for n in range(12)]
WORDS = ["ferry", "bread", "stone", "river", "candle", "wheel", "lamp", "mill"]
CHUNKER = Lines()
WEIGHTS = {
    "put": 20,
    "add": 8,
    "remove": 12,
    "batch": 3,
    "elsewhere": 5,
    "search": 44,
    "words": 4,
    "launch": 3,
    "build": 4,
    "swap": 4,
    "reopen": 0.4,
    "crash": 0.5,
    "compact": 0.5,
}


class Wrong(AssertionError):
    """An answer that is not the dict's."""


class Oracle:
    """What should be there: (namespace, id) -> document, with the ids of its chunks."""

    def __init__(self) -> None:
        self.documents: dict[tuple[str, str], Document] = {}
        self.ids: dict[tuple[str, str], list[int]] = {}
        self.version, self.last = 0, 0

    def put(self, namespace: str, documents: list[Document]) -> None:
        """One version, if anything is new."""
        changed = [d for d in documents if self.documents.get((namespace, d.id)) != d]
        for document in changed:
            lines = document.text.count("\n") + 1
            self.documents[namespace, document.id] = document
            self.ids[namespace, document.id] = [self.last + n + 1 for n in range(lines)]
            self.last += lines
        self.version += bool(changed)

    def remove(self, namespace: str, ids: list[str]) -> None:
        """One version."""
        for id in ids:
            del self.documents[namespace, id], self.ids[namespace, id]
        self.version += bool(ids)

    def rows(self, namespaces: list[str] | None) -> dict[int, str]:
        """Chunk id -> passage of all that may be found."""
        return {
            id: f"{document.title}\n{line}" if document.title else line
            for (namespace, name), document in self.documents.items()
            if namespaces is None or namespace in namespaces
            for id, line in zip(self.ids[namespace, name], document.text.split("\n"), strict=True)
        }

    def nearest(
        self, query_D: np.ndarray, k: int, namespaces: list[str] | None
    ) -> tuple[list[float], list[int]]:
        """By looking at everything."""
        rows = self.rows(namespaces)
        ids_N = np.array([*rows], dtype=np.int64)
        scores_N = vectors([*rows.values()]) @ query_D
        order_K = np.lexsort((ids_N, -scores_N))[:k]
        return scores_N[order_K].tolist(), ids_N[order_K].tolist()


class World:
    """The knowledge base in a folder, the dict, and generations that are being made."""

    def __init__(self, folder: Path, seed: int, fault: str | None = None) -> None:
        self.root, self.dice, self.fault = folder, random.Random(seed), fault
        self.oracle, self.tally = Oracle(), Counter[str]()
        self.launched: list[Snapshot] = []
        self.built: list[Generation | None] = []
        self.places = 0
        self.folder = folder / "0"
        self.folder.mkdir()
        KnowledgeBase(self.folder / "kb.sqlite", create=True).close()
        self.live = self.open()

    def open(self) -> Live:
        """Search what lies in the folder; somebody else has it open, too."""
        path = self.folder / "kb.sqlite"
        self.other = KnowledgeBase(path)
        return Live(path, embedder(), Flat(device="cpu"), self.folder / "generations")

    def run(self, operations: int, seconds: float) -> None:
        """So many random operations; raises Wrong at the first answer that is not the dict's."""
        names, weights, began = [*WEIGHTS], [*WEIGHTS.values()], time.monotonic()
        for _ in range(operations):
            if time.monotonic() - began > seconds:
                break
            name = self.dice.choices(names, weights)[0]
            self.tally[name] += 1
            getattr(self, name)()
        self.check()
        self.close()

    def close(self) -> None:
        """All that is open."""
        self.live.close()
        self.other.close()

    # ----- changes -------------------------------------------------------------------------------

    def drawn(self, count: int) -> list[Document]:
        """Documents under different ids, with few different lines: near and equal ones abound."""
        documents = []
        for id in self.dice.sample(NAMES, count):
            lines = self.dice.choice((1, 1, 2, 3))
            text = "\n".join(" ".join(self.dice.choices(WORDS, k=2)) for _ in range(lines))
            documents.append(Document(id, text, self.dice.choice(("", "", "lamp"))))
        return documents

    def put(self, kb: Any = None) -> None:
        """Some documents, new, changed or as they are."""
        space = self.dice.choice(SPACES)
        documents = self.drawn(self.dice.choice((1, 1, 1, 2, 5)))
        if self.dice.random() < 0.2:
            documents = [d for (s, _), d in self.oracle.documents.items() if s == space][:3]
        before = self.oracle.version
        put = (kb or self.live).put(documents, CHUNKER, space)
        self.oracle.put(space, documents)
        same(
            put.added + put.updated > 0, self.oracle.version > before, "whether put made a version"
        )

    def add(self, kb: Any = None) -> None:
        """One document, which may be there already."""
        space, (document,) = self.dice.choice(SPACES), self.drawn(1)
        there = (space, document.id) in self.oracle.documents
        try:
            (kb or self.live).add([document], CHUNKER, space)
        except UserError:
            same(True, there, "an id that is live is refused")
        else:
            same(False, there, "an id that is not live is added")
            self.oracle.put(space, [document])

    def remove(self, kb: Any = None) -> None:
        """Some documents, or all of a namespace."""
        space = self.dice.choice(SPACES)
        ids = [id for s, id in self.oracle.documents if s == space]
        if ids and self.dice.random() < 0.97:
            ids = self.dice.sample(ids, min(len(ids), self.dice.choice((1, 1, 2))))
        (kb or self.live).remove(ids, space)
        self.oracle.remove(space, ids)

    def batch(self) -> None:
        """Several changes of one commit."""
        with self.live.batch():
            for _ in range(self.dice.randrange(1, 4)):
                self.dice.choice((self.put, self.add, self.remove))()

    def elsewhere(self) -> None:
        """A change by somebody else."""
        self.dice.choice((self.put, self.add, self.remove))(self.other)

    # ----- looking -------------------------------------------------------------------------------

    def search(self) -> None:
        """A query near some text, or at nothing, for more chunks than there may be."""
        both = [f"{self.dice.choice(WORDS)} {self.dice.choice(WORDS)}", "none"]
        queries_BD = vectors(both[: self.dice.choice((1, 1, 1, 2))])
        if self.dice.random() < 0.05:
            queries_BD[0] = 0
        spaces = self.dice.choice((None, None, [""], ["a"], ["b"], ["a", "b"], [], ["nobody"]))
        k = self.dice.choice((1, 1, 2, 3, 3, 5, 10, 100))
        found = self.live.nearest(queries_BD, k, spaces)
        rows = self.oracle.rows(spaces)
        for b, query_D in enumerate(queries_BD):
            scores, ids = self.oracle.nearest(query_D, k, spaces)
            same(found.ids_BK[b].tolist(), ids, "chunks found")
            same(found.scores_BK[b].tolist(), scores, "scores")
            for chunk in found.chunks(b):
                same(chunk.passage, rows[chunk.id], "the text of a chunk")

    def words(self) -> None:
        """A word, which has to be in the hits and in no other chunk."""
        word, spaces = self.dice.choice(WORDS), self.dice.choice((None, [""], ["a", "b"]))
        found = {id for id, _ in self.other.search_text(word, 1000, spaces)}
        rows = self.oracle.rows(spaces)
        same(found, {id for id, text in rows.items() if word in text}, "chunks with a word")

    def check(self) -> None:
        """Everything that is there."""
        same(self.other.version, self.oracle.version, "the version")
        for space in SPACES:
            live = {d.id: d for d in self.other.documents(space)}
            want = {id: d for (s, id), d in self.oracle.documents.items() if s == space}
            same(live, want, f"documents of {space!r}")
        query_BD = vectors(["everything"])
        found = self.live.nearest(query_BD, 10_000)
        same(found.ids_BK[0].tolist(), self.oracle.nearest(query_BD[0], 10_000, None)[1], "all")

    # ----- generations and the life of the process -----------------------------------------------

    def launch(self) -> None:
        """A snapshot, to be built some time."""
        if len(self.launched) < 3:
            self.launched.append(self.live.snapshot())

    def build(self) -> None:
        """A generation, to be swapped in some time."""
        if self.launched:
            snapshot = self.launched.pop(self.dice.randrange(len(self.launched)))
            self.built.append(snapshot.build(Flat(device="cpu")))

    def swap(self) -> None:
        """The generation of some time ago."""
        if self.built:
            self.live.swap(self.built.pop(self.dice.randrange(len(self.built))))

    def reopen(self) -> None:
        """An end in order; what was being built is built by nobody any more."""
        self.close()
        self.launched.clear()
        self.live = self.open()
        self.check()

    def crash(self) -> None:
        """The files are found as they lie while the process has them open, maybe within a batch."""
        with contextlib.suppress(ZeroDivisionError), self.live.batch():
            if self.dice.random() < 0.5:
                before = self.oracle
                self.oracle = Oracle()
                self.oracle.documents, self.oracle.ids = dict(before.documents), dict(before.ids)
                self.oracle.version, self.oracle.last = before.version, before.last
                self.put()
                self.remove()
                self.oracle = before
            self.places += 1
            self.folder = self.root / str(self.places)
            ignore = shutil.ignore_patterns(
                "*-shm", *(["*-wal"] if self.fault == "log lost" else [])
            )
            shutil.copytree(self.root / str(self.places - 1), self.folder, ignore=ignore)
            raise ZeroDivisionError
        self.close()
        shutil.rmtree(self.root / str(self.places - 1))
        if self.dice.random() < 0.1:
            for damaged in self.folder.glob("generations/*/chunks.arrow"):
                damaged.write_bytes(damaged.read_bytes()[:-1])
        self.launched.clear()
        self.built = self.built if self.dice.random() < 0.5 else []
        self.live = self.open()
        self.check()

    def compact(self) -> None:
        """What is gone is gone for good."""
        self.live.compact()
        self.check()


def same(found: Any, wanted: Any, what: str) -> None:
    """Raise Wrong unless they are equal."""
    if found != wanted:
        raise Wrong(f"{what}: {str(found)[:200]} instead of {str(wanted)[:200]}")


def explore(
    operations: int, seed: int, fault: str | None = None, seconds: float = 1e9
) -> dict[str, Any]:
    """What came of so many operations; `wrong` is the first difference."""
    began, wrong = time.monotonic(), None
    with tempfile.TemporaryDirectory(prefix="rag2-living-", dir=MEMORY) as folder:
        with FAULTS[fault]() if fault else contextlib.nullcontext():
            world = World(Path(folder), seed, fault)
            try:
                world.run(operations, seconds)
            except (Wrong, KeyError) as error:
                wrong = f"{type(error).__name__}: {error}"
                world.close()
    return {
        "seed": seed,
        "fault": fault,
        "operations": sum(world.tally.values()),
        **dict(sorted(world.tally.items())),
        "versions": world.oracle.version,
        "chunks_written": world.oracle.last,
        "wrong": wrong,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Run; exit status 1 if an answer differed."""
    arguments = argparse.ArgumentParser(description="Random operations beside a dict.")
    arguments.add_argument("--operations", type=int, default=20_000)
    arguments.add_argument("--seed", type=int, default=secrets.randbits(31))
    arguments.add_argument("--minutes", type=float, default=1e9, help="end after this long, too")
    arguments.add_argument("--fault", choices=sorted(FAULTS))
    asked = arguments.parse_args()
    sys.stderr.write(f"seed {asked.seed}\n")
    found = explore(asked.operations, asked.seed, asked.fault, 60 * asked.minutes)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
