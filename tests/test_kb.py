"""Documents in, chunks out: nothing lost in silence, nothing split, nothing half-written."""

import csv
import io
import json
import os
import random
import re
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel as ByteLevelOffsets

from rag2.kb.build import Reject, build
from rag2.kb.chunk import TokenChunker
from rag2.kb.clean import clean, is_blank
from rag2.kb.lexical import BM25, words
from rag2.kb.read import Item, read, read_csv, read_jsonl, read_markdown, read_text
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.types import Chunk, Document

WORDS = ["the", "ferry", "leaves", "Aldbrook", "at", "noon", "bread", "42", "rye", "harbour"]
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"  # one cluster of five code points
ODD = [
    *("e\u0301", "\u00e9", FAMILY, "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd", "\U00020000"),
    *("\u65e5\u672c\u8a9e", "\u0928\u093f", "\u1100\u1161\u11a8", "\u0627\u0651", "\u200b"),
    *("\n\n", "\t", "  ", "\u00a0", "\ufdfa", "x" * 30, "a" + "\u0301" * 40, "</s>"),
]


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it when the test fails)
    return random.Random(seed)


def byte_level(trim: bool) -> Tokenizer:
    """Byte-level BPE as GPT-2 and Llama 3 have it; trimmed offsets leave the space out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trim:
        tokenizer.post_processor = ByteLevelOffsets(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    return tokenizer


def word_pieces() -> Tokenizer:
    """WordPiece behind a normalizer that rewrites the text, as BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> list[Path]:
    folders = []
    for number, tokenizer in enumerate([byte_level(False), byte_level(True), word_pieces()]):
        tokenizer.enable_truncation(16)  # as a file saved by a trainer may say
        tokenizer.enable_padding(length=16)
        folder = tmp_path_factory.mktemp(f"tokenizer{number}")
        tokenizer.save(str(folder / "tokenizer.json"))
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def chunker(tokenizers) -> TokenChunker:
    return TokenChunker(tokens=16, overlap=4, tokenizer=str(tokenizers[0]))


def random_text(rng: random.Random, length: int, oddity: float = 0.3) -> str:
    pieces = []
    for _ in range(length):
        if rng.random() < oddity:
            piece = rng.choice(ODD) if rng.random() < 0.7 else chr(rng.randrange(0x20, 0x30000))
            pieces.append("?" if "\ud800" <= piece <= "\udfff" else piece)
        else:
            pieces.append(rng.choice(WORDS))
        pieces.append(rng.choice(["", " ", " ", " ", "\n"]))
    return "".join(pieces)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_all(items: Iterable[Item]) -> dict[str, Any]:
    return dict(items)


def reasons(items: Iterable[Item]) -> list[str]:
    return [item for _, item in items if isinstance(item, str)]


# ----- cleaning ------------------------------------------------------------------------------


def test_cleaning_keeps_what_is_visible_and_is_stable(rng):
    for _ in range(300):
        raw = random_text(rng, 30) + rng.choice(["", "\x00", "\r\n", "\u2028", "\ufeff", "\x85"])
        cleaned = clean(raw)
        assert clean(cleaned) == cleaned
        assert unicodedata.is_normalized("NFC", cleaned) and cleaned == cleaned.strip()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\ufeff]|\n\n\n| \n", cleaned)
        dropped = "[\x00-\x08\x7f-\x9f\ufeff]"
        seen_raw, seen = ("".join(re.sub(dropped, "", text).split()) for text in (raw, cleaned))
        assert unicodedata.normalize("NFC", seen) == unicodedata.normalize("NFC", seen_raw)


def test_cleaning_keeps_paragraphs_and_indentation():
    assert clean(" \r\n a  b\t \r\n\r\n\r\n\r\n  - c\x00d\u00a0 e \n") == "a b\n\n  - cd e"


def test_text_of_spaces_and_format_characters_is_blank():
    assert is_blank("\u200b \u00a0\n\u3000\u200d") and not is_blank("\u200b.")


# ----- reading -------------------------------------------------------------------------------


