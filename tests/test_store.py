"""The knowledge base: every version readable, nothing half-written."""

import csv
import io
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from functools import partial

import pytest

from rag2.kb.build import build
from rag2.kb.chunk import TokenChunker
from rag2.kb.ingest import Reject
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.types import Document
from texts import WORDS, some_documents, write_jsonl

# ----- the store -----------------------------------------------------------------------------


def test_chunks_are_the_stated_characters_of_the_stored_documents(tmp_path, dice, chunker):
    documents = some_documents(dice, 20)
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True) as kb:
        assert kb.version == 0
        count = kb.add(documents, chunker)
    with KnowledgeBase(tmp_path / "kb.sqlite") as kb:
        assert list(kb.documents()) == documents and kb.version == 1
        chunks = kb.chunks()
        assert len(chunks) == count > 20 and [c.id for c in chunks] == sorted(c.id for c in chunks)
        texts = {document.id: document.text for document in documents}
        for chunk in chunks:
            assert chunk.text == texts[chunk.document][chunk.start : chunk.end]
            assert kb.chunk(chunk.id) == chunk


def test_the_state_at_every_version_stays_readable_and_ids_are_never_reused(
    tmp_path, dice, chunker
):
    documents = some_documents(dice, 8)
    live, history, used = {}, [[]], set()
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True) as kb:
        for _ in range(40):
            absent = [document for document in documents if document.id not in live]
            if absent and (not live or dice.random() < 0.5):
                batch = dice.sample(absent, dice.randrange(1, len(absent) + 1))
                kb.add(batch, chunker)
                live.update((document.id, document) for document in batch)
                fresh = {chunk.id for chunk in kb.chunks()} - {c.id for c in history[-1]}
                assert not fresh & used
                used |= fresh
            else:
                gone = dice.sample(sorted(live), dice.randrange(1, len(live) + 1))
                assert kb.remove(gone) == sum(c.document in gone for c in history[-1])
                live = {id: document for id, document in live.items() if id not in gone}
            history.append(kb.chunks())
            assert {chunk.document for chunk in history[-1]} == live.keys()
            assert {d.id: d for d in kb.documents()} == live
        assert kb.version == 40
        for version, expected in enumerate(history):
            assert kb.chunks(version) == expected
        for id in used - {chunk.id for chunk in history[-1]}:
            with pytest.raises(UserError):
                kb.chunk(id)
        found = {id for id, _ in kb.search_text(" ".join([*WORDS, "title", "x"]), 10_000)}
        assert found <= {chunk.id for chunk in history[-1]}


def test_the_id_of_an_erased_chunk_is_not_given_away(tmp_path, dice, chunker):
    first, second = some_documents(dice, 2)
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True) as kb:
        kb.add([first], chunker)
        last = kb.chunks()[-1].id
        kb.remove([first.id])
        kb._db.execute("DELETE FROM chunks")  # what a compaction does to removed rows
        kb.add([second], chunker)
        assert kb.chunks()[0].id == last + 1


def test_a_change_that_fails_leaves_nothing_behind(tmp_path, dice, chunker):
    documents = some_documents(dice, 4)
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True) as kb:
        kb.add(documents[:2], chunker)
        before = kb.content_hash(), kb.version, kb.chunks()
        with pytest.raises(UserError, match="already has a document 'd1'"):
            kb.add([documents[2], documents[1]], chunker)
        with pytest.raises(UserError, match="no document 'd3'"):
            kb.remove(["d0", "d3"])
        other = chunker.model_copy(update={"overlap": 5})
        with pytest.raises(UserError, match="was cut by chunker"):
            kb.add(documents[2:], other)
        assert (kb.content_hash(), kb.version, kb.chunks()) == before
        assert kb.search_text("title", 9)


def test_the_content_hash_depends_on_the_content_and_nothing_else(tmp_path, dice, chunker):
    documents = some_documents(dice, 6)

    def content(name: str, *changes) -> str:
        with KnowledgeBase(tmp_path / name, create=True) as kb:
            for change in changes:
                kb.remove(change) if isinstance(change[0], str) else kb.add(change, chunker)
            return kb.content_hash()

    plain = content("a", documents)
    assert content("b", documents[::-1]) == plain
    assert content("c", documents[3:], documents[:3]) == plain
    assert content("d", documents, ["d2"], [documents[2]]) == plain
    assert content("e", documents, ["d2"]) == content("f", documents[:2] + documents[3:])
    changed = Document("d0", documents[0].text, "title 0", {"n": 0, "\u00e9": 0})
    assert len({plain, content("g", [changed, *documents[1:]]), content("h", documents[1:])}) == 3


