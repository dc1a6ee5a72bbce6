"""Compaction: what was removed is in no file any more, and all else is as it was."""

import hashlib
import shutil
from pathlib import Path

import pytest

from hashed import crowded, embedder
from lines import Lines, documents
from rag2 import artifact, cli
from rag2.index.flat import Flat
from rag2.index.generation import Generation
from rag2.kb.store import KnowledgeBase
from rag2.live import folder
from rag2.live.live import Live
from rag2.live.view import Embedder
from rag2.registry import UserError
from rag2.types import Document

FLAT = Flat(device="cpu")
LINES = Lines()


def word(n: int) -> str:
    """A word of one document alone, with nothing in common with the others at its beginning."""
    return hashlib.sha256(f"bird {n}".encode()).hexdigest()[:16]


def canary(n: int) -> str:
    """A text of one document alone."""
    return f"canary {n} sings {word(n)}"


def traces(where: Path, count: int) -> list[str]:
    """Every file that holds a canary, as text, as a word of the index, or as its embedding."""
    patterns = [canary(n).encode(code) for n in range(count) for code in ("utf-8", "utf-16-le")]
    patterns += [word(n)[4:].encode() for n in range(count)]  # it leaves out common beginnings
    patterns += [f"bird-{n}.txt".encode() for n in range(count)]
    patterns.append(b"aviary")  # a name may tell as much
    passages = [f"Bird {n}\n{canary(n)}" for n in range(count)]
    patterns += [row.tobytes() for row in crowded(passages)]
    files = [path for path in where.rglob("*") if path.is_file()]
    return [path.name for path in files if any(p in path.read_bytes() for p in patterns)]


def test_a_hundred_removed_documents_leave_no_byte_after_compaction(tmp_path: Path):
    where = tmp_path / "kb"
    where.mkdir()
    KnowledgeBase(where / "kb.sqlite", create=True).close()
    birds = [Document(f"bird-{n}.txt", canary(n), f"Bird {n}") for n in range(100)]
    who = Embedder("c", 16, crowded)
    with Live(where / "kb.sqlite", who, FLAT, where / "generations") as live:
        # Some builds of SQLite overwrite what is deleted; none has to.
        live._writer._db.execute("PRAGMA secure_delete = OFF")
        live.add(documents(50), LINES)
        live.add(birds[:60], LINES)
        live.add(birds[60:90], LINES, "aviary")
        live.refresh()
        live.add(birds[90:], LINES)
        launched = live.snapshot().build(FLAT)
        assert launched
        live.remove([bird.id for bird in birds[:60] + birds[91:]])
        live.remove([bird.id for bird in birds[60:90]], "aviary")
        live.put([Document(birds[90].id, "nothing")], LINES)
        live.remove([birds[90].id])
        shutil.copytree(where / "generations" / "000000", where / "generations" / "000007")
        assert {"kb.sqlite-wal", "index.faiss", "chunks.arrow"} <= {*traces(where, 100)}
        before = live.search(["d one 7"], 100)
        assert live.compact() == 101
        assert traces(where, 100) == []
        live.swap(launched)  # begun before the compaction
        assert traces(where, 100) == []
        launched.save(where / "generations" / "000099")  # left by somebody who was killed
        live.compact()
        assert traces(where, 100) == []
        after = live.search(["d one 7"], 100)
        assert after.ids_BK.tobytes() == before.ids_BK.tobytes() and len(after.ids_BK[0]) == 100
        assert [chunk.text for chunk in after.chunks()] == [c.text for c in before.chunks()]
        live.remove([f"d{n}" for n in range(50)])
        live.compact()
        assert live.search(["d one 7"], 9).ids_BK.shape == (1, 0)
        assert [path for path in (where / "generations").iterdir()] == []
    assert traces(where, 100) == []


def test_full_text_search_is_as_it_was_after_a_compaction(tmp_path: Path, dice):
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True) as kb:
        for space in ("", "a", "b"):
            kb.add(documents(20), LINES, space)
        kb.remove([f"d{n}" for n in range(20)], "b")
        kb.remove(["d3", "d4"])
        found = {q: kb.search_text(q, 99) for q in ("one", "7", "d two", "3")}
        content, version, chunks = kb.content_hash(), kb.version, kb.chunks()
        assert kb.compact() == 44
        assert {q: kb.search_text(q, 99) for q in found} == found
        assert (kb.content_hash(), kb.version, kb.chunks()) == (content, version, chunks)
        assert kb.chunks(version) == chunks and kb.since(version) is not None
        assert kb.since(version - 1) is None and kb.namespaces() == ["", "a"]
        with pytest.raises(UserError, match=f"version {version - 1} was compacted away"):
            kb.chunks(version - 1)
        kb.add(documents(1), LINES, "b")
        assert kb.version == version + 1 and kb.search_text("one", 9, ["b"])
        assert kb.compact() == 0
        assert kb.chunks()[-1].id == 122  # ids go on


