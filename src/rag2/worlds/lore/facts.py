"""The facts of one world: entities, and which value each of their relations has."""

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rag2.worlds.lore.everyday import EVERYDAY
from rag2.worlds.lore.names import Names
from rag2.worlds.lore.people import PEOPLE
from rag2.worlds.lore.relation import Kind, Relation
from rag2.worlds.lore.ships import SHIPS
from rag2.worlds.lore.towns import TOWNS
from rag2.worlds.lore.values import TOWN, VALUES
from rag2.worlds.lore.workshops import WORKSHOPS

KINDS = (TOWNS, PEOPLE, SHIPS, WORKSHOPS)  # towns first: other kinds refer to them
BYSTANDERS = 12  # per kind; entities that other documents mention and nobody asks about


@dataclass(frozen=True, slots=True)
class Entity:
    """One entity, its facts, and how they are spread: `pages` lists relations by document."""

    kind: Kind
    name: str
    split: str
    pronouns: tuple[str, str, str]
    facts: Mapping[str, str]
    pages: tuple[tuple[Relation, ...], ...]

    @property
    def slug(self) -> str:
        """The name as part of an id: lower case, words joined by hyphens."""
        return self.name.lower().replace("&", "and").replace(" ", "-")

    @property
    def called(self) -> str:
        """The name as it stands inside a sentence."""
        return self.kind.article + self.name

    def document(self, page: int) -> str:
        """The id of the document that holds `pages[page]`."""
        return f"{self.slug}-{page + 1}"

    def page_of(self, relation: str) -> int:
        """Which page states `relation`."""
        return next(i for i, page in enumerate(self.pages) if any(r.name == relation for r in page))

    def same_type(self, type_: str) -> list[str]:
        """The entity's values of one type, over all its relations."""
        return [self.facts[r.name] for r in self.kind.relations if r.type == type_]


def _ordinary_words() -> set[str]:
    """Every word the phrasings and values use, as it looks at the start of a sentence."""
    texts = [value for values in VALUES.values() for value in values]
    texts += [fact.statement for fact in EVERYDAY]
    for kind in KINDS:
        for relation in kind.relations:
            texts += [*relation.stated, *relation.asked, *relation.held_out]
    return {word.capitalize() for word in re.findall(r"\w+", " ".join(texts))}


ORDINARY = _ordinary_words()  # no invented name may read like one of these


@dataclass(slots=True)
class World:
    """All entities of one world, by split, and the bystanders by kind."""

    seed: str
    parts: list[str]
    entities: list[Entity] = field(default_factory=list)
    bystanders: dict[str, list[Entity]] = field(default_factory=dict)

    def values(self, type_: str, split: str) -> tuple[str, ...]:
        """All values of a type; towns of one split refer to, and are confused with, their own."""
        if type_ != TOWN:
            return VALUES[type_]
        return tuple(e.name for e in self.entities if e.kind is TOWNS and e.split == split)


def _pages(kind: Kind, rng: random.Random) -> tuple[tuple[Relation, ...], ...]:
    """Pair the relations at random, never two of one type: a page states one value per type."""
    relations = list(kind.relations)
    while True:
        rng.shuffle(relations)
        pages = tuple(zip(relations[::2], relations[1::2], strict=True))
        if all(one.type != other.type for one, other in pages):
            return pages


def _entity(kind: Kind, name: str, split: str, towns: tuple[str, ...], seed: str) -> Entity:
    rng = random.Random(seed)
    facts: dict[str, str] = {}
    used: set[str] = set()  # two relations of one type never share a value
    for relation in kind.relations:
        inventory = towns if relation.type == TOWN else VALUES[relation.type]
        value = rng.choice([v for v in inventory if v not in used])
        used.add(value)
        facts[relation.name] = value
    if kind.nouns:  # "over the river at it" is no English, "at the town" is
        pronouns = ("it", kind.nouns[0], "its")
    else:
        pronouns = rng.choice([("she", "her", "her"), ("he", "him", "his")])
    return Entity(kind, name, split, pronouns, facts, _pages(kind, rng))


def build(seed: str, sizes: Mapping[str, int], avoid: Iterable[str] = ()) -> World:
    """A world with `sizes[split]` entities per split, spread evenly over the kinds.

    Bystanders come first and every entity draws from its own stream, so that a larger split
    leaves the others as they were.
    """
    names = Names(seed, ORDINARY.union(avoid))
    world = World(seed, names.parts)
    for kind in KINDS:
        towns = tuple(e.name for e in world.bystanders.get("town", ()))
        world.bystanders[kind.name] = []
        for number in range(BYSTANDERS):
            key = f"{kind.name}/bystander/{number}"
            entity = _entity(kind, names.name(kind, key), "bystander", towns, f"{seed}/facts/{key}")
            world.bystanders[kind.name].append(entity)
    for kind in KINDS:
        for split, size in sizes.items():
            towns = () if kind is TOWNS else world.values(TOWN, split)
            for number in range(KINDS.index(kind), size, len(KINDS)):
                key = f"{kind.name}/{split}/{number}"
                name = names.name(kind, key)
                world.entities.append(_entity(kind, name, split, towns, f"{seed}/facts/{key}"))
    return world


def strangers(world: World, count: int) -> list[Entity]:
    """`count` further entities, spread evenly over the kinds, that no text of the world mentions.

    No word of their names occurs in the world's; the towns they refer to are those of its test
    split, so that a question about one offers the same answers as a question about the world.
    """
    seed = f"{world.seed}/strangers"
    names = Names(seed, ORDINARY.union(world.parts))
    found = []
    for kind in KINDS:
        for number in range(KINDS.index(kind), count, len(KINDS)):
            key = f"{kind.name}/{number}"
            name, towns = names.name(kind, key), world.values(TOWN, "test")
            found.append(_entity(kind, name, "test", towns, f"{seed}/facts/{key}"))
    return found
