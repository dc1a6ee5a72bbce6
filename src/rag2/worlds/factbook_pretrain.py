"""What the Factbook's base is trained on: the older edition's text, and reading it."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rag2.worlds.factbook_editions import Country, FactPath, Page
from rag2.worlds.factbook_fields import Field, answer, fields, mentions

PASSAGE_WORDS = 80  # about the size of a chunk, so that the base reads what it will be given
PLAIN, DISTRACTED, CLOSED = 0.10, 0.10, 0.05  # shares of rows; the rest is reading
BY_HEART = 0.7  # of closed-book rows: control facts, which the base shall know
ASKED = 0.6  # of reading rows: about a fact that questions are asked for
GENERIC_TOO = 0.5  # of passages with both: asked in the page's words besides
GENERIC = (
    "{label} of {country}?",
    "What is the {label} of {country}?",
    "{country}: {label}?",
    "For {country}, what does the entry {label} say?",
)
Row = dict[str, Any]
Pair = tuple[tuple[str, ...], str]  # wordings of one question, its answer


@dataclass(frozen=True)
class Passage:
    """A piece of a document with the facts that can be asked of it."""

    title: str
    text: str
    asked: tuple[Pair, ...]
    generic: tuple[Pair, ...]


def rows(
    count: int,
    countries: dict[str, Country],
    pages: dict[str, list[Page]],
    practised: set[str],
    asked_for: Sequence[Field],
    rng: random.Random,
) -> Iterator[Row]:
    """`count` training sequences; only the countries in `practised` (codes) are asked about."""
    passages = {c: _passages(countries[c], found, asked_for) for c, found in pages.items()}
    everything = [p for found in passages.values() for p in found]
    readable = [p for c in sorted(practised) for p in passages[c] if p.asked or p.generic]
    asked = [p for p in readable if p.asked]
    if not asked or not readable:
        return
    heart = [pairs for c in sorted(practised) if (pairs := _by_heart(countries[c]))]
    for _ in range(count):
        kind = rng.random()
        passage = rng.choice(asked if rng.random() < ASKED else readable)
        if kind < PLAIN:
            passage = rng.choice(everything)
            yield {"title": passage.title, "text": passage.text, "qa": []}
        elif kind < PLAIN + CLOSED:
            known = heart and rng.random() < BY_HEART
            qa = _pairs(rng.choice(heart), rng) if known else _questions(passage, rng)
            yield {"title": "", "text": "", "qa": qa}
        else:
            shown = passage
            if kind < PLAIN + CLOSED + DISTRACTED:
                shown = rng.choice(everything)
            yield {"title": shown.title, "text": shown.text, "qa": _questions(passage, rng)}


def _questions(passage: Passage, rng: random.Random) -> list[list[str]]:
    """Questions about a passage in people's words and in the page's, a fact in several wordings.

    Wordings of one fact side by side teach reading much faster than as many single questions.
    """
    found = [[w, value] for wordings, value in passage.asked for w in wordings]
    if not found or rng.random() < GENERIC_TOO:
        found += [[rng.choice(wordings), value] for wordings, value in passage.generic]
    return rng.sample(found, min(len(found), rng.randint(3, 6)))


def _pairs(pairs: tuple[Pair, ...], rng: random.Random) -> list[list[str]]:
    chosen = rng.sample(pairs, min(len(pairs), rng.randint(1, 3)))
    return [[rng.choice(wordings), value] for wordings, value in chosen]


def _by_heart(country: Country) -> tuple[Pair, ...]:
    """The control questions of a country with the older edition's answers."""
    found = []
    for field in fields("control"):
        value = field.answer(country.facts.get(field.was, ""))
        if value:
            found.append((_filled(field.seen, country), value))
    return tuple(found)


def _passages(country: Country, pages: list[Page], asked_for: Sequence[Field]) -> list[Passage]:
    """The documents in pieces of whole lines, each with its questions."""
    people: dict[FactPath, list[Pair]] = {}
    for field in asked_for:
        value, wordings = field.earlier(country.facts.get(field.was, ""))
        if value:
            people.setdefault(field.was, []).append((_filled(wordings, country), value))
    return [_passage(country, page, rows, people) for page in pages for rows in _pieces(page)]


def _passage(
    country: Country, page: Page, lines: list[int], people: dict[FactPath, list[Pair]]
) -> Passage:
    """The piece of a page that these lines make; line n holds the page's path n - 1."""
    text = "\n".join(page.lines[n] for n in lines)
    asked, generic = [], []
    for path in (page.paths[n - 1] for n in lines if n):
        asked += [pair for pair in people.get(path, []) if mentions(text, pair[1])]
        value = answer(country.facts[path])
        if " / " in path[-1]:  # several facts in one
            continue
        if value and mentions(text, value):
            label = ", ".join(path[1:])
            wordings = tuple(w.replace("{label}", label) for w in GENERIC)
            generic.append((_filled(wordings, country), value))
    return Passage(page.title, text, tuple(asked), tuple(generic))


def _pieces(page: Page) -> Iterator[list[int]]:
    """Numbers of consecutive lines with at most PASSAGE_WORDS words together, if a line has not."""
    piece, words = [], 0
    for n, line in enumerate(page.lines):
        size = len(line.split())
        if len(piece) > 1 and words + size > PASSAGE_WORDS:
            yield piece
            piece, words = [], 0
        piece.append(n)
        words += size
    yield piece


def _filled(wordings: tuple[str, ...], country: Country) -> tuple[str, ...]:
    return tuple(wording.replace("{country}", country.name) for wording in wordings)
