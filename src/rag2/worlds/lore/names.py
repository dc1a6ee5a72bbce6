"""Invented names that overlap: few roots, many forms, and never the same full name twice."""

import random
from collections.abc import Iterable, Sequence

from rag2.worlds.lore.relation import Kind

ROOTS = 160  # roots per world, so a root recurs in about two of its 300 entities and bystanders
GIVEN = 60
ONSETS = "b br d dr f g gr h k kl l m n p r s st t th tr v w z".split()
VOWELS = "a e i o u ae ei ia".split()
MIDDLES = "l ll m n nd r rr rt s sk st t v ld mb rn".split()
ENDINGS = "an ar el en eth ick in is om on or oss und ur ard ane ilt oft".split()
GIVEN_ENDINGS = "a o i en as e u ian".split()


def _draw(count: int, seed: str, endings: Sequence[str], avoid: Iterable[str]) -> list[str]:
    rng, taken, drawn = random.Random(seed), set(avoid), []
    while len(drawn) < count:
        word = rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(MIDDLES) + rng.choice(endings)
        if rng.random() < 0.25:
            word = rng.choice(ONSETS) + rng.choice("aeio") + rng.choice("lmnrsv") + word[1:]
        word = word.capitalize()
        if word not in taken:
            taken.add(word)
            drawn.append(word)
    return drawn


class Names:
    """The names of one world, drawn from its own roots; `avoid` keeps worlds apart."""

    def __init__(self, seed: str, avoid: Iterable[str] = ()):
        self.roots = _draw(ROOTS, f"{seed}/roots", ENDINGS, avoid)
        self.given = _draw(GIVEN, f"{seed}/given", GIVEN_ENDINGS, [*avoid, *self.roots])
        self.seed = seed
        self.taken: set[str] = set()

    @property
    def parts(self) -> list[str]:
        """All invented words that names are made of."""
        return self.roots + self.given

    def name(self, kind: Kind, key: str) -> str:
        """A fresh full name; it depends on `key` alone, but for rare collisions."""
        rng = random.Random(f"{self.seed}/name/{kind.name}/{key}")
        while True:
            name = rng.choice(kind.forms).format(r=rng.choice(self.roots), g=rng.choice(self.given))
            if name not in self.taken:
                self.taken.add(name)
                return name
