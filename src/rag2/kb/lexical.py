"""Questions -> chunks that share their words: exact BM25 over the whole corpus, by bm25s.

Words are runs of letters, digits and underscores, in lower case and NFC, without the 33 English
stop words of Lucene; nothing is stemmed, since names and numbers are what questions turn on.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN

from rag2.registry import UserError
from rag2.types import Chunk

WORD = re.compile(r"\w+")
STOP_WORDS = frozenset(STOPWORDS_EN)


def words(text: str) -> list[str]:
    """The words of a text in order; a text of stop words alone keeps them."""
    found = WORD.findall(unicodedata.normalize("NFC", text).lower())
    return [word for word in found if word not in STOP_WORDS] or found


class BM25:
    """BM25 (Lucene's variant, k1 = 1.5, b = 0.75) over the passages of chunks."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        """Raises UserError when no chunk has a word."""
        chunks = sorted(chunks, key=lambda chunk: chunk.id)  # position order = id order
        self.ids_N = np.array([chunk.id for chunk in chunks], dtype=np.int64)
        digest = hashlib.sha256()
        for chunk in chunks:
            text = chunk.passage.encode()
            digest.update(f"{chunk.id} {len(text)}\n".encode() + text)
        self.digest = digest.hexdigest()
        """SHA-256 over ids and passages: results are the same as long as it is."""
        words_N = [words(chunk.passage) for chunk in chunks]
        if not any(words_N):
            raise UserError(f"none of the {len(chunks)} chunks has a word to search for")
        # Never numba, even where it is installed: every machine gets the same sums.
        self._index = bm25s.BM25(
            k1=1.5,
            b=0.75,
            method="lucene",
            backend="numpy",
            csc_backend="numpy",
            auto_compile=False,
        )
        self._index.index(words_N, show_progress=False)

    def search(self, questions: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores_QK float32, ids_QK int64), best first, ties by the smallest chunk id.

        A chunk without any word of the question scores 0. Raises UserError unless 1 <= k <= N.
        """
        if not 1 <= k <= len(self.ids_N):
            raise UserError(f"k={k}; allowed: 1 to {len(self.ids_N)}, the number of chunks")
        scores_QK = np.zeros((len(questions), k), dtype=np.float32)
        ids_QK = np.zeros((len(questions), k), dtype=np.int64)
        for row, question in enumerate(questions):
            scores_N = self._scores(question)
            best_K = _top(scores_N, k)
            scores_QK[row], ids_QK[row] = scores_N[best_K], self.ids_N[best_K]
        return scores_QK, ids_QK

    def _scores(self, question: str) -> np.ndarray:
        """BM25 of every chunk for one question, scores_N."""
        known = self._index.get_tokens_ids(words(question))
        if not known:
            return np.zeros(len(self.ids_N), dtype=np.float32)
        return self._index.get_scores_from_ids(known)


def _top(scores_N: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k highest scores, best first; among equals the lowest positions."""
    cut = np.partition(scores_N, -k)[-k]  # argpartition would pick any of the equals at the cut
    above = np.flatnonzero(scores_N > cut)
    above = above[np.argsort(-scores_N[above], kind="stable")]
    return np.concatenate([above, np.flatnonzero(scores_N == cut)[: k - len(above)]])
