"""The Factbook world, on an edition of twelve invented countries that the tests write."""

import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rag2.registry import UserError
from rag2.worlds import factbook_editions as editions
from rag2.worlds.factbook import Factbook
from rag2.worlds.factbook_fields import answer, fields, key, mentions, number
from small_factbook import HELD, NAMES, rows, write_editions

FUNCTION_WORDS = {"the", "and", "for", "from", "with", "per", "not", "but", "under"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two editions as folders of country files, with fresh numbers."""
    seed = random.randrange(10**6)
    print(f"seed={seed}")  # noqa: T201
    root = tmp_path_factory.mktemp("factbook")
    write_editions(root, random.Random(seed), ["2021-01-01", "2024-01-25"])
    return root


def written(path: Path, out: Path, **settings: Any) -> Path:
    Factbook(path=str(path), pretrain_rows=400, **(HELD | settings)).write(out)
    return out


@pytest.fixture(scope="module")
def world(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(folder, tmp_path_factory.mktemp("world"))


def dateless(question: str) -> str:
    """The base is asked for the same fact in an earlier year."""
    return re.sub(r"\b\d{4}\b", "", question)


def stems(text: str) -> set[str]:
    return {word[:5] for word in re.findall(r"[a-z]{3,}", text.lower())} - FUNCTION_WORDS


def test_sixty_fields_have_four_wordings_without_a_word_of_the_field() -> None:
    assert len(fields()) >= 60
    for field in fields():
        wordings = field.seen + field.unseen
        assert (len(field.seen), len(field.unseen)) == (3, 1)
        for wording in wordings:
            assert wording.count("{country}") == 1 and wording.endswith("?")
            shared = stems(wording.replace("{country}", "")) & stems(field.name)
            assert not shared, f"{wording!r} says {shared} of {field.name!r}"
    asked = Counter(w for field in fields() for w in field.seen + field.unseen)
    assert max(asked.values()) == 1, "a wording stands for two fields"


def test_a_wording_names_the_year_of_its_field() -> None:
    for field in fields():
        assert all(
            (field.year in w) if field.year else not re.search(r"\d{4}", w)
            for w in field.seen + field.unseen
        )


def test_neither_place_nor_size_gives_the_answer_away(world: Path) -> None:
    places, ranks = Counter(), Counter()
    for row in rows(world, "questions"):
        places[row["answer"]] += 1
        sizes = [number(choice) for choice in row["choices"]]
        gold = sizes[row["answer"]]
        if gold is not None:
            ranks[sum(size < gold for size in sizes if size is not None)] += 1
    for counts in (places, ranks):
        assert sorted(counts) == [0, 1, 2, 3] and counts.total() > 40
        assert max(counts.values()) < 0.55 * counts.total(), counts


def test_evidence_states_the_answer_and_none_of_the_wrong_choices(world: Path) -> None:
    texts = {row["id"]: row["text"] for row in rows(world, "documents")}
    questions = rows(world, "questions")
    assert len(questions) > 40
    for row in questions:
        gold, text = row["choices"][row["answer"]], texts[row["evidence"][0]]
        assert mentions(text, gold)
        assert len({key(choice) for choice in row["choices"]}) == 4
        assert not any(mentions(text, c) for c in row["choices"] if c != gold)
    assert "note: in Belk it is " in texts["ar/people-and-society/median-age"]  # no choice there


def test_held_out_countries_are_asked_only_for_facts_that_changed(
    world: Path, folder: Path
) -> None:
    old = editions.read(folder, "2021-01-01")
    entities: dict[str, set[str]] = {}
    for row in rows(world, "questions"):
        entities.setdefault(row["split"], set()).add(row["metadata"]["entity"])
        if row["split"] != "train":
            text = "\n".join(old[row["id"].split("/")[0]].facts.values())
            assert not mentions(text, row["choices"][row["answer"]])
    assert {split: len(names) for split, names in entities.items()} == {
        "test": 3,
        "validation": 2,
        "train": 7,
    }
    assert len(set.union(*entities.values())) == 12


@pytest.mark.parametrize("held_out", ["drawn", "last"])
def test_held_out_wordings_appear_in_test_questions_only(
    folder: Path, tmp_path: Path, seed: int, held_out: Any
) -> None:
    world = written(folder, tmp_path, seed=seed, held_out=held_out)
    unseen = {
        dateless(wording.replace("{country}", name))
        for field in Factbook(path="", seed=seed, held_out=held_out).fields
        for wording in field.unseen
        for name in NAMES
    }
    seen_in_test = 0
    for row in rows(world, "questions"):
        unheard = dateless(row["question"]) in unseen
        assert unheard == (row["metadata"]["wording"] == "unseen")
        assert not unheard or row["split"] == "test"
        seen_in_test += row["split"] == "test" and not unheard
    assert seen_in_test
    practised = {q for row in rows(world, "pretrain") for q, _ in row["qa"]}
    assert any("in 2019?" in question for question in practised)
    assert not unseen & {dateless(question) for question in practised}


def test_which_wording_is_held_out_is_drawn_by_field_and_seed(seed: int) -> None:
    last = fields()
    drawn = Factbook(path="", seed=seed).fields
    assert drawn == Factbook(path="", seed=seed).fields != Factbook(path="", seed=seed + 1).fields
    assert Factbook(path="", seed=seed, held_out="last").fields == last
    places = Counter()
    for field, whole in zip(drawn, last, strict=True):
        ask = whole.seen + whole.unseen
        assert sorted(field.seen + field.unseen) == sorted(ask)
        places[ask.index(field.unseen[0])] += 1
    assert sorted(places) == [0, 1, 2, 3]


def test_the_base_reads_the_older_edition_and_practises_on_training_countries(
    world: Path,
) -> None:
    held = {r["metadata"]["entity"] for r in rows(world, "questions") if r["split"] != "train"}
    sequences = rows(world, "pretrain")
    assert len(sequences) == 400
    assert not any("2024" in row["text"] + str(row["qa"]) for row in sequences)
    asked = [question for row in sequences for question, _ in row["qa"]]
    assert not any(re.search(rf"\b{name}\b", question) for question in asked for name in held)
    reading = [row for row in sequences if row["text"] and row["qa"]]
    copied = [row for row in reading if all(mentions(row["text"], a) for _, a in row["qa"])]
    assert 0.7 < len(copied) / len(reading) < 1  # the others show a document that does not help
    assert any(not row["text"] for row in sequences)


def test_control_facts_are_the_same_in_both_editions(world: Path, folder: Path) -> None:
    old, new = (editions.read(folder, e) for e in ("2021-01-01", "2024-01-25"))
    control = rows(world, "control")
    assert control
    for row in control:
        code = row["id"].split("/")[1]
        gold = row["choices"][row["answer"]]
        for edition in (old, new):
            assert any(mentions(text, gold) for text in edition[code].facts.values())


def test_one_seed_writes_the_same_bytes_and_another_does_not(
    folder: Path, world: Path, tmp_path: Path
) -> None:
    again, other = written(folder, tmp_path / "a"), written(folder, tmp_path / "b", seed=1)
    for name in ("documents", "questions", "control", "pretrain"):
        assert (again / f"{name}.jsonl").read_bytes() == (world / f"{name}.jsonl").read_bytes()
    assert rows(other, "questions") != rows(world, "questions")


def test_facts_a_line_and_country_files_make_the_same_world(
    folder: Path, world: Path, tmp_path: Path
) -> None:
    for edition in ("2021-01-01", "2024-01-25"):
        with gzip.open(tmp_path / f"{edition}.jsonl.gz", "wt", encoding="utf-8") as file:
            for country in editions.read(folder, edition).values():
                for path, text in country.facts.items():
                    row = {"file": f"europe/{country.code}.json", "country": country.name}
                    file.write(json.dumps(row | {"path": path, "text": text}) + "\n")
    out = written(tmp_path, tmp_path / "out")
    for name in ("documents", "questions", "pretrain"):
        assert rows(out, name) == rows(world, name)


def test_a_document_is_one_field_without_markup_or_repeated_labels(world: Path) -> None:
    documents = {row["id"]: row for row in rows(world, "documents")}
    assert not any(re.search(r"<\w|&\w+;", row["text"]) for row in documents.values())
    assert (
        documents["ar/government/capital"]["text"] == "Capital\nname: Arvo City\nnote: note - 2024"
    )
    land = documents["ar/geography/land-use"]
    assert land["title"] == "Arvo"
    assert land["text"] == "Land use\nagricultural land: arable land: 3.9% (2018 est.)"


def test_a_long_entry_ends_with_a_sentence(world: Path) -> None:
    documents = {row["id"]: row["text"] for row in rows(world, "documents")}
    text = documents["be/introduction/background"].split("\n")[1]
    assert text.endswith("a town.") and 30 < len(text.split()) <= 60
    assert editions.shorten("one two three four", 3) == "one two three"
    assert editions.shorten("one two", 2) == "one two"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("28.5 years (2020 est.)", "28.5 years"),
        ("45.99% (male 12/female 13)", "45.99%"),
        ("-0.2 migrant(s)/1,000 population (2023 est.)", "-0.2 migrant(s)/1,000 population"),
        ("$1.9 billion (2019 est.) / $1.8 billion (2018 est.)", "$1.9 billion"),
        ("King X (since 1999); note - he rules", "King X"),
        ("$9 billion note: data are in current dollars", "$9 billion"),
        ("Ambassador (vacant); Charge d'Affaires Y", ""),
        ("NA", ""),
        ("none (2014 est.)", ""),
        ("a list of rather more words than anybody would call short", ""),
    ],
)
def test_an_answer_is_the_short_value_that_a_fact_begins_with(text: str, value: str) -> None:
    assert answer(text) == value


def test_values_are_compared_as_displayed_and_as_quantities() -> None:
    assert number("-$1.5 billion") == -1.5e9
    assert number("approximately 2,000 personnel") == 2000
    assert number("President 3") is None
    assert mentions("rate: 4.1 (2020)", "4.1") and not mentions("rate: 14.1, 4.12, 4.1%", "4.1")


def test_a_damaged_edition_is_one_clear_line(tmp_path: Path) -> None:
    edition, read = tmp_path / "2021.jsonl", lambda: editions.read(tmp_path, "2021")
    for damage in ("{", "[1]", '{"file": "a"}', ""):
        edition.write_text(damage, encoding="utf-8")
        with pytest.raises(UserError, match="2021") as error:
            read()
        assert "\n" not in str(error.value)
    edition.with_suffix(".jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="cannot be read"):
        read()


def test_missing_input_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    many: dict[str, Any] = HELD | {"test_countries": 10}
    cases = {
        "no such folder": Factbook(path=str(tmp_path / "nowhere")),
        "edition '2024-01-25' not found": Factbook(path=str(tmp_path)),
        "there are: 2021-01-01, 2024-01-25": Factbook(path=str(folder), newer="2024-01-26"),
        "min_values=80": Factbook(path=str(folder)),
        "leave none to train on": Factbook(path=str(folder), **many),
    }
    for words, world in cases.items():
        with pytest.raises(UserError) as error:
            world.write(tmp_path / "out")
        assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
