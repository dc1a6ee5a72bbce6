"""From facts to sentences: documents, their paraphrases, and questions."""

import random
from dataclasses import dataclass

from rag2.worlds.lore.facts import Entity, World
from rag2.worlds.lore.relation import Relation

CONTRASTS = ("by contrast, ", "meanwhile, ", "elsewhere, ", "for comparison, ")


@dataclass(frozen=True, slots=True)
class Aside:
    """A true sentence about a bystander, which offers a competing value of the same type."""

    about: Entity
    relation: Relation

    @property
    def value(self) -> str:
        """The competing value."""
        return self.about.facts[self.relation.name]


@dataclass(frozen=True, slots=True)
class Page:
    """One rendered document and the aside in it, if any."""

    text: str
    aside: Aside | None


def possessive(name: str) -> str:
    """`name` with 's, or with a bare apostrophe after an s."""
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def with_article(value: str) -> str:
    """`value` after a or an."""
    return f"{'an' if value[0] in 'aeiou' else 'a'} {value}"


def sentence(entity: Entity, template: str, value: str, subject: str, opening: str = "") -> str:
    """One sentence; `subject` is the entity's name, a noun for it, or "" for its pronouns."""
    she, her, hers = entity.pronouns
    text = template.format(
        X=subject or she,
        O=subject or her,
        P=possessive(subject) if subject else hers,
        p=hers,
        v=value,
        a=with_article(value),
    )
    text = opening + text
    return text[0].upper() + text[1:] + "."


def ask(entity: Entity, wording: str, value: str | None = None) -> str:
    """The question `wording` about an entity, or about the phrase `value` that describes one."""
    name = value or entity.called
    return wording.format(x=name, px=possessive(name))


def choose_aside(world: World, entity: Entity, page: int, rng: random.Random) -> Aside | None:
    """A bystander whose value for one of the page's relations differs from the entity's own."""
    relation = rng.choice(entity.pages[page])
    others = [
        other
        for other in world.bystanders[entity.kind.name]
        if other.facts[relation.name] not in entity.same_type(relation.type)
    ]
    return Aside(rng.choice(others), relation) if others else None


def _reference(entity: Entity, after_aside: bool, rng: random.Random) -> str:
    """How a later sentence refers to the entity: by name wherever a pronoun could mislead."""
    if after_aside or rng.random() < 0.4:
        return entity.called
    return rng.choice(("", *entity.kind.nouns))


def _phrasing(version: int, place: int, count: int) -> int:
    """Which of `count` phrasings states the fact at `place` of a page in one of its versions.

    Version 0 alone uses phrasing 0. The next count - 1 versions use each other phrasing once; the
    ones after them pair the phrasings anew, so that (count - 1)**2 paraphrases are distinct.
    """
    if version == 0:
        return 0
    turn, number = divmod(version - 1, count - 1)
    return 1 + (number + turn * place) % (count - 1)


def render(
    world: World, entity: Entity, page: int, rng: random.Random, asides: float, version: int
) -> Page:
    """Write one page; its versions differ in their sentences or in what stands beside what.

    asides: the probability that the page also says something about a bystander.
    """
    relations = list(entity.pages[page])
    rng.shuffle(relations)
    aside = choose_aside(world, entity, page, rng) if rng.random() < asides else None
    sentences: list[str] = []
    opened = rng.randrange(4)  # at most one sentence of a page has an opening; two have none
    for position, relation in enumerate(relations):
        order = list(relation.stated)
        # The order of phrasings is the entity's own, so a paraphrase repeats none of them.
        random.Random(f"{world.seed}/phrasing/{entity.slug}/{relation.name}").shuffle(order)
        place = entity.pages[page].index(relation)
        template = order[_phrasing(version, place, len(order))]
        misleading = bool(aside) and len(sentences) > position
        subject = entity.called if position == 0 else _reference(entity, misleading, rng)
        opening = rng.choice(entity.kind.openings) if position == opened else ""
        sentences.append(sentence(entity, template, entity.facts[relation.name], subject, opening))
        if aside and aside.relation is relation:
            other = rng.choice([t for t in relation.stated if t != template])
            contrast = rng.choice(CONTRASTS)
            sentences.append(
                sentence(aside.about, other, aside.value, aside.about.called, contrast)
            )
    return Page(" ".join(sentences), aside)
