"""Training sequences for the base: reading other worlds, and everyday facts by heart."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from rag2.worlds.lore import facts, prose
from rag2.worlds.lore.everyday import EVERYDAY
from rag2.worlds.lore.facts import Entity, World

Row = dict[str, Any]
WORLD = 300  # entities of one pretraining world
EVERYDAY_PER_ROW = 3
WORDINGS = 3  # in which a fact is asked on one page


class _Pages:
    """An endless supply of (entity, page) from one new world after another, never repeated."""

    def __init__(self, seed: str, avoid: list[str], asides: float):
        self.seed, self.avoid, self.asides = seed, avoid, asides
        self.rng = random.Random(f"{seed}/pages")
        self.worlds = 0
        self.world: World
        self.left: list[tuple[Entity, int]] = []

    def next(self) -> tuple[Entity, int]:
        """A page not seen before."""
        if not self.left:
            self.world = facts.build(f"{self.seed}/{self.worlds}", {"train": WORLD}, self.avoid)
            self.worlds += 1
            self.left = [(e, page) for e in self.world.entities for page in range(len(e.pages))]
            self.rng.shuffle(self.left)
        return self.left.pop()

    def text(self, entity: Entity, page: int) -> str:
        """The page in one of its phrasings."""
        version = self.rng.randrange(5)
        return prose.render(self.world, entity, page, self.rng, self.asides, version).text

    def qa(self, entity: Entity, page: int) -> list[list[str]]:
        """Both facts of the page as [question, answer], each in three seen wordings, shuffled.

        Many answers to a page teach reading in far fewer steps than one for each fact.
        """
        pairs = [
            [prose.ask(entity, wording), entity.facts[r.name]]
            for r in entity.pages[page]
            for wording in self.rng.sample(r.asked, WORDINGS)
        ]
        self.rng.shuffle(pairs)
        return pairs


def _reading(pages: _Pages) -> Row:
    entity, page = pages.next()
    text = pages.text(entity, page)
    return {"title": entity.name, "text": text, "qa": pages.qa(entity, page)}


def _mismatched(pages: _Pages) -> Row:
    entity, page = pages.next()
    other, number = pages.rng.choice(
        [(e, p) for e in pages.world.entities if e is not entity for p in range(len(e.pages))]
    )
    text = pages.text(other, number)
    return {"title": other.name, "text": text, "qa": pages.qa(entity, page)}


def _closed_book(pages: _Pages) -> Row:
    entity, page = pages.next()
    return {"title": "", "text": "", "qa": pages.qa(entity, page)}


def _plain(pages: _Pages) -> Row:
    entity, page = pages.next()
    return {"title": entity.name, "text": pages.text(entity, page), "qa": []}


def _everyday_asked(pages: _Pages) -> Row:
    chosen = pages.rng.sample(EVERYDAY, EVERYDAY_PER_ROW)
    return {"title": "", "text": "", "qa": [[pages.rng.choice(f.asked), f.answer] for f in chosen]}


def _everyday_told(pages: _Pages) -> Row:
    chosen = pages.rng.sample(EVERYDAY, EVERYDAY_PER_ROW)
    return {"title": "", "text": " ".join(fact.statement for fact in chosen), "qa": []}


MIXTURE: tuple[tuple[Callable[[_Pages], Row], float], ...] = (
    (_reading, 0.82),
    (_mismatched, 0.07),
    (_closed_book, 0.04),
    (_everyday_asked, 0.04),
    (_plain, 0.02),
    (_everyday_told, 0.01),
)


def rows(count: int, seed: str, avoid: list[str], asides: float) -> Iterator[Row]:
    """`count` training rows; no invented word in them occurs in `avoid`."""
    pages = _Pages(seed, avoid, asides)
    makers = [maker for maker, _ in MIXTURE]
    weights = [weight for _, weight in MIXTURE]
    rng = random.Random(f"{seed}/mixture")
    for _ in range(count):
        yield rng.choices(makers, weights)[0](pages)
