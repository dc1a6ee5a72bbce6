"""A kind of entity, and what can be said and asked about it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """One relation: how documents state it and how questions ask for it.

    Document slots: {X} {O} {P} the entity as subject, object and possessive (a name, a noun or a
    pronoun), {p} always its possessive pronoun, {v} the value, {a} the value with a or an.
    Question slots: {x} the entity's name, {px} its possessive. Questions share no content word
    with the documents, and the words of `held_out` wordings are known from `asked` ones, so that
    an unseen wording is a new combination rather than an unknown word.
    """

    name: str
    type: str
    stated: tuple[str, ...]
    asked: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of entity: its name forms ({r} is a root), nouns for it, and its relations.

    `openings` may start any sentence of a document; `described` turns an entity into a phrase
    for the entity its `link` relation names (two-hop questions).
    """

    name: str
    forms: tuple[str, ...]
    article: str
    nouns: tuple[str, ...]
    openings: tuple[str, ...]
    relations: tuple[Relation, ...]
    link: str = ""
    described: tuple[str, ...] = ()

    def relation(self, name: str) -> Relation:
        """The relation called `name`; raises KeyError when there is none."""
        for relation in self.relations:
            if relation.name == name:
                return relation
        raise KeyError(name)
