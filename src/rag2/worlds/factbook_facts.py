"""A fact of the Factbook -> a question with four choices, three of them other countries' values."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rag2.worlds.factbook_editions import Country, Page
from rag2.worlds.factbook_fields import Field, key, mentions, number

Row = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Fact:
    """A value of one country in the newer edition, and the document that states it."""

    country: Country
    field: Field
    value: str
    page: Page
    changed: bool  # the older edition has the fact with another value, or there is no older one
    same: bool  # the older edition has it with this value


def in_turn(stacks: Sequence[Sequence[Item]]) -> list[Item]:
    """The first of every stack, then the second, and so on: no field crowds out the others."""
    return [s[turn] for turn in range(max(map(len, stacks))) for s in stacks if turn < len(s)]


def question(fact: Fact, split: str, wording: str, wrong: Sequence[str], rng: random.Random) -> Row:
    """The fact asked for in a wording of that kind, its value at a random place."""
    wordings = fact.field.seen if wording == "seen" else fact.field.unseen
    answer = rng.randrange(4)
    entity = fact.country.name
    return {
        "id": f"{fact.country.code}/{'/'.join(fact.field.path[1:])}",
        "question": rng.choice(wordings).replace("{country}", entity),
        "choices": [*wrong[:answer], fact.value, *wrong[answer:]],
        "answer": answer,
        "split": split,
        "evidence": [fact.page.id],
        "metadata": {"entity": entity, "relation": fact.field.name, "wording": wording},
    }


def wrong(fact: Fact, pool: Sequence[Fact], neighbors: int, rng: random.Random) -> list[str]:
    """Three values of other countries that the evidence does not state.

    Numbers come from the gold value's neighborhood, its rank among the four drawn first:
    neither its size nor a place in the middle gives it away.
    """
    gold = number(fact.value)
    values = {key(f.value): f.value for f in pool if not mentions(fact.page.text, f.value)}
    values.pop(key(fact.value), None)
    others = sorted(values.values())
    sizes = ((number(value), value) for value in others)
    sized = sorted((size, value) for size, value in sizes if size is not None and size != gold)
    if gold is None or len(sized) < 3:
        return rng.sample(others, 3)
    below = [value for size, value in sized if size < gold][-neighbors:]
    above = [value for size, value in sized if size > gold][:neighbors]
    smaller = min(max(rng.randrange(4), 3 - len(above)), len(below))
    wrong = rng.sample(below, smaller) + rng.sample(above, 3 - smaller)
    rng.shuffle(wrong)
    return wrong
