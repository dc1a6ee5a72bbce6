"""The commands that change a knowledge base: every document accounted for, 2 for mistakes."""

import json
from pathlib import Path

import pytest

from rag2 import cli
from rag2.kb.store import KnowledgeBase

FERRY = {"id": "ferry", "title": "Ferry", "text": "The ferry leaves at noon.", "metadata": {"n": 1}}
BAKER = {"id": "baker", "text": "The baker sells rye bread."}


@pytest.fixture
def kb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """With two documents."""
    path = tmp_path / "kb.sqlite"
    assert rag2(capsys, "build", path, rows(tmp_path, FERRY, BAKER))[0] == 0
    return path


def rag2(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `rag2 kb ...`."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["kb", *map(str, words)])
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


def rows(folder: Path, *rows: dict, name: str = "rows.jsonl") -> Path:
    """A file of them."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def content(path: Path) -> str:
    """What is in the file, whatever its history."""
    with KnowledgeBase(path) as kb:
        return kb.content_hash()


def test_add_rejects_what_is_there_and_update_replaces_it(tmp_path, kb, capsys):
    changed, new = FERRY | {"text": "It leaves at one."}, {"id": "mill", "text": "A mill."}
    source = rows(tmp_path, changed, new, {"id": "bad"})
    status, out, err = rag2(capsys, "add", kb, source)
    assert status == 0 and "1 accepted + 2 rejected = 3 documents\n1 chunks\nversion 2\n" in out
    assert "rows.jsonl:1: document 'ferry' is there already; an update replaces it" in err
    assert rag2(capsys, "search", kb, "noon")[1]
    status, out, err = rag2(capsys, "update", kb, source)
    assert status == 0 and "0 new, 1 updated, 1 unchanged\n1 chunks\nversion 3\n" in out
    assert rag2(capsys, "search", kb, "noon")[1:] == ("", "no chunk has any of these words\n")
    assert rag2(capsys, "search", kb, "one")[1]
    before = kb.read_bytes()
    status, out, _ = rag2(capsys, "update", kb, source)
    assert status == 0 and "0 new, 0 updated, 2 unchanged\n0 chunks\nversion 3\n" in out
    assert kb.read_bytes() == before


def test_strict_and_nothing_good_change_nothing(tmp_path, kb, capsys):
    before = content(kb)
    source = rows(tmp_path, {"id": "mill", "text": "A mill."}, {"id": "bad"})
    for command in ("add", "update"):
        status, out, err = rag2(capsys, command, kb, source, "--strict")
        assert status == 2 and "1 accepted + 1 rejected = 2 documents" in out
        assert err.splitlines()[-1].endswith(
            f"1 documents were rejected (--strict); {kb} is as it was"
        )
        status, _, err = rag2(capsys, command, kb, rows(tmp_path, {"id": "bad"}, name="b.jsonl"))
        assert status == 2 and "no document was accepted" in err.splitlines()[-1]
        status, _, err = rag2(capsys, command, kb, tmp_path / "none.md")
        assert status == 2 and "none.md" in err and err.count("\n") == 1
        assert content(kb) == before
    assert rag2(capsys, "add", kb, source)[0] == 0 and content(kb) != before


def test_removed_documents_are_gone_and_after_compaction_erased(tmp_path, kb, capsys):
    status, _, err = rag2(capsys, "remove", kb, "baker", "fery")
    assert status == 2 and "has no document 'fery'. Did you mean 'ferry'?" in err
    status, out, _ = rag2(capsys, "remove", kb, "baker", "baker")
    assert (status, out) == (0, "1 removed, with 1 chunks; version 2\n")
    assert not rag2(capsys, "search", kb, "bread")[1] and b"rye bread" in kb.read_bytes()
    status, out, _ = rag2(capsys, "compact", kb)
    assert status == 0 and "1 chunks erased" in out
    left = [path for path in tmp_path.glob("kb.sqlite*") if b"rye" in path.read_bytes()]
    assert not left and rag2(capsys, "search", kb, "noon")[1]
    status, _, err = rag2(capsys, "compact", kb, "--generations", tmp_path / "none")
    assert status == 2 and "is not a folder" in err
    assert rag2(capsys, "compact", kb, "--generations", tmp_path)[0] == 0


def test_one_document_is_shown_without_reading_the_others(kb, capsys, monkeypatch):
    status, _, err = rag2(capsys, "show", kb, "fery")
    assert status == 2 and "Did you mean 'ferry'?" in err
    monkeypatch.setattr(KnowledgeBase, "documents", lambda *_: pytest.fail("all are read"))
    status, out, _ = rag2(capsys, "show", kb, "ferry")
    assert status == 0 and out.startswith('ferry\tFerry\n{"n": 1}\n') and "at noon" in out


def test_an_export_builds_the_same_again(tmp_path, kb, capsys):
    out = tmp_path / "out.jsonl"
    assert rag2(capsys, "export", kb, out)[:2] == (0, "2 documents\n")
    assert rag2(capsys, "build", tmp_path / "again.sqlite", out)[0] == 0
    assert content(tmp_path / "again.sqlite") == content(kb)
    status, _, err = rag2(capsys, "export", kb, out)
    assert status == 2 and "already exists" in err
    status, _, err = rag2(capsys, "export", kb, tmp_path / "none" / "out.jsonl")
    assert status == 2 and "there is no folder" in err


def test_a_namespace_is_listed_shown_searched_changed_and_exported_alone(tmp_path, kb, capsys):
    own = ["--namespace", "acme"]
    source = rows(tmp_path, BAKER | {"text": "Acme bakes bread, too."})
    assert rag2(capsys, "add", kb, source, *own)[0] == 0
    assert rag2(capsys, "list", kb)[1] == "ferry\t1\tFerry\nbaker\t1\t\nbaker\t1\t\tacme\n"
    assert rag2(capsys, "list", kb, *own)[1] == "baker\t1\t\tacme\n"
    assert rag2(capsys, "search", kb, "bread")[1].count("\n") == 2
    (line,) = rag2(capsys, "search", kb, "bread", *own)[1].splitlines()
    assert line.endswith("Acme bakes bread, too.\tacme")
    assert "Acme" in rag2(capsys, "show", kb, "baker", *own)[1]
    assert "Acme" not in rag2(capsys, "show", kb, "baker")[1]
    status, _, err = rag2(capsys, "remove", kb, "ferry", *own)
    assert status == 2 and "has no document 'ferry' in namespace 'acme'" in err
    assert rag2(capsys, "export", kb, tmp_path / "acme.jsonl", *own)[1] == "1 documents\n"
    assert rag2(capsys, "remove", kb, "baker", *own)[0] == 0
    assert rag2(capsys, "list", kb)[1] == "ferry\t1\tFerry\nbaker\t1\t\n"