def test_one_writer_at_a_time_while_readers_go_on(tmp_path, dice, chunker):
    path = tmp_path / "kb.sqlite"
    one, two = KnowledgeBase(path, create=True), KnowledgeBase(path)
    documents = some_documents(dice, 3)
    one.add(documents[:1], chunker)
    two._db.execute("PRAGMA busy_timeout = 10")

    def meanwhile():
        yield documents[1]
        assert [document.id for document in two.documents()] == ["d0"] and two.version == 1
        with pytest.raises(UserError, match="cannot be changed"):
            two.remove(["d0"])

    one.add(meanwhile(), chunker)
    assert two.version == 2 and two.chunks() == one.chunks()
    one.close()
    two.close()


def test_live_search_finds_chunks_by_any_word_of_a_question(tmp_path, chunker):
    texts = ["The ferry to Aldbrook leaves at noon.", "Rye bread is sold here.", "A ferry, a bay."]
    documents = [Document(f"d{n}", text) for n, text in enumerate(texts)]
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True) as kb:
        kb.add(documents, chunker)
        kb.add([Document("d3", texts[1])], chunker)

        def found(query: str, k: int = 9) -> list[str]:
            results = kb.search_text(query, k)
            assert [score for _, score in results] == sorted((s for _, s in results), reverse=True)
            return [kb.chunk(id).document for id, _ in results]

        assert found("When does the ferry to Aldbrook leave?") == ["d0", "d2"]
        assert found("rye") == ["d1", "d3"] and found("rye", 1) == ["d1"]  # ties by chunk id
        assert found("the") == ["d0"]  # a query of stop words alone keeps them
        for query in [
            '"',
            "rye OR (",
            "rye* NEAR/2 -bread",
            "text:rye AND",
            "\x00rye\udfff",
            "^rye",
        ]:
            assert "d1" in found(query) or query == '"'
        assert found("") == [] == found("\u203f") and found("\u203f rye")
        with pytest.raises(UserError, match="k=0"):
            kb.search_text("rye", 0)


def test_a_file_that_is_no_knowledge_base_is_refused(tmp_path):
    for name, content in [("text", b"not a database, but long enough" * 99), ("empty", b"")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is not a knowledge base"):
            KnowledgeBase(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    sqlite3.connect(tmp_path / "other").execute("CREATE TABLE meta (key, value)").connection.close()
    with pytest.raises(UserError, match="is not a knowledge base"):
        KnowledgeBase(tmp_path / "other")
    with pytest.raises(UserError, match="does not exist"):
        KnowledgeBase(tmp_path / "missing")
    with pytest.raises(UserError, match="already exists"):
        KnowledgeBase(tmp_path / "text", create=True)


def test_a_file_that_cannot_be_opened_is_told_why(tmp_path, chunker, monkeypatch):
    path = tmp_path / "kb.sqlite"
    with KnowledgeBase(path, create=True) as kb:
        kb.add([Document(str(n), "word " * n) for n in range(99)], chunker)
        kb.seal()
        whole = path.read_bytes()
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, timeout=0.01))
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="cannot be opened: database is locked"):
            KnowledgeBase(path)
    with pytest.raises(UserError, match="cannot be opened: unable to open database file"):
        KnowledgeBase(tmp_path / "none" / "kb.sqlite", create=True)
    path.write_bytes(whole[:100] + b"\xff" * 50 + whole[150:])
    with pytest.raises(UserError, match="is damaged"):
        KnowledgeBase(path)


# ----- building ------------------------------------------------------------------------------


