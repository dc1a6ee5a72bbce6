"""The almanac: an imaginary world whose every fact, document and question is generated.

Each entity has eight facts on four short documents, two a document, so that finding the entity
is not enough. Questions share no content word with the documents except the name. Splits are by
entity, and the base is pretrained on other worlds: it can read these documents and cannot know
what they say.
"""

import json
import random
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, StrictInt

from rag2.config import Config
from rag2.worlds.lore import facts, pretrain, prose
from rag2.worlds.lore.everyday import EVERYDAY
from rag2.worlds.lore.facts import Entity, World
from rag2.worlds.lore.relation import Relation
from rag2.worlds.lore.towns import TOWNS

Row = dict[str, Any]


class Almanac(Config):
    """An imaginary world; sizes count entities, which are spread evenly over four kinds."""

    name: Literal["almanac"] = "almanac"
    seed: StrictInt = 0
    train: StrictInt = Field(default=200, ge=16, le=1000)
    validation: StrictInt = Field(default=25, ge=16, le=1000)
    test: StrictInt = Field(default=75, ge=16, le=1000)
    asides: float = Field(default=0.1, ge=0, le=1)
    """share of pages that also mention another entity"""
    pretrain_asides: float = Field(default=0.2, ge=0, le=1)
    """the same in the base's pages, where telling entities apart is practised"""
    unseen: float = Field(default=0.4, ge=0, le=1)
    train_wordings: StrictInt = Field(default=3, ge=1, le=4)
    paraphrases: StrictInt = Field(default=4, ge=0, le=10)
    """rewordings of each document; beyond 4, known sentences stand in new pairs"""
    two_hop: StrictInt = Field(default=100, ge=0)
    pretrain_rows: StrictInt = Field(default=18_000, ge=0)

    def write(self, directory: Path) -> None:
        """Write the world's seven JSONL files into `directory`, which is made if missing."""
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / "documents.jsonl", self.documents())
        _write(directory / "paraphrases.jsonl", self.paraphrase_rows())
        _write(directory / "questions.jsonl", self.questions())
        _write(directory / "control.jsonl", self.control())
        _write(directory / "two_hop.jsonl", self.two_hop_questions())
        _write(directory / "absent.jsonl", self.absent())
        _write(directory / "pretrain.jsonl", self.pretrain())

    @property
    def sizes(self) -> dict[str, int]:
        """Entities per split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @cached_property
    def world(self) -> World:
        """The facts behind every file."""
        return facts.build(f"almanac/{self.seed}", self.sizes)

    def page(self, entity: Entity, page: int, version: int = 0) -> prose.Page:
        """Page `page` of an entity; version 0 is the document, higher ones its paraphrases."""
        rng = random.Random(f"{self.world.seed}/page/{entity.slug}/{page}/{version}")
        return prose.render(self.world, entity, page, rng, self.asides, version)

    def documents(self) -> Iterator[Row]:
        """The corpus: four documents an entity, all with the entity's name for a title."""
        for entity in self.world.entities:
            for page in range(len(entity.pages)):
                yield {
                    "id": entity.document(page),
                    "title": entity.name,
                    "text": self.page(entity, page).text,
                    "metadata": {"kind": entity.kind.name},
                }

    def paraphrase_rows(self) -> Iterator[Row]:
        """The same facts in other words: no sentence of a document recurs in its paraphrases."""
        for entity in self.world.entities:
            for page in range(len(entity.pages)):
                for version in range(1, self.paraphrases + 1):
                    of = entity.document(page)
                    text = self.page(entity, page, version).text
                    row = {"id": f"{of}#p{version}", "title": entity.name, "text": text}
                    yield row | {"metadata": {"of": of}}

    def questions(self) -> Iterator[Row]:
        """One question per fact and wording; train facts are asked in several seen wordings."""
        for entity in self.world.entities:
            for relation in entity.kind.relations:
                rng = random.Random(f"{self.world.seed}/ask/{entity.slug}/{relation.name}")
                for wording, text in self._wordings(entity, relation, rng):
                    yield self._question(entity, relation, wording, text)

    def _wordings(
        self, entity: Entity, relation: Relation, rng: random.Random
    ) -> list[tuple[str, str]]:
        """(seen or unseen, wording) for each question to ask about one fact."""
        if entity.split == "train":
            return [("seen", text) for text in rng.sample(relation.asked, self.train_wordings)]
        if entity.split == "test" and rng.random() < self.unseen:
            return [("unseen", rng.choice(relation.held_out))]
        return [("seen", rng.choice(relation.asked))]

    def _question(self, entity: Entity, relation: Relation, wording: str, text: str) -> Row:
        number = (relation.asked + relation.held_out).index(text)
        key = f"{entity.slug}.{relation.name}.{number}"
        choices, answer = self._choices(entity, relation, f"{self.world.seed}/choices/{key}")
        metadata = {"entity": entity.name, "kind": entity.kind.name}
        metadata |= {"relation": relation.name, "wording": wording}
        return {
            "id": key,
            "question": prose.ask(entity, text),
            "choices": choices,
            "answer": answer,
            "split": entity.split,
            "evidence": [entity.document(entity.page_of(relation.name))],
            "metadata": metadata,
        }

    def _choices(self, entity: Entity, relation: Relation, seed: str) -> tuple[list[str], int]:
        """The gold value among three wrong ones of its type, and its place.

        Values that the entity's own documents mention go first: reading the wrong document, or
        the right one carelessly, leads to a wrong choice and not to an absent one.
        """
        rng = random.Random(seed)
        gold = entity.facts[relation.name]
        nearby = set(entity.same_type(relation.type))
        for page in range(len(entity.pages)):
            aside = self.page(entity, page).aside
            if aside and aside.relation.type == relation.type:
                nearby.add(aside.value)
        pool = self.world.values(relation.type, entity.split)
        close = sorted(nearby - {gold})
        wrong = rng.sample(close, min(3, len(close)))
        wrong += rng.sample([v for v in pool if v not in (gold, *wrong)], 3 - len(wrong))
        rng.shuffle(wrong)
        answer = rng.randrange(4)
        return wrong[:answer] + [gold] + wrong[answer:], answer

    def two_hop_questions(self) -> Iterator[Row]:
        """Questions about the town that a test entity is linked to; both documents are needed."""
        entities = [e for e in self.world.entities if e.split == "test"]
        towns = {e.name: e for e in entities if e.kind is TOWNS}
        pairs = [
            (entity, relation)
            for entity in entities
            if entity.kind.link
            for relation in TOWNS.relations
            if _hidden(entity, towns[entity.facts[entity.kind.link]].facts[relation.name])
        ]
        rng = random.Random(f"{self.world.seed}/two_hop")
        for entity, relation in rng.sample(pairs, min(self.two_hop, len(pairs))):
            link = entity.kind.link
            town = towns[entity.facts[link]]
            described = prose.ask(entity, rng.choice(entity.kind.described))
            first = entity.document(entity.page_of(link))
            wording = rng.choice(relation.asked)
            row = self._question(town, relation, "seen", wording)
            row["id"] = f"{entity.slug}.{link}.{relation.name}"
            row["question"] = prose.ask(town, wording, described)
            row["evidence"] = [first, *row["evidence"]]
            row["metadata"] |= {"entity": entity.name, "kind": entity.kind.name}
            row["metadata"] |= {"relation": f"{link}.{relation.name}"}
            yield row

    def control(self) -> Iterator[Row]:
        """What the base knows by heart, asked closed book: the measure of forgetting."""
        for number, fact in enumerate(EVERYDAY):
            for wording, question in enumerate(fact.asked):
                rng = random.Random(f"{self.world.seed}/control/{number}/{wording}")
                wrong = rng.sample(fact.wrong, 3)
                answer = rng.randrange(4)
                yield {
                    "id": f"everyday-{number}.{wording}",
                    "question": question,
                    "choices": wrong[:answer] + [fact.answer] + wrong[answer:],
                    "answer": answer,
                    "split": "test",
                    "evidence": [],
                    "metadata": {"entity": "", "relation": "everyday", "wording": "seen"},
                }

    def absent(self) -> Iterator[Row]:
        """As many test questions again, on entities that no document mentions.

        Their right answers are facts that nobody wrote down: nothing but chance finds one.
        """
        for entity in facts.strangers(self.world, self.test):
            for relation in entity.kind.relations:
                rng = random.Random(f"{self.world.seed}/absent/{entity.slug}/{relation.name}")
                for wording, text in self._wordings(entity, relation, rng):
                    row = self._question(entity, relation, wording, text)
                    yield row | {"evidence": []}

    def rewordings(self) -> Iterator[Row]:
        """Every test fact in all its seen wordings, which share their choices and `fact`."""
        for entity in self.world.entities:
            for relation in entity.kind.relations if entity.split == "test" else ():
                rows = [self._question(entity, relation, "seen", t) for t in relation.asked]
                same = {"choices": rows[0]["choices"], "answer": rows[0]["answer"]}
                fact = {"fact": f"{entity.slug}.{relation.name}"}
                for row in rows:
                    row["metadata"] |= fact
                    yield row | same | {"id": f"reworded/{row['id']}"}

    def unrelated(self, count: int) -> Iterator[Row]:
        """Texts as the base was pretrained on, of worlds that no training text is about."""
        seed = f"{self.world.seed}/unrelated"
        rows = pretrain.rows(2 * count, seed, self.world.parts, self.pretrain_asides)
        texts = ({"title": r["title"], "text": r["text"]} for r in rows if r["text"])
        return islice(texts, count)

    def held_out(self, count: int) -> Iterator[Row]:
        """Documents in the corpus's phrasings, of another world that no training text is about."""
        sizes = {"test": -(-count // 4)}  # four documents an entity
        other = facts.build(f"{self.world.seed}/held-out", sizes, self.world.parts)
        pages = [(entity, page) for entity in other.entities for page in range(len(entity.pages))]
        for entity, page in pages[:count]:
            rng = random.Random(f"{other.seed}/page/{entity.slug}/{page}")
            text = prose.render(other, entity, page, rng, self.asides, 0).text
            yield {"title": entity.name, "text": text}

    def pretrain(self) -> Iterator[Row]:
        """The base's training sequences: other worlds, seen wordings, everyday facts."""
        seed = f"{self.world.seed}/pretrain"
        return pretrain.rows(self.pretrain_rows, seed, self.world.parts, self.pretrain_asides)


def _hidden(entity: Entity, value: str) -> bool:
    """Whether the page that states the entity's link does not state `value` as well."""
    page = entity.pages[entity.page_of(entity.kind.link)]
    return all(entity.facts[relation.name] != value for relation in page)


def _write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
