"""Changing a knowledge base: put, batches, namespaces, and files of the format before."""

import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from rag2.kb.store import KnowledgeBase, Put
from rag2.registry import UserError
from rag2.types import Document
from texts import some_documents


@pytest.fixture
def kb(tmp_path: Path):
    """An empty one."""
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True) as kb:
        yield kb


def test_put_adds_what_is_new_replaces_what_changed_and_leaves_the_rest(kb, dice, chunker):
    documents = some_documents(dice, 6)
    first = kb.put(documents[:4], chunker)
    assert first == Put(added=4, updated=0, unchanged=0, chunks=len(kb.chunks()))
    before = {document.id: kb.chunks_of(document.id) for document in documents}
    changed = [
        replace(documents[0], text="Another text."),
        replace(documents[1], metadata={"n": "new"}),
        replace(documents[2], title="Another title"),
    ]
    put = kb.put([*changed, *documents[3:]], chunker)
    assert (put.added, put.updated, put.unchanged, kb.version) == (2, 3, 1, 2)
    assert {d.id: d for d in kb.documents()} == {d.id: d for d in [*changed, *documents[3:]]}
    assert kb.chunks_of("d3") == before["d3"]
    for document in changed:
        new, old = kb.chunks_of(document.id), before[document.id]
        assert min(chunk.id for chunk in new) > max(chunk.id for chunk in old)
    assert kb.chunks(1) == sorted(sum(before.values(), []), key=lambda chunk: chunk.id)
    assert kb.search_text("another", 9) and not set(before["d0"]) & set(kb.chunks())


def test_putting_the_same_again_changes_nothing_at_all(kb, dice, chunker, tmp_path):
    documents = some_documents(dice, 5)
    kb.put(documents, chunker)
    kb.seal()
    before = (tmp_path / "kb.sqlite").read_bytes(), kb.version
    put = kb.put(documents[::-1], chunker)
    assert put == Put(added=0, updated=0, unchanged=5, chunks=0)
    kb.seal()
    assert ((tmp_path / "kb.sqlite").read_bytes()[100:], kb.version) == (before[0][100:], 1)


def test_an_id_that_is_put_twice_is_refused_and_nothing_of_it_stays(kb, dice, chunker):
    one, two = some_documents(dice, 2)
    with pytest.raises(UserError, match="'d0' is given twice"):
        kb.put([one, two, one], chunker)
    assert not list(kb.documents()) and kb.version == 0


def test_changes_of_a_batch_are_versions_of_one_commit(kb, dice, chunker, tmp_path):
    documents = some_documents(dice, 5)
    with kb.batch(), KnowledgeBase(tmp_path / "kb.sqlite") as other:
        kb.add(documents[:2], chunker)
        with pytest.raises(UserError, match="already has"):  # it undoes itself alone
            kb.add([documents[2], documents[0]], chunker)
        kb.remove(["d1"])
        kb.put(documents[3:], chunker)
        assert kb.version == 3 and other.version == 0
    assert [document.id for document in kb.documents()] == ["d0", "d3", "d4"]
    with KnowledgeBase(tmp_path / "kb.sqlite") as other:
        assert other.version == 3 and other.chunks() == kb.chunks()
    with pytest.raises(ZeroDivisionError), kb.batch():
        kb.remove(["d0"])
        raise ZeroDivisionError
    assert kb.version == 3 and kb.chunks_of("d0")


def test_a_namespace_has_its_own_ids_documents_and_words(kb, chunker):
    for name in ("", "a", "b"):
        kb.add([Document("x", f"the ferry of {name or 'nobody'}")], chunker, name)
    with pytest.raises(UserError, match="already has a document 'x'"):
        kb.add([Document("x", "again")], chunker, "a")
    assert kb.namespaces() == ["", "a", "b"]
    assert [d.text for d in kb.documents("a")] == ["the ferry of a"]
    assert len(list(kb.documents())) == 3 == len(kb.search_text("ferry", 9))
    (hit,) = kb.search_text("ferry", 9, ["a"])
    assert kb.chunk(hit[0]).text == "the ferry of a"
    kb.put([Document("x", "changed")], chunker, "a")
    kb.remove(["x"], "b")
    with pytest.raises(UserError, match="no document 'x' in namespace 'b'"):
        kb.remove(["x"], "b")
    assert kb.namespaces() == ["", "a"] and kb.chunks_of("x")[0].text == "the ferry of nobody"
    assert not kb.search_text("ferry", 9, ["a", "b"]) and kb.search_text("changed", 9, ["a"])
    assert not kb.search_text("ferry", 9, []) and not kb.search_text("ferry", 9, ["c"])