def test_a_build_keeps_the_good_rows_and_accounts_for_the_rest(tmp_path, chunker):
    (tmp_path / "docs").mkdir()
    rows = [{"id": "a", "text": "one"}, {"text": ""}, {"id": "a", "text": "again"}, {"text": "two"}]
    write_jsonl(tmp_path / "docs/rows.jsonl", rows)
    (tmp_path / "docs/x.bin").write_bytes(b"\x00")
    table = io.StringIO()
    csv.writer(table).writerows([["id", "text"], ["b", "three"], ["a", "four"]])
    (tmp_path / "t.csv").write_text(table.getvalue())
    path = tmp_path / "out/kb.sqlite"
    summary = build(path, [tmp_path / "docs", tmp_path / "t.csv"], chunker)
    allowed = ".txt, .md, .jsonl, .csv, .html, .htm, .pdf, .docx, .parquet, .jsonl.gz"
    assert summary.rejects == [
        Reject("rows.jsonl:2", "no text"),
        Reject("rows.jsonl:3", "duplicate id 'a', first used at rows.jsonl:1"),
        Reject("x.bin", f"unknown file type '.bin'; allowed: {allowed}"),
        Reject("t.csv:3", "duplicate id 'a', first used at rows.jsonl:1"),
    ]
    assert (summary.accepted, summary.total, summary.chunks) == (3, 7, 3)
    with KnowledgeBase(path) as kb:
        assert [document.id for document in kb.documents()] == ["a", "rows.jsonl:4", "b"]
        assert kb.version == 1
        assert [p.name for p in path.parent.iterdir()] == ["kb.sqlite"]  # readers write nothing


def test_a_knowledge_base_that_is_there_is_never_overwritten(tmp_path, chunker):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one"}])
    build(tmp_path / "kb.sqlite", [source], chunker)
    before = (tmp_path / "kb.sqlite").read_bytes()
    with pytest.raises(UserError, match=r"kb\.sqlite already exists"):
        build(tmp_path / "kb.sqlite", [source], chunker)
    assert (tmp_path / "kb.sqlite").read_bytes() == before
    (tmp_path / "new.sqlite-wal").write_bytes(b"left behind")
    with pytest.raises(UserError, match="sqlite-wal already exists"):
        build(tmp_path / "new.sqlite", [source], chunker)


def test_the_same_sources_give_the_same_bytes(tmp_path, dice, chunker):
    rows = [{"id": d.id, "text": d.text} for d in some_documents(dice, 30)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    for name in ("a", "b"):
        build(tmp_path / name, [source], chunker)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_build_without_a_document_or_that_fails_leaves_no_file(tmp_path, chunker):
    (tmp_path / "empty").mkdir()
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": ""}, []])
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "good"}])
    out = tmp_path / "new" / "out"
    for sources, message in [
        ([], "no document in no source"),
        ([tmp_path / "empty"], "no document in"),
        ([bad], "2 rejected, the first bad.jsonl:1: no text"),
        ([good, tmp_path / "missing.txt"], "missing.txt"),
    ]:
        with pytest.raises(UserError, match=message):
            build(out / "kb.sqlite", sources, chunker)
    with pytest.raises(UserError, match="tokenizer is not set"):
        build(out / "kb.sqlite", [good], TokenChunker(tokenizer=""))
    assert not out.parent.exists()  # nor a folder
    out.mkdir(parents=True)
    with pytest.raises(UserError, match="no document in"):
        build(out / "kb.sqlite", [], chunker)
    assert list(out.iterdir()) == []  # but one that was there stays


def test_a_killed_build_leaves_no_knowledge_base_and_the_next_one_is_the_same(tmp_path, chunker):
    rows = [{"id": str(n), "text": " ".join(WORDS * 9) + str(n)} for n in range(3000)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    code = (
        "import sys; from rag2.kb.build import build; from rag2.kb.chunk import TokenChunker;"
        "chunker = TokenChunker(tokens=16, overlap=4, tokenizer=sys.argv[3]);"
        "build(sys.argv[1], [sys.argv[2]], chunker)"
    )
    out = tmp_path / "out"
    words = [sys.executable, "-c", code, str(out / "kb.sqlite"), str(source), chunker.tokenizer]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(words, env=environment)
    try:
        deadline = time.monotonic() + 60
        while (
            not list(out.glob(".kb.sqlite.staging-*/kb.sqlite-wal")) and time.monotonic() < deadline
        ):
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(out.iterdir()) and not (out / "kb.sqlite").exists()
    source = write_jsonl(tmp_path / "rows.jsonl", rows[:50])
    build(out / "kb.sqlite", [source], chunker)
    build(out / "again.sqlite", [source], chunker)
    assert sorted(path.name for path in out.iterdir()) == ["again.sqlite", "kb.sqlite"]
    with KnowledgeBase(out / "kb.sqlite") as one, KnowledgeBase(out / "again.sqlite") as two:
        assert one.content_hash() == two.content_hash()
