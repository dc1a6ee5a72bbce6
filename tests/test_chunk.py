"""Documents in, chunks out: everything covered, nothing too long, no character split."""

from itertools import pairwise

import pytest
import regex

from rag2.kb.chunk import TokenChunker
from rag2.kb.clean import clean
from rag2.registry import UserError
from rag2.types import Document
from texts import random_text


def is_inside_cluster(text: str, position: int) -> bool:
    return position not in {m.end() for m in regex.finditer(r"\X", text)} | {0}


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["byte-level", "trimmed", "wordpiece", "words"])
def test_chunks_cover_the_text_fit_their_budget_and_split_no_character(tokenizers, which, dice):
    name = [*map(str, tokenizers), "words"][which]
    tokenizer = TokenChunker(tokenizer=name)._tokenizer

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    for _ in range(60):
        tokens = dice.choice([1, 2, 3, 5, 16, 40, 200])
        overlap = dice.randrange(tokens)
        chunker = TokenChunker(tokens=tokens, overlap=overlap, tokenizer=name)
        text = clean(random_text(dice, dice.randrange(1, 60)))
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