def test_jsonl_rows_become_documents_or_a_reason_each_with_its_line(tmp_path):
    good = {"id": 7, "title": " A\nB ", "text": "x\r\ny", "url": "u", "metadata": {"k": [1, None]}}
    lines = [
        b"\xef\xbb\xbf" + json.dumps(good).encode(),
        b"",
        b'{"text": "no id", "title": null}',
        b'{"text": "bad \xff byte"}',
        b'{"text": "half an emoji \\ud83d"}',
        b'{"text": "whole emoji \\ud83d\\ude00"}',
        b'{"text": "meta", "metadata": {"\\udc00": 1}}',
        b'{"text": 5}',
        b'{"text": "t", "id": true}',
        b'{"text": "t", "metadata": []}',
        b'{"text": "t", "metadata": {"x": NaN}}',
        b'{"txet": "typo"}',
        b'{"text": " \\u0000 \\u200b"}',
        b'["text"]',
        b'{"text": "cut',
        b"[" * 100_000,
        b"9" * 5000,
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    items = read_all(read_jsonl(path, "sub/rows.jsonl"))
    assert [int(place.removeprefix("sub/rows.jsonl:")) for place in items] == [1, *range(3, 18)]
    documents = {place[15:]: item for place, item in items.items() if isinstance(item, Document)}
    assert documents.keys() == {"1", "3", "6"}
    assert documents["1"] == Document("7", "x\ny", "A B", {"url": "u", "k": [1, None]})
    assert documents["3"] == Document("sub/rows.jsonl:3", "no id")
    assert documents["6"].text == "whole emoji \U0001f600"
    assert "byte 14" in items["sub/rows.jsonl:4"]
    assert "surrogate" in items["sub/rows.jsonl:5"] and "surrogate" in items["sub/rows.jsonl:7"]
    assert "Did you mean 'txet'" in items["sub/rows.jsonl:12"]
    assert items["sub/rows.jsonl:13"] == "no text"


def test_csv_rows_have_a_header_and_the_other_columns_are_metadata(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'\xef\xbb\xbfid,text,title,year\na,"two\nlines, one cell",T,1999\n\n,no id,,\n'
        b"b,too,many,cells,here\nc,bad \xff byte,,\nd,,empty,\ne,"
        + b"x"
        * 200_000
        + b',,\n"f"g,h\n'
        b"i,last,,"
    )
    items = read_all(read_csv(path))
    assert items["rows.csv:2"] == Document("a", "two\nlines, one cell", "T", {"year": "1999"})
    assert items["rows.csv:5"] == Document("rows.csv:5", "no id")
    assert "5 cells under a header of 4" in items["rows.csv:6"]
    assert "surrogate" in items["rows.csv:7"] and "no 'text'" in items["rows.csv:8"]
    assert len(items["rows.csv:9"].text) == 200_000  # the csv module's own limit is lower
    assert "malformed CSV" in items["rows.csv:10"] and items["rows.csv:11"].id == "i"
    assert len(items) == 8
    for header in ["id,txt\na,b", "text,text\na,b"]:
        path.write_text(header)
        assert len(reasons(read_csv(path))) == 1


def test_a_text_file_is_one_document_and_a_markdown_heading_its_title(tmp_path):
    path = tmp_path / "note.md"
    path.write_text("\n# The *ferry* #\r\n\r\nIt leaves.\n# Not the title\n")
    expected = Document("note.md", "It leaves.\n# Not the title", "The *ferry*")
    assert list(read_markdown(path)) == [("note.md", expected)]
    path.write_text("# Only a heading\n")
    assert next(read_markdown(path))[1] == Document("note.md", "# Only a heading")
    path.write_bytes("# H\u00e9\n".encode("utf-16"))
    assert reasons(read_text(path)) == ["invalid UTF-8 or a lone surrogate"]


def test_everything_in_a_folder_is_read_or_has_a_reason(tmp_path):
    for name in ("b/a.TXT", "b.md", "image.png", ".hidden", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")  # opening it would wait for ever
    items = list(read(tmp_path))
    assert [place for place, _ in items] == ["b/a.TXT", "b.md", "gone.txt", "image.png", "pipe.txt"]
    assert [item.id for _, item in items if isinstance(item, Document)] == ["b/a.TXT", "b.md"]
    assert "'.png'; allowed: .txt, .md" in reasons(items)[1]
    for source in ("image.png", "missing.txt"):
        with pytest.raises(UserError, match=source):
            list(read(tmp_path / source))


def test_every_mutated_row_is_accounted_for(tmp_path, rng):
    row = json.dumps({"id": "a", "text": "caf\u00e9 \U0001f600", "metadata": {"n": 1.5}}).encode()
    lines = []
    for _ in range(3000):
        line = bytearray(row)
        for _ in range(rng.randrange(4)):
            line[rng.randrange(len(line))] = rng.randrange(256)
        lines.append(bytes(line).replace(b"\n", b" "))
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    items = list(read_jsonl(path))
    assert [place for place, _ in items] == [f"rows.jsonl:{n}" for n in range(1, 3001)]
    assert 100 < len(reasons(items)) < 2900
    for _, item in items:
        if isinstance(item, Document):
            assert json.dumps([item.id, item.text, item.title, item.metadata]).encode()
            assert item.text.encode() and clean(item.text) == item.text


# ----- chunking ------------------------------------------------------------------------------


def is_inside_cluster(text: str, position: int) -> bool:
    return position not in {m.end() for m in regex.finditer(r"\X", text)} | {0}


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["byte-level", "trimmed", "wordpiece", "words"])
def test_chunks_cover_the_text_fit_their_budget_and_split_no_character(tokenizers, which, rng):
    name = [*map(str, tokenizers), "words"][which]
    tokenizer = TokenChunker(tokenizer=name)._tokenizer

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    for _ in range(60):
        tokens = rng.choice([1, 2, 3, 5, 16, 40, 200])
        overlap = rng.randrange(tokens)
        chunker = TokenChunker(tokens=tokens, overlap=overlap, tokenizer=name)
        text = clean(random_text(rng, rng.randrange(1, 60)))
        spans = chunker(Document("d", text))
        assert bool(spans) == bool(text)
        covered = set()
        for start, end in spans:
            assert 0 <= start < end <= len(text)
            piece = text[start:end]
            assert piece == piece.strip() and piece.encode("utf-8").decode("utf-8") == piece
            assert count(piece) <= tokens or len(piece) == 1
            covered.update(range(start, end))
            for position in (start, end):  # a cluster is cut only where it has to be
                if is_inside_cluster(text, position):
                    assert any(
                        cluster.start() < position < cluster.end()
                        and (
                            count(cluster.group().strip()) > tokens
                            # white space in a cluster goes from a chunk's ends like any other
                            or text[cluster.start() : position].isspace()
                            or text[position : cluster.end()].isspace()
                        )
                        for cluster in regex.finditer(r"\X", text)
                    )
        assert all(text[i].isspace() for i in set(range(len(text))) - covered)
        for (start, end), (later, farther) in pairwise(spans):
            assert start < later and end < farther


def test_a_cluster_of_exactly_the_budget_is_whole_also_behind_a_space(tokenizers):
    # Trimmed offsets: the space is a token of its own that starts where the cluster does.
    chunker = TokenChunker(tokens=5, overlap=0, tokenizer=str(tokenizers[1]))
    assert chunker(Document("d", "42 \u00e9\u1a7f")) == [(0, 2), (3, 5)]
    assert chunker(Document("d", "42 \u00e9\u1a7f\u0301"))[1:] == [(3, 4), (4, 6)]


def test_a_chunk_ends_before_a_space_that_belongs_to_a_cluster(tokenizers):
    chunker = TokenChunker(tokens=2, overlap=0, tokenizer=str(tokenizers[2]))
    assert chunker(Document("d", "rye \U00011a85 at")) == [(0, 5), (6, 8)]


@pytest.mark.parametrize("overlap", [0, 1, 5, 15])
def test_windows_are_full_and_neighbours_share_exactly_the_overlap(tokenizers, overlap):
    text = "0135679" * 30  # digits that no word of the training text has: one token each
    chunker = TokenChunker(tokens=16, overlap=overlap, tokenizer=str(tokenizers[0]))
    starts = range(0, len(text) - overlap, 16 - overlap)
    expected = [(start, min(start + 16, len(text))) for start in starts]
    assert chunker(Document("d", text)) == expected
    wide = "\u65e5" * 40  # three byte tokens each: five fit, and an overlap of whole ones
    step = 5 - overlap // 3
    spans = chunker(Document("d", wide))
    assert spans[:2] == [(0, 5), (max(step, 1), 5 + max(step, 1))]
    assert all(end - start == 5 for start, end in spans[:-1]) and spans[-1][1] == 40


def test_without_a_tokenizer_words_and_other_characters_are_counted():
    def texts(text: str, tokens: int) -> list[str]:
        spans = TokenChunker(tokens=tokens, overlap=0)(Document("d", text))
        return [text[start:end] for start, end in spans]

    assert texts("The caf\u00e9's ferry_2 leaves, at noon.", 4) == [
        *("The caf\u00e9's", "ferry_2 leaves, at", "noon.")
    ]
    # What has no spaces is bounded too.
    assert texts("\u65e5\u672c\u8a9e\u306e\u672c and more", 3) == [
        *("\u65e5\u672c\u8a9e", "\u306e\u672c and", "more")
    ]
    assert texts("0123456789abcdef" * 5, 2) == ["0123456789abcdef" * n for n in (2, 2, 1)]


def test_a_short_text_is_one_chunk_and_no_text_is_none(chunker):
    assert chunker(Document("d", "The ferry.")) == [(0, 10)]
    assert chunker(Document("d", "")) == [] == chunker(Document("d", " \n"))
    assert chunker(Document("d", "\u00ad")) != []


def test_the_fingerprint_follows_what_decides_the_cuts_and_not_where_the_tokenizer_lies(tokenizers):
    one, _, other = (str(folder) for folder in tokenizers)
    same = TokenChunker(tokens=9, overlap=2, tokenizer=one + "/tokenizer.json").fingerprint
    assert TokenChunker(tokens=9, overlap=2, tokenizer=one).fingerprint == same
    for tokens, overlap, tokenizer in [(9, 3, one), (10, 2, one), (9, 2, other)]:
        changed = TokenChunker(tokens=tokens, overlap=overlap, tokenizer=tokenizer)
        assert changed.fingerprint != same


def test_a_chunker_without_a_usable_tokenizer_is_a_users_mistake(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    for tokenizer in ("", str(tmp_path)):
        with pytest.raises(UserError, match="tokenizer"):
            TokenChunker(tokenizer=tokenizer)(Document("d", "text"))
    with pytest.raises(ValueError, match="overlap=8 must be less than tokens=8"):
        TokenChunker(tokens=8, overlap=8)


# ----- the store -----------------------------------------------------------------------------


def some_documents(rng: random.Random, count: int) -> list[Document]:
    return [
        Document(
            f"d{n}", clean(random_text(rng, 40)) or "x", f"title {n}", {"n": n, "\u00e9": None}
        )
        for n in range(count)
    ]


def test_chunks_are_the_stated_characters_of_the_stored_documents(tmp_path, rng, chunker):
    documents = some_documents(rng, 20)
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


def test_the_state_at_every_version_stays_readable_and_ids_are_never_reused(tmp_path, rng, chunker):
    documents = some_documents(rng, 8)
    live, history, used = {}, [[]], set()
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True) as kb:
        for _ in range(40):
            absent = [document for document in documents if document.id not in live]
            if absent and (not live or rng.random() < 0.5):
                batch = rng.sample(absent, rng.randrange(1, len(absent) + 1))
                kb.add(batch, chunker)
                live.update((document.id, document) for document in batch)
                fresh = {chunk.id for chunk in kb.chunks()} - {c.id for c in history[-1]}
                assert not fresh & used
                used |= fresh
            else:
                gone = rng.sample(sorted(live), rng.randrange(1, len(live) + 1))
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


def test_the_id_of_an_erased_chunk_is_not_given_away(tmp_path, rng, chunker):
    first, second = some_documents(rng, 2)
    with KnowledgeBase(tmp_path / "kb.sqlite", create=True) as kb:
        kb.add([first], chunker)
        last = kb.chunks()[-1].id
        kb.remove([first.id])
        kb._db.execute("DELETE FROM chunks")  # what a compaction does to removed rows
        kb.add([second], chunker)
        assert kb.chunks()[0].id == last + 1


def test_a_change_that_fails_leaves_nothing_behind(tmp_path, rng, chunker):
    documents = some_documents(rng, 4)
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


def test_the_content_hash_depends_on_the_content_and_nothing_else(tmp_path, rng, chunker):
    documents = some_documents(rng, 6)

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


def test_one_writer_at_a_time_while_readers_go_on(tmp_path, rng, chunker):
    path = tmp_path / "kb.sqlite"
    one, two = KnowledgeBase(path, create=True), KnowledgeBase(path)
    documents = some_documents(rng, 3)
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
    assert summary.rejected == [
        Reject("rows.jsonl:2", "no text"),
        Reject("rows.jsonl:3", "duplicate id 'a', first used at rows.jsonl:1"),
        Reject("x.bin", "unknown file type '.bin'; allowed: .txt, .md, .jsonl, .csv"),
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


def test_the_same_sources_give_the_same_bytes(tmp_path, rng, chunker):
    rows = [{"id": d.id, "text": d.text} for d in some_documents(rng, 30)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    for name in ("a", "b"):
        build(tmp_path / name, [source], chunker)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_build_without_a_document_or_that_fails_leaves_no_file(tmp_path, chunker):
    (tmp_path / "empty").mkdir()
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": ""}, []])
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "good"}])
    out = tmp_path / "out"
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
    assert list(out.iterdir()) == []


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
        while not list(out.glob(".kb.sqlite-*/kb.sqlite-wal")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(out.iterdir()) and not (out / "kb.sqlite").exists()
    source = write_jsonl(tmp_path / "rows.jsonl", rows[:50])
    build(out / "kb.sqlite", [source], chunker)
    build(out / "again.sqlite", [source], chunker)
    with KnowledgeBase(out / "kb.sqlite") as one, KnowledgeBase(out / "again.sqlite") as two:
        assert one.content_hash() == two.content_hash()


# ----- BM25 ----------------------------------------------------------------------------------


def bm25_by_definition(chunks: list[Chunk], question: str) -> dict[int, float]:
    """Lucene's BM25 in double precision: sum of idf * tf / (tf + k1 (1 - b + b l / mean l))."""
    bags = {chunk.id: Counter(words(chunk.passage)) for chunk in chunks}
    mean = sum(bag.total() for bag in bags.values()) / len(bags)
    scores = dict.fromkeys(bags, 0.0)
    for word in words(question):
        df = sum(word in bag for bag in bags.values())
        idf = np.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
        for id, bag in bags.items():
            length = 1 - 0.75 + 0.75 * bag.total() / mean
            scores[id] += idf * bag[word] / (bag[word] + 1.5 * length)
    return scores


def random_chunks(rng: random.Random, count: int) -> list[Chunk]:
    ids = rng.sample(range(10 * count), count)
    return [
        Chunk(id, "d", " ".join(rng.choices(WORDS, k=rng.randrange(1, 12))), rng.choice(["", "t"]))
        for id in ids
    ]


def test_bm25_scores_are_those_of_the_definition_with_ties_by_chunk_id(rng):
    chunks = random_chunks(rng, 60)
    questions = [" ".join(rng.choices([*WORDS, "unknown"], k=4)) for _ in range(30)]
    for k in (1, 7, 60):
        scores_QK, ids_QK = BM25(chunks).search([*questions, "nothing here fits", ""], k)
        assert scores_QK.dtype == np.float32 and ids_QK.dtype == np.int64
        for question, scores, ids in zip(questions, scores_QK, ids_QK, strict=False):
            truth = bm25_by_definition(chunks, question)
            best = sorted(truth.values(), reverse=True)[:k]
            np.testing.assert_allclose(scores, best, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose([truth[id] for id in ids], scores, rtol=1e-5, atol=1e-6)
            order = list(zip(-scores, ids, strict=True))
            assert order == sorted(order) and len(set(ids.tolist())) == k
        lowest = sorted(chunk.id for chunk in chunks)[:k]
        assert ids_QK[-1].tolist() == ids_QK[-2].tolist() == lowest and not scores_QK[-2:].any()


def test_equal_chunks_come_in_the_order_of_their_ids_across_the_cut(rng):
    chunks = [Chunk(id, "d", WORDS[id % 2]) for id in rng.sample(range(1000), 300)]
    odd = sorted(chunk.id for chunk in chunks if chunk.id % 2)
    for k in (1, 20, len(odd)):
        assert BM25(chunks).search([WORDS[1]], k)[1].tolist() == [odd[:k]]


def test_bm25_does_not_depend_on_the_order_of_chunks_and_says_what_it_holds(rng):
    chunks = random_chunks(rng, 40)
    shuffled = rng.sample(chunks, 40)
    one, two = BM25(chunks), BM25(shuffled)
    assert one.digest == two.digest
    for left, right in zip(one.search(WORDS, 9), two.search(WORDS, 9), strict=True):
        np.testing.assert_array_equal(left, right)
    first = chunks[0]
    for other in (Chunk(10**6, "d", first.text, first.title), Chunk(first.id, "d", "else")):
        assert BM25([other, *chunks[1:]]).digest != one.digest


def test_bm25_refuses_more_chunks_than_there_are_and_a_corpus_without_words():
    bm25 = BM25([Chunk(3, "d", "rye"), Chunk(1, "d", "...")])
    assert bm25.search(["rye"], 2)[1].tolist() == [[3, 1]]
    assert bm25.search([], 2)[1].shape == (0, 2)
    for k in (0, 3):
        with pytest.raises(UserError, match="allowed: 1 to 2"):
            bm25.search(["rye"], k)
    for chunks in ([], [Chunk(1, "d", "?!")]):
        with pytest.raises(UserError, match="has a word"):
            BM25(chunks)


def test_words_are_lower_case_without_stop_words_and_without_stemming():
    assert words("When does The FERRY_2 leave?") == ["when", "does", "ferry_2", "leave"]
    assert words("cafe\u0301") == words("caf\u00e9") and words("to be or not to be")
