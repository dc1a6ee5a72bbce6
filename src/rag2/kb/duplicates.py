"""Documents seen before: the same text again, or nearly the same by MinHash (Broder 1997)."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import regex

from rag2.kb.chunk import UNSPACED
from rag2.registry import UserError
from rag2.types import Document

if TYPE_CHECKING:
    from datasketch import MinHash

WORD = regex.compile(rf"{UNSPACED}|(?:(?!{UNSPACED})\w)+")
SHINGLE = 3  # words
PERMUTATIONS = 128  # the similarity's standard error is at most .044, at .9 it is .027
BLOCK = 4096  # shingles hashed at a time, so that a long document takes no more memory


class Exact:
    """Texts under their titles, as hashes: two that differ in white space alone are one."""

    def __init__(self) -> None:
        self._places: dict[bytes, str] = {}

    def find(self, document: Document, place: str) -> str:
        """Why the document is no new one, or nothing: then it is one from now on."""
        text = "\n".join(" ".join(part.split()) for part in (document.title, document.text))
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if digest in self._places:
            return f"exact duplicate of {self._places[digest]}"
        self._places[digest] = place
        return ""


class Near:
    """Sketches of texts: the share of three-word shingles that two have in common is estimated."""

    def __init__(self, threshold: float) -> None:
        """Texts at least so similar are duplicates; raises UserError without datasketch."""
        if not 0 < threshold <= 1:
            raise UserError(f"near={threshold}; allowed: more than 0, at most 1")
        try:
            from datasketch import MinHashLSH
        except ModuleNotFoundError as error:
            raise UserError(
                f"near duplicates need the package {error.name!r}; pip install 'rag2[ingest]'"
            ) from None
        self._threshold = threshold
        # A candidate too many costs a comparison, one too few is a duplicate that stays.
        self._index = MinHashLSH(
            threshold=min(threshold, 0.99), num_perm=PERMUTATIONS, weights=(0.1, 0.9)
        )
        self._sketches: list[MinHash] = []
        self._places: list[str] = []

    def find(self, document: Document, place: str) -> str:
        """Why the document is no new one, or nothing: then it is one from now on."""
        sketch = _sketch(document.text)
        found = sorted(n for n in self._index.query(sketch) if isinstance(n, int))
        similar = {n: sketch.jaccard(self._sketches[n]) for n in found}
        best = max(similar, key=similar.__getitem__, default=-1)
        if best >= 0 and similar[best] >= self._threshold:
            return f"near duplicate of {self._places[best]} ({similar[best]:.2f} similar)"
        self._index.insert(len(self._sketches), sketch, check_duplication=False)
        self._sketches.append(sketch)
        self._places.append(place)
        return ""


def _sketch(text: str) -> "MinHash":
    from datasketch import MinHash

    sketch = MinHash(PERMUTATIONS)
    shingles = _shingles(text)
    while block := list(islice(shingles, BLOCK)):
        sketch.update_batch(block)
    return sketch


def _shingles(text: str) -> Iterator[bytes]:
    """Every three words in a row, or all of a shorter text; in lower case."""
    words = [match[0] for match in WORD.finditer(text.casefold())]
    for start in range(max(len(words) - SHINGLE + 1, 1)):
        yield " ".join(words[start : start + SHINGLE]).encode("utf-8")