def test_what_others_hold_changes_no_score_of_a_namespace(kb, dice, chunker):
    mine, others = some_documents(dice, 8), some_documents(dice, 30)
    kb.add(mine, chunker, "mine")
    query = " ".join(mine[0].text.split()[:9])
    before = kb.search_text(query, 50, ["mine"])
    kb.add(others, chunker, "others")
    kb.add(others, chunker)
    assert before and kb.search_text(query, 50, ["mine"]) == before
    kb.remove([document.id for document in others[:9]], "others")
    assert kb.search_text(query, 50, ["mine"]) == before


def old_file(path: Path) -> None:
    """A file of format 1, as the version before wrote it, from one of format 2."""
    db = sqlite3.connect(path, isolation_level=None)
    for index in ("live_document", "chunk_document", "chunk_added", "chunk_removed"):
        db.execute(f"DROP INDEX {index}")
    for table in ("documents", "chunks", "changes"):
        db.execute(f"ALTER TABLE {table} DROP COLUMN namespace")
    db.execute("CREATE UNIQUE INDEX live_document ON documents (id) WHERE removed_version IS NULL")
    db.execute("CREATE INDEX chunk_document ON chunks (document)")
    db.execute("DROP TABLE namespaces")
    db.execute("UPDATE meta SET value = 'rag2.kb/1' WHERE key = 'format'")
    db.close()


def test_a_file_of_the_old_format_is_read_as_it_is_and_upgraded_by_its_first_change(
    kb, dice, chunker, tmp_path
):
    documents = some_documents(dice, 6)
    kb.add(documents, chunker)
    kb.remove(["d2"])
    kb.seal()
    old = tmp_path / "old.sqlite"
    shutil.copyfile(tmp_path / "kb.sqlite", old)
    old_file(old)
    data = old.read_bytes()
    assert b"namespace" not in data
    with KnowledgeBase(old) as found, KnowledgeBase(old) as other:
        for one in (found, other):
            assert one.content_hash() == kb.content_hash() and one.version == 2
            assert one.chunks() == kb.chunks() and one.chunks(1) == kb.chunks(1)
            assert list(one.documents()) == list(kb.documents())
            assert one.search_text("title", 9) == kb.search_text("title", 9)
        assert old.read_bytes() == data
        with pytest.raises(UserError, match="already has"):
            found.add(documents[:1], chunker)
        found.add(documents[2:3], chunker, "a")
        other.put([replace(documents[0], title="new")], chunker)
        assert other.namespaces() == found.namespaces() == ["", "a"]
        assert found.version == 4 and found.chunks(2) == kb.chunks()
        assert other.search_text("new", 3) == found.search_text("new", 3) != []
    with KnowledgeBase(old) as found:
        assert found.namespaces() == ["", "a"]


def test_every_commit_is_synced(kb):
    assert kb._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: a power cut


def test_a_document_of_another_namespace_is_told_and_words_are_found_in_a_batch(kb, chunker):
    kb.put([Document("d", "wax")], chunker, namespace="acme")
    with pytest.raises(UserError, match="no document 'd'; it is in another namespace: 'acme'"):
        kb.remove(["d"])
    with pytest.raises(ValueError, match="a collection of names"):
        kb.search_text("wax", 5, "acme")
    with kb.batch():
        kb.put([Document("e", "wax")], chunker)
        assert len(kb.search_text("wax", 10**30)) == 2


def test_a_file_that_another_process_upgrades_meanwhile_is_read_as_it_is_then(
    kb, chunker, tmp_path
):
    kb.add([Document("a", "wax"), Document("b", "rye")], chunker)
    kb.seal()
    old = tmp_path / "old.sqlite"
    shutil.copyfile(tmp_path / "kb.sqlite", old)
    old_file(old)
    with closing(sqlite3.connect(old)) as db:
        db.execute("PRAGMA journal_mode = WAL")  # else who writes waits for who reads
    with KnowledgeBase(old) as reader, KnowledgeBase(old) as late, KnowledgeBase(old) as writer:
        with late.reading():
            before = late.content_hash()
            writer.put([Document("c", "wax of acme")], chunker, "acme")
            assert late.content_hash() == before and late.version == 1  # of one state still
            assert late.namespaces() == [""] and len(late.search_text("wax", 9)) == 1
        for one in (reader, late):
            assert one.namespaces() == ["", "acme"] and one.version == 2
            assert {*one.alive().values()} == {"", "acme"}
            assert len(one.search_text("wax", 9)) == 2
            assert [id for id, _ in one.search_text("wax", 9, ["acme"])] == [3]
            assert one.content_hash() == writer.content_hash() != before
            with one.reading():
                assert len(one.search_text("wax", 9)) == 2 and one.namespaces() == ["", "acme"]
        news = reader.since(1)
        assert news and [(space, chunk.id) for space, chunk in news.added] == [("acme", 3)]
        reader.put([Document("d", "salt")], chunker, "acme")
        assert len(list(late.documents("acme"))) == 2