def test_a_compaction_of_twice_as_many_documents_takes_about_twice_the_steps(tmp_path: Path):
    def steps(count: int) -> int:
        ticks: list[None] = []
        with KnowledgeBase(tmp_path / str(count), create=True) as kb:
            kb.add(documents(count), LINES)
            kb.remove(["d0"])
            kb._db.set_progress_handler(lambda: ticks.append(None), 100)
            kb.compact()
        return len(ticks)

    assert steps(1000) < 3 * steps(500)


def test_a_compaction_beside_a_reader_of_an_old_state_says_so(tmp_path: Path):
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True) as kb:
        kb.add(documents(5), LINES)
        kb.remove(["d1"])
        kb._db.execute("PRAGMA busy_timeout = 10")
        with KnowledgeBase(tmp_path / "kb.sqlite") as other:
            with other.reading():
                assert other.version == 2
                with pytest.raises(UserError, match="compact it again"):
                    kb.compact()
            assert kb.compact() == 0
        assert (tmp_path / "kb.sqlite-wal").stat().st_size == 0
        assert b"d one 1" not in (tmp_path / "kb.sqlite").read_bytes()


def test_purge_drops_the_generations_that_hold_what_is_gone(tmp_path: Path):
    KnowledgeBase(tmp_path / "kb.sqlite", create=True).close()
    where = tmp_path / "generations"
    with Live(tmp_path / "kb.sqlite", embedder(), FLAT) as live:
        live.add(documents(4), LINES)
        whole = live.snapshot().build(FLAT)
        live.remove(["d1"])
        clean = live.snapshot().build(FLAT)
    assert whole and clean
    with KnowledgeBase(tmp_path / "kb.sqlite") as kb:
        alive = kb.alive()
    clean.save(where / "000001")
    whole.save(where / "000002", pointer=where / "current")
    clean.save(where / "000003")
    (where / "000003" / "chunks.arrow").write_bytes(b"nobody can tell")
    assert {path.name for path in folder.purge(where, alive)} == {"000002", "000003"}
    assert [path.name for path in where.iterdir()] == ["000001"]  # the pointer named one of them
    loaded = folder.newest(where, "hashed")
    assert isinstance(loaded, Generation) and artifact.is_complete(where / "000001")


def test_generations_of_another_knowledge_base_are_not_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    theirs = tmp_path / "generations"
    for name, count in (("small", 1), ("large", 9)):
        with KnowledgeBase(tmp_path / name, create=True) as kb:
            kb.add(documents(count, prefix=name), LINES)
            kb.remove([f"{name}0"])
    with Live(tmp_path / "large", embedder(), FLAT, theirs) as live:
        live.refresh()
    before = sorted(path for path in theirs.rglob("*"))
    with KnowledgeBase(tmp_path / "small") as kb:
        with pytest.raises(SystemExit) as caught:
            cli.main(["kb", "compact", str(kb.path), "--generations", str(theirs)])
        assert caught.value.code == 2
        line = (
            f"{theirs / '000000'} is a generation of another knowledge base: nothing is removed\n"
        )
        assert capsys.readouterr().err.endswith(f"error: {line}")
        assert sorted(path for path in theirs.rglob("*")) == before and kb.oldest == 0
        kb.compact()  # of its own chunks none is left to compare: their ids are too high
        with pytest.raises(UserError, match="of another knowledge base"):
            folder.refuse_others(theirs, kb)
    with Live(tmp_path / "large", embedder(), FLAT, theirs) as live:
        assert live.compact() == 2


def test_purge_takes_what_a_killed_writer_left_and_not_what_is_being_written(tmp_path: Path):
    where = tmp_path / "generations"
    dead = where / ".000004.staging-dead"
    dead.mkdir(parents=True)
    (dead / "chunks.arrow").write_bytes(canary(1).encode())
    with artifact.committing(where / "000005", kind="generation") as staging:
        (staging / "chunks.arrow").write_bytes(b"new")
        assert folder.purge(where, []) == [dead] and traces(where, 2) == []
    assert [path.name for path in where.iterdir()] == ["000005"]
