"""Real input: the World Factbook, whose newer edition holds what a base of the older cannot know.

The corpus is the newer edition, one document per country, section and field. Countries are split,
so that no answer can be learned from training questions; test questions ask held-out countries
for facts that changed between the editions. People's wordings avoid the words of the field.
With one edition as both, test questions ask for any fact; what later ones say is in
rag2.worlds.factbook_revisions.
"""

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field as Setting
from pydantic import StrictInt

from rag2.config import Config
from rag2.registry import UserError
from rag2.worlds import factbook_editions as editions
from rag2.worlds import factbook_pretrain as pretrain
from rag2.worlds.factbook_editions import Country, FactPath, Page
from rag2.worlds.factbook_facts import Fact, Row, in_turn, question, wrong
from rag2.worlds.factbook_fields import Field, fields, key, mentions, number

log = logging.getLogger(__name__)
SPLITS = ("test", "validation", "train")
FEWEST = 8  # distinct values: the gold one, three wrong ones, and some that the evidence states


class Factbook(Config):
    """The World Factbook in two dated editions below `path`; sizes count questions and rows."""

    name: Literal["factbook"] = "factbook"
    seed: StrictInt = 0
    path: str
    """folder with the editions: DATE.jsonl.gz, DATE.jsonl or DATE/<region>/<code>.json"""
    older: str = "2021-01-01"
    """edition that the base is pretrained on"""
    newer: str = "2024-01-25"
    """edition that the knowledge base holds; the same one: test questions ask for any fact"""
    countries: StrictInt = Setting(default=160, ge=6)
    """countries of the corpus and the questions: those with the most facts that changed"""
    entry_words: StrictInt = Setting(default=60, ge=10)
    """words kept of one entry of a document, cut at the end of a sentence"""
    test_countries: StrictInt = Setting(default=50, ge=1)
    validation_countries: StrictInt = Setting(default=20, ge=1)
    test: StrictInt = Setting(default=1000, ge=1)
    validation: StrictInt = Setting(default=250, ge=1)
    train: StrictInt = Setting(default=8000, ge=1)
    control: StrictInt = Setting(default=150, ge=0)
    unseen: float = Setting(default=0.5, ge=0, le=1)
    """share of test questions in wordings that training never uses"""
    held_out: Literal["drawn", "last"] = "drawn"
    """which wording of a field those are: one drawn by `seed`, or the last, mostly the remotest"""
    min_values: StrictInt = Setting(default=80, ge=4)
    """countries that must have a short value of a field, for it to be asked about"""
    min_distinct: float = Setting(default=0.35, ge=0, le=1)
    """share of those values that must be distinct"""
    neighbors: StrictInt = Setting(default=40, ge=3)
    """wrong numbers are drawn from this many next smaller and next larger ones"""
    pretrain_rows: StrictInt = Setting(default=30_000, ge=0)

    def write(self, directory: Path) -> None:
        """Write the world's four JSONL files into `directory`, which is made if missing.

        Raises UserError for a missing folder or edition, or for editions that are too small.
        """
        assert self.split  # reads both editions: a user's mistake shows before a file is made
        rows = {
            "documents.jsonl": self.documents(),
            "questions.jsonl": self.questions(),
            "control.jsonl": self.control_questions(),
            "pretrain.jsonl": self.pretrain(),
        }
        directory.mkdir(parents=True, exist_ok=True)
        for name, stream in rows.items():
            log.info("%s: %d rows", name, _write(directory / name, stream))

    @cached_property
    def old(self) -> dict[str, Country]:
        """The countries of the older edition by code."""
        if self.older == self.newer:
            return self.new
        return editions.read(Path(self.path), self.older)

    @cached_property
    def new(self) -> dict[str, Country]:
        """The countries of the newer edition by code."""
        return editions.read(Path(self.path), self.newer)

    @cached_property
    def pages(self) -> dict[str, list[Page]]:
        """The newer edition's documents by country."""
        pairs = {code: editions.pages(c, self.entry_words) for code, c in self.new.items()}
        log.info("%d entries cut to %d words", sum(c for _, c in pairs.values()), self.entry_words)
        return {code: found for code, (found, _) in pairs.items()}

    @cached_property
    def stated(self) -> dict[tuple[str, FactPath], Page]:
        """Which document states a fact, by country code and path."""
        every = ((code, page) for code, found in self.pages.items() for page in found)
        return {(code, path): page for code, page in every for path in page.paths}

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """The fields that questions ask for, one wording of each held out for test."""
        return fields(draw=f"factbook/{self.seed}/wordings" if self.held_out == "drawn" else "")

    @cached_property
    def facts(self) -> dict[Field, list[Fact]]:
        """The facts of every field that enough countries have, with distinct enough values."""
        found = {field: self.facts_of(field) for field in self.fields}
        good = {}
        for field, facts in found.items():
            distinct = len({key(fact.value) for fact in facts})
            needed = max(FEWEST, self.min_distinct * len(facts))
            if len(facts) >= self.min_values and distinct >= needed:
                good[field] = facts
            else:
                log.info("not asked: %s (%d values, %d distinct)", field.name, len(facts), distinct)
        if not good:
            raise UserError(
                f"no field of edition {self.newer!r} has min_values={self.min_values} short values"
            )
        return good

    @cached_property
    def corpus(self) -> list[str]:
        """The codes of the countries that documents and questions are about."""
        changes = Counter(
            f.country.code for facts in self.facts.values() for f in facts if f.changed
        )
        return sorted(code for code, _ in changes.most_common(self.countries))

    @cached_property
    def split(self) -> dict[str, str]:
        """The split of every country, by code; the base may practise on all of train."""
        codes, needed = list(self.corpus), self.test_countries + self.validation_countries
        if len(codes) <= needed:
            raise UserError(
                f"test_countries + validation_countries = {needed} leave none to train on: "
                f"only {len(codes)} countries have facts that changed"
            )
        self.rng("split").shuffle(codes)
        held = dict.fromkeys(codes[: self.test_countries], "test")
        held |= dict.fromkeys(codes[self.test_countries : needed], "validation")
        return {code: held.get(code, "train") for code in self.new}

    def facts_of(self, field: Field) -> list[Fact]:
        """A field's facts; those that the documents do not state in full are left out."""
        found = []
        for code, country in self.new.items():
            path = self._place(field, country)
            value = field.answer(country.facts.get(path, ""))
            page = self.stated.get((code, path))
            if value and page and mentions(page.text, value):
                before = self.old[code].facts.get(field.was, "") if code in self.old else ""
                same = bool(before) and _states(before, value, field)
                changed = self.older == self.newer or (bool(before) and not same)
                found.append(Fact(country, field, value, page, changed, same))
        return found

    def documents(self, codes: Iterable[str] | None = None) -> Iterator[Row]:
        """The newer edition on these countries (None: the corpus's), titled by country."""
        for code in self.corpus if codes is None else codes:
            for page in self.pages.get(code, ()):
                metadata = {"code": code}
                yield {"id": page.id, "title": page.title, "text": page.text, "metadata": metadata}

    def questions(self) -> Iterator[Row]:
        """Questions of all splits; validation and test ask only for facts that changed."""
        for split in SPLITS:
            rng = self.rng(split)
            for fact in self._sample(split, rng):
                wording = self.wording(rng) if split == "test" else "seen"
                others = wrong(fact, self.facts[fact.field], self.neighbors, rng)
                yield question(fact, split, wording, others, rng)

    def control_questions(self) -> Iterator[Row]:
        """Facts that stayed the same, of training countries: what the base knows by heart."""
        rng = self.rng("control")
        facts = [f for field in fields("control") for f in self.facts_of(field)]
        known = [f for f in facts if f.same and self.split[f.country.code] == "train"]
        pools = {field: self.facts_of(field) for field in fields("control")}
        for fact in rng.sample(known, min(self.control, len(known))):
            others = wrong(fact, pools[fact.field], self.neighbors, rng)
            row = question(fact, "test", "seen", others, rng)
            yield row | {"id": f"control/{row['id']}", "evidence": []}

    def pretrain(self) -> Iterator[Row]:
        """The base's training sequences, all of the older edition."""
        kept = {code: editions.pages(c, self.entry_words)[0] for code, c in self.old.items()}
        practised = {code for code in kept if self.split.get(code) == "train"}
        rng = self.rng("pretrain")
        return pretrain.rows(self.pretrain_rows, self.old, kept, practised, self.fields, rng)

    def _place(self, field: Field, country: Country) -> FactPath:
        """Where the newer edition keeps a field: as the only one, it may do so as the older did.

        A wording that names a year asks the older edition for another one.
        """
        moved = self.older == self.newer and field.path not in country.facts
        return field.was if moved and not (field.shared or field.year) else field.path

    def _sample(self, split: str, rng: random.Random) -> list[Fact]:
        """As many facts as the split asks for, the fields taken in turn."""
        stacks, codes = [], {code for code in self.corpus if self.split[code] == split}
        for facts in self.facts.values():
            kept = [f for f in facts if f.country.code in codes]
            stacks.append([f for f in kept if f.changed or split == "train"])
            rng.shuffle(stacks[-1])
        rng.shuffle(stacks)
        return in_turn(stacks)[: getattr(self, split)]

    def wording(self, rng: random.Random) -> str:
        """Whether a test question is asked in a `seen` or an `unseen` wording."""
        return "unseen" if rng.random() < self.unseen else "seen"

    def rng(self, purpose: str) -> random.Random:
        """The draws for one purpose, those of the seed."""
        return random.Random(f"factbook/{self.seed}/{purpose}")


def _states(text: str, value: str, field: Field) -> bool:
    """Whether the older text gives the value, as displayed or as the same number."""
    if mentions(text, value):
        return True
    size = number(value)
    return size is not None and size == number(field.answer(text))


def _write(path: Path, rows: Iterable[Row]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
