"""Which rewordings of a text are good to learn from: no copies, and nothing lost that was told."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from pydantic import Field

from rag2.config import Config
from rag2.kb.lexical import STOP_WORDS

WORD = re.compile(r"\w+")
NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
SENTENCE = re.compile(r"(?:^|(?<=[.!?:;])\s+|\n)\W*(\w+)")  # its first word
GRAM = 3  # words of the runs that two texts are compared by


class Filter(Config):
    """What a rewording must be: a text of about the same length that is not a copy."""

    similar: float = Field(default=0.8, gt=0, le=1)
    """share of common runs of three words from which a rewording is a copy of the source or of an
    earlier one"""
    shortest: float = Field(default=0.5, ge=0)
    """words of a rewording / words of its source, at the least"""
    longest: float = Field(default=1.5, gt=0)
    """and at the most"""

    def fault(self, text: str, source: str, earlier: Sequence[str], known: Collection[str]) -> str:
        """Why the rewording is rejected, the first reason that holds; "" for a good one.

        `earlier` are the accepted rewordings of the same source, `known` the corpus's words in
        lower case, as `lower_words` tells them.
        """
        length = len(WORD.findall(text)) / max(1, len(WORD.findall(source)))
        if not text.strip() or length < self.shortest:
            return "too short"
        if length > self.longest:
            return "too long"
        if any(similarity(text, other) >= self.similar for other in (source, *earlier)):
            return "copy"
        if not numbers(source) <= numbers(text):
            return "lost number"
        if not names(source, known) <= set(WORD.findall(_normal(text))):
            return "lost name"
        return ""


def similarity(text: str, other: str) -> float:
    """2 x common / all runs of three words, counted as often as they occur; case is not looked at.

    1 for texts of equal words in equal order; texts of fewer words are alike only if equal.
    """
    words, others = (WORD.findall(_normal(t).casefold()) for t in (text, other))
    if words == others:
        return 1.0
    grams, theirs = _grams(words), _grams(others)
    return 2 * (grams & theirs).total() / max(1, grams.total() + theirs.total())


def numbers(text: str) -> set[str]:
    """Runs of digits, with the points, commas, colons and slashes between them; no words."""
    return set(NUMBER.findall(_normal(text)))


def names(text: str, known: Collection[str]) -> set[str]:
    """The capitalised words of a text that are names.

    Inside a sentence each is one; the first word of a sentence is one unless it is a stop word or
    the corpus has it in lower case too. Words of one letter are none.
    """
    text = _normal(text)
    first = {match.start(1) for match in SENTENCE.finditer(text)}
    return {
        word.group()
        for word in WORD.finditer(text)
        if word.group()[0].isupper()
        and len(word.group()) > 1
        and not (word.start() in first and _is_ordinary(word.group().lower(), known))
    }


def lower_words(texts: Iterable[str]) -> set[str]:
    """Every word that occurs in lower case anywhere."""
    found = (word for text in texts for word in WORD.findall(_normal(text)))
    return {word for word in found if word == word.lower()}


def _is_ordinary(word: str, known: Collection[str]) -> bool:
    return word in known or word in STOP_WORDS


def _grams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[n : n + GRAM]) for n in range(len(words) - GRAM + 1))


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text)
