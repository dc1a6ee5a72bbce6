"""Kills a writer of a knowledge base at any instant, again and again; or lets many write at once.

    python tests/kb_kills.py --kills 300 --seed 7
    python tests/kb_kills.py --kills 100 --fault "told before the commit"
    python tests/kb_kills.py --writers 8 --commits 200

Change n follows from the seed, n and what is there, so that the state after version v is known
without asking the file. The writer commits groups of changes, tells the version after each, and
compacts now and then. After every kill the file must hold what was told (none lost) and be exactly
the state of its version (no phantom); the next writer goes on from there. `--fault` plants a
mistake, which must be found. The last line is JSON. `live_kills.py` does it to a live index.
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

from lines import Lines
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.types import Document

FAULTS = ("told before the commit", "no transaction")
CHUNKER = Lines()
# A kill takes nothing from the system's cache: that a file is synced makes no difference to it.
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


def change(seed: int, n: int, live: dict[str, str]) -> tuple[str, str | None]:
    """The id that version n writes, and its text; None: it is removed."""
    dice = random.Random(f"{seed} {n}")
    if live and dice.random() < 0.4:
        return dice.choice(sorted(live)), None
    lines = [f"change {n} line {line}" for line in range(dice.randrange(1, 4))]
    return f"d{dice.randrange(100)}", "\n".join(lines)


def apply(live: dict[str, str], id: str, text: str | None) -> None:
    """The same in a dict."""
    if text is None:
        del live[id]
    else:
        live[id] = text


def write(path: Path, seed: int, told: int, fault: str | None) -> None:
    """Change the file until the end; tell each version that is durable."""
    dice = random.Random()
    with KnowledgeBase(path) as kb:
        if fault == "no transaction":
            setattr(kb, "_transaction", contextlib.nullcontext)  # noqa: B010 (of a method)
        live = {document.id: document.text for document in kb.documents()}
        version = kb.version
        os.write(told, b"0\n")
        while True:
            with kb.batch():
                for _ in range(dice.randrange(1, 6)):
                    version += 1
                    id, text = change(seed, version, live)
                    apply(live, id, text)
                    if text is None:
                        kb.remove([id])
                    else:
                        kb.put([Document(id, text)], CHUNKER)
                if fault == "told before the commit":
                    os.write(told, f"{version}\n".encode())
            os.write(told, f"{version}\n".encode())
            if dice.random() < 0.02:
                kb.compact()


# (the file, what it must hold, what each version removed, the last compaction) -> what is wrong
Look = Callable[[Path, dict[str, str], dict[int, list[str]], int], list[str]]


def killed(
    folder: Path,
    kills: int,
    seed: int,
    fault: str | None,
    write: Callable[[Path, int, int, str | None], None] = write,
    look: Look = lambda *_: [],
    longest: float = 0.06,
) -> dict[str, Any]:
    """What came of so many kills of writers of one file, which live so many seconds at most."""
    path, dice = folder / "kb.sqlite", random.Random(seed)
    KnowledgeBase(path, create=True).close()
    live: dict[str, str] = {}
    gone: dict[int, list[str]] = {}
    version = acknowledged = done = 0
    tally: Counter[str] = Counter()
    wrong: list[str] = []
    while done < kills and not wrong:
        try:
            told, compacted = last_told(
                lambda pipe: write(path, seed, pipe, fault), dice.uniform(0, longest)
            )
        except Ended:
            wrong.append(f"kill {done + 1}: the writer ended by itself")
            break
        acknowledged += max(told - version, 0)
        done += 1
        with KnowledgeBase(path) as kb:
            found = kb.version
            if found < max(told, version):
                wrong.append(f"kill {done}: told {max(told, version)}, found {found}")
                break
            tally["beyond what was told"] += found > max(told, version)
            for n in range(version + 1, found + 1):
                id, text = change(seed, n, live)
                gone[n] = [line for line in live.get(id, "").split("\n") if line]
                apply(live, id, text)
            version = found
            wrong += [f"kill {done}: {what}" for what in differences(kb, live)]
        wrong += [f"kill {done}: {what}" for what in look(path, live, gone, compacted)]
    return {
        "seed": seed,
        "fault": fault,
        "kills": done,
        "acknowledged": acknowledged,
        "versions": version,
        "documents": len(live),
        **tally,
        "wrong": wrong[:3],
    }


class Ended(Exception):
    """A writer did, before it was killed."""


def last_told(write: Callable[[int], None], seconds: float) -> tuple[int, int]:
    """Let a writer write for a while, kill it: the last version and compaction that it told."""
    reading, writing = os.pipe()
    pid = child(lambda: write(writing))
    os.close(writing)
    heard = os.read(reading, 65536)  # it has opened the file
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        raise Ended
    while more := os.read(reading, 65536):
        heard += more
    os.close(reading)
    lines = heard.decode().split("\n")[:-1]
    versions = [int(line) for line in lines if not line.startswith("c")]
    return versions[-1], max((int(line[1:]) for line in lines if line.startswith("c")), default=0)


def differences(kb: KnowledgeBase, live: dict[str, str]) -> list[str]:
    """What of the file is not the state that it should be."""
    wrong = []
    if {document.id: document.text for document in kb.documents()} != live:
        wrong.append("the documents are not those of this version")
    lines = [line for text in live.values() for line in text.split("\n")]
    if sorted(chunk.text for chunk in kb.chunks()) != sorted(lines):
        wrong.append("the chunks are not those of this version")
    if len(kb.search_text("change", 10_000)) != len(lines):
        wrong.append("the full-text index is not that of this version")
    return wrong


def together(folder: Path, writers: int, commits: int) -> dict[str, Any]:
    """What came of so many processes that write at once."""
    path, began = folder / "kb.sqlite", time.monotonic()
    KnowledgeBase(path, create=True).close()

    def work(who: int) -> None:
        refused = 0
        with KnowledgeBase(path) as kb:
            for n in range(commits):
                while True:
                    try:
                        kb.add([Document(f"{who}-{n}", f"{who} wrote {n}")], CHUNKER)
                        break
                    except UserError as error:
                        assert "cannot be changed: database is locked" in str(error), error
                        refused += 1
        (folder / f"{who}.txt").write_text(str(refused))

    pids = [child(lambda who=who: work(who)) for who in range(writers)]
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    with KnowledgeBase(path) as kb:
        found = {document.id for document in kb.documents()}
        version, chunks = kb.version, len(kb.search_text("wrote", 10**6))
    wanted = {f"{who}-{n}" for who in range(writers) for n in range(commits)}
    told = [folder / f"{who}.txt" for who in range(writers)]
    return {
        "writers": writers,
        "commits": commits,
        "versions": version,
        "lost": len(wanted - found),
        "lock_errors": sum(int(file.read_text()) for file in told if file.exists()),
        "seconds": round(time.monotonic() - began, 1),
        "wrong": [
            what
            for what, bad in {
                "a writer failed": any(ended),
                "documents differ": found != wanted,
                "versions differ": version != len(wanted),
                "words differ": chunks != len(wanted),
            }.items()
            if bad
        ],
    }


def child(work: Callable[[], None]) -> int:
    """The id of a forked process that does it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def main() -> None:
    """Run; exit status 1 if anything was lost or differed."""
    arguments = argparse.ArgumentParser(description="Kill writers of a knowledge base.")
    arguments.add_argument("--kills", type=int, default=300)
    arguments.add_argument("--seed", type=int, default=secrets.randbits(31))
    arguments.add_argument("--fault", choices=FAULTS)
    arguments.add_argument("--writers", type=int, default=0, help="write at once; nobody is killed")
    arguments.add_argument("--commits", type=int, default=200, help="of each writer")
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="rag2-kills-", dir=MEMORY) as folder:
        if asked.writers:
            found = together(Path(folder), asked.writers, asked.commits)
        else:
            found = killed(Path(folder), asked.kills, asked.seed, asked.fault)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
