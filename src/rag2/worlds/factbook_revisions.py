"""What later editions of the Factbook change: documents, and answers about held-out countries."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rag2.registry import UserError
from rag2.worlds.factbook import Factbook
from rag2.worlds.factbook_facts import Fact, Row, in_turn, question, wrong
from rag2.worlds.factbook_fields import Field, key, mentions, number

WRONG = 3  # choices beside the right one


@dataclass(frozen=True)
class Case:
    """A fact in an edition and in the next one, and those of others that neither page states."""

    old: Fact
    new: Fact
    others: list[Fact]


@dataclass(frozen=True)
class Later:
    """An edition beside the one before it: rows of documents and of questions, as a world's."""

    edition: str
    documents: list[Row]
    """those that are new or say something else"""
    removed: list[str]
    """ids of those that are no longer there"""
    changed: list[Row]
    """`metadata.stale` is the choice that was right before"""
    unchanged: list[Row]


def revisions(world: Factbook, later: Sequence[str]) -> Iterator[Later]:
    """What each edition changes after the one before it, the first after the world's newer one.

    Questions ask for the fields that the world asks for, of its test countries, with the share of
    unseen wordings that its test questions have. Raises UserError for an edition that is not there
    or comes twice.
    """
    names = [world.newer, *later]
    for name in later:
        if names.count(name) > 1:
            raise UserError(f"edition {name!r} comes twice: each is compared with the one before")
    now = _alone(world, world.newer)
    for name in later:
        before, now = now, _alone(world, name)
        yield _compared(world, before, now)


def _alone(world: Factbook, edition: str) -> Factbook:
    """The same world of one edition."""
    if world.older == world.newer == edition:
        return world  # with what it has read
    return Factbook.model_validate(world.model_dump() | {"older": edition, "newer": edition})


def _compared(world: Factbook, before: Factbook, now: Factbook) -> Later:
    old = {row["id"]: row for row in before.documents(world.corpus)}
    new = {row["id"]: row for row in now.documents(world.corpus)}
    cases = [_cases(world, before, now, field) for field in world.facts]

    def questions(kind: str, belongs: Callable[[Case], bool]) -> list[Row]:
        rng = world.rng(f"{now.newer}/{kind}")
        stacks = [[case for case in found if belongs(case)] for found in cases]
        for stack in stacks:
            rng.shuffle(stack)
        rng.shuffle(stacks)
        return [_asked(world, case, rng) for case in in_turn(stacks)]

    return Later(
        edition=now.newer,
        documents=[row for id, row in new.items() if old.get(id) != row],
        removed=[id for id in old if id not in new],
        changed=questions("changed", _differ),
        unchanged=questions("unchanged", _agree),
    )


def _cases(world: Factbook, before: Factbook, now: Factbook, field: Field) -> list[Case]:
    """The field's facts of test countries that both editions state, where enough others differ."""
    test = {code for code in world.corpus if world.split[code] == "test"}
    was = {fact.country.code: fact for fact in before.facts_of(field)}
    facts = now.facts_of(field)
    cases = []
    for fact in (f for f in facts if f.country.code in test & was.keys()):
        old = was[fact.country.code]
        told = {key(old.value), key(fact.value)}
        pages = (old.page.text, fact.page.text)
        others = [
            other
            for other in facts
            if key(other.value) not in told and not any(mentions(p, other.value) for p in pages)
        ]
        if len({key(other.value) for other in others}) >= WRONG:
            cases.append(Case(old, fact, others))
    return cases


def _differ(case: Case) -> bool:
    """Whether the values differ as text and as numbers, and neither page states the other's."""
    old, new = case.old, case.new
    size = number(new.value)
    return (
        key(old.value) != key(new.value)
        and (size is None or size != number(old.value))
        and not mentions(new.page.text, old.value)
        and not mentions(old.page.text, new.value)
    )


def _agree(case: Case) -> bool:
    return key(case.old.value) == key(case.new.value)


def _asked(world: Factbook, case: Case, rng: random.Random) -> Row:
    """The new value, the old one where it is another, and values of other countries."""
    others = wrong(case.new, case.others, world.neighbors, rng)
    stale = not _agree(case)
    if stale:
        others = [case.old.value, *others[1:]]
        rng.shuffle(others)
    row = question(case.new, "test", world.wording(rng), others, rng)
    if stale:
        row["metadata"] |= {"stale": row["choices"].index(case.old.value)}
    return row
