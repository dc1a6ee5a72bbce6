"""Document -> (start, end) of its chunks: windows of tokens with exact character offsets."""

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, Self

import regex
from pydantic import Field, StrictInt, model_validator
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from rag2.config import Config
from rag2.registry import UserError
from rag2.types import Document

VISIBLE = re.compile(r"\S")
CLUSTER = regex.compile(r"\X")  # what a reader sees as one character (UAX #29)
WORDS = "words"
# Scripts that put no space between words.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"


class Chunker(Protocol):
    """What the knowledge base asks of a chunker; TokenChunker is one."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides where a text is cut."""
        ...

    def model_dump_json(self) -> str:
        """The configuration, to be stored beside the chunks."""
        ...

    def __call__(self, document: Document) -> list[tuple[int, int]]:
        """(start, end) characters of each chunk, in order; at least one for a visible text."""
        ...


class TokenChunker(Config):
    """Chunks of at most `tokens` tokens, neighbours sharing at most `overlap` of them.

    Guaranteed, for any tokenizer with offsets: every visible character is in a chunk; starts and
    ends increase; a chunk has no white space at its ends; tokenised on its own, without special
    tokens, it has at most `tokens` tokens. Cuts fall between grapheme clusters. Two cases where
    that cannot be: a cluster of more than `tokens` tokens is cut between code points, and a single
    code point of more than `tokens` tokens is a chunk of its own. White space at a chunk's ends
    goes even where it belongs to a cluster; at a cut it counts as tokens of the window and of the
    overlap.
    """

    name: Literal["tokens"] = "tokens"
    tokens: StrictInt = Field(default=128, ge=1)
    """Longest chunk, in tokens; the title is not counted."""
    overlap: StrictInt = Field(default=16, ge=0)
    """Tokens that a chunk shares with the one before, at most."""
    tokenizer: str = WORDS
    """`words`, a folder with a tokenizer.json, such a file, or a tokenizer's name on the hub."""

    @model_validator(mode="after")
    def _overlap_leaves_progress(self) -> Self:
        if self.overlap >= self.tokens:
            raise ValueError(f"overlap={self.overlap} must be less than tokens={self.tokens}")
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the window and of the tokenizer, wherever it lies; raises as a call does."""
        window = f"tokens {self.tokens} {self.overlap}\n"
        return hashlib.sha256((window + self._tokenizer.to_str()).encode()).hexdigest()

    def tokenizer_json(self) -> str | None:
        """The tokenizer as the text of a tokenizer.json; None for `words`, which needs none."""
        return None if self.tokenizer == WORDS else self._tokenizer.to_str()

    def __call__(self, document: Document) -> list[tuple[int, int]]:
        """(start, end) characters of each chunk; raises UserError without a usable tokenizer."""
        text = document.text
        if not text or text.isspace():
            return []
        return _Windows(text, self._starts(text), self._count).cut(self.tokens, self.overlap)

    def _starts(self, text: str) -> list[int]:
        """The first character of each token; the first token is taken to start the text."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return [0, *(start for start, _ in offsets[1:])]

    def _count(self, text: str) -> int:
        """Tokens of a text on its own."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """The tokenizer, without the truncation and padding that its file may ask for."""
        if not self.tokenizer:
            raise UserError(
                f"chunker.tokenizer is not set; give {WORDS!r} or a folder with a tokenizer.json"
            )
        if self.tokenizer == WORDS:
            return _word_tokenizer()
        path = Path(self.tokenizer)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            if file.is_file():
                tokenizer = Tokenizer.from_file(str(file))
            elif path.exists():
                raise FileNotFoundError("the folder holds no tokenizer.json")
            else:
                tokenizer = Tokenizer.from_pretrained(self.tokenizer)
        except Exception as error:  # the tokenizers library raises bare Exception
            reason = " ".join(str(error).split())
            raise UserError(f"chunker.tokenizer={self.tokenizer!r}: {reason}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def _word_tokenizer() -> Tokenizer:
    """A token for each word and for each other visible character; it needs no file.

    A run without a space has no bound, such as a hash or encoded data: a word ends after 16
    characters. A character of a script without spaces is a word.
    """
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    pattern = rf"(?:(?!{UNSPACED})\w){{1,16}}|\S"
    tokenizer.pre_tokenizer = Split(Regex(pattern), behavior="removed", invert=True)
    return tokenizer


class _Windows:
    """The walk over a text from cut to cut; all positions are characters.

    `starts` holds the first character of each token: more than once for a code point of several
    byte tokens, so that a cut can never fall inside one.
    """

    def __init__(self, text: str, starts: list[int], count: Callable[[str], int]) -> None:
        self.text, self.starts, self.count = text, starts, count
        self.characters = range(len(text) + 1)
        self.clusters: Sequence[int] = self.characters  # edges of grapheme clusters
        cuts = {*starts, len(text)}
        if not text.isascii():
            self.clusters = [0, *(match.end() for match in CLUSTER.finditer(text))]
            cuts &= set(self.clusters)
        self.cuts = sorted(cuts)  # where tokens and clusters both begin

    def cut(self, tokens: int, overlap: int) -> list[tuple[int, int]]:
        """(start, end) of windows that cover the text, its white space apart."""
        start = self._visible(0)
        end = self._end(start, tokens)
        spans = [(start, end)]
        while (beyond := self._visible(end)) < len(self.text):
            start = self._visible(self._start(start, end, overlap))
            farther = self._end(start, tokens)
            if farther <= end:  # shrunk to fit: all of it is in the window before
                start, farther = beyond, self._end(beyond, tokens)
            end = farther
            spans.append((start, end))
        return spans

    def _visible(self, position: int) -> int:
        """The first character from there on that is no white space, or the end of the text."""
        match = VISIBLE.search(self.text, position)
        return match.start() if match else len(self.text)

    def _start(self, start: int, end: int, overlap: int) -> int:
        """Where the window after [start, end) starts: `overlap` tokens back, or as near as can."""
        token = max(bisect_left(self.starts, end) - overlap, 0)
        if token >= len(self.starts):
            return end
        low = self.starts[token]
        if bisect_left(self.starts, low) < token:  # the middle of a code point's byte tokens
            low += 1
        return min(self.cuts[bisect_left(self.cuts, max(low, start + 1))], end)

    def _end(self, start: int, tokens: int) -> int:
        """The end of the longest window from `start` that fits, at the best kind of cut."""
        token = bisect_left(self.starts, start) + tokens
        limit = self.starts[token] if token < len(self.starts) else len(self.text)
        for cuts in (self.cuts, self.clusters, self.characters):
            first, last = bisect_right(cuts, start), bisect_right(cuts, limit)
            if cuts is self.clusters:
                # In the text a cluster can have more tokens than alone: with offsets that leave
                # white space out, the token of a space before it starts where it does.
                last = max(last, first + 1)
            for end in reversed(cuts[first:last]):
                # A piece can have more tokens alone than in its text: merges across the cut go.
                piece = self.text[start:end].rstrip()
                if self.count(piece) <= tokens:
                    return start + len(piece)
        return start + 1
