"""What a later edition of the Factbook changes, on three editions of invented countries."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rag2 import pipeline, stages
from rag2.evaluation import moving, revision
from rag2.kb.lexical import BM25
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retrieval import Dense, Lexical
from rag2.retriever.encoder import DualEncoder
from rag2.types import Document, Question
from rag2.worlds.factbook import Factbook
from rag2.worlds.factbook_fields import key, mentions
from rag2.worlds.factbook_revisions import Later, revisions
from small_factbook import HELD, write_editions
from small_runs import Load
from small_sweeps import in_this_process
from small_world import start_models

DATES = ["2021-01-01", "2023-01-26", "2024-01-25"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three editions; the last says nothing of Belk's land and has a page on Belk's rivers."""
    seed = random.randrange(10**6)
    print(f"seed={seed}")  # noqa: T201
    root = tmp_path_factory.mktemp("factbook")
    write_editions(root, random.Random(seed), DATES)
    file = root / DATES[2] / "europe" / "be.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["Geography"] = {"Rivers": {"longest": {"text": "Belkwater"}}}
    file.write_text(json.dumps(facts), encoding="utf-8")
    return root


def world(folder: Path, **settings: Any) -> Factbook:
    # Of twelve countries six have a fact that stays.
    first = {"older": DATES[0], "newer": DATES[0], "pretrain_rows": 150, "test_countries": 7}
    return Factbook(path=str(folder), **(HELD | first | settings))


@pytest.fixture(scope="module")
def later(folder: Path) -> list[Later]:
    return list(revisions(world(folder), DATES[1:]))


def texts(folder: Path, edition: str) -> dict[str, str]:
    one = world(folder, older=edition, newer=edition)
    return {row["id"]: row["text"] for row in one.documents(world(folder).corpus)}


def test_each_edition_is_the_one_before_it_with_the_changes_made(
    folder: Path, later: list[Later]
) -> None:
    held = {row["id"]: row for row in world(folder).documents()}
    for news, edition in zip(later, DATES[1:], strict=True):
        assert news.edition == edition
        assert all(held.get(row["id"]) != row for row in news.documents)
        for id in news.removed:
            del held[id]
        held |= {row["id"]: row for row in news.documents}
        assert {id: row["text"] for id, row in held.items()} == texts(folder, edition)
    assert later[0].removed == [] and later[1].removed == ["be/geography/land-use"]
    assert "be/geography/rivers" in {row["id"] for row in later[1].documents}


def test_a_changed_fact_has_its_old_and_its_new_value_among_the_choices(
    folder: Path, later: list[Later]
) -> None:
    shown = [texts(folder, edition) for edition in DATES]
    test = {code for code, split in world(folder).split.items() if split == "test"}
    for old, new, news in zip(shown[:-1], shown[1:], later, strict=True):
        assert len(news.changed) > 15 and len(news.unchanged) >= 1
        for row in news.changed:
            page, stale = row["evidence"][0], row["choices"][row["metadata"]["stale"]]
            gold = row["choices"][row["answer"]]
            assert gold != stale and row["id"].split("/")[0] in test
            assert mentions(new[page], gold) and not mentions(new[page], stale)
            assert mentions(old[page], stale) and not mentions(old[page], gold)
            others = set(row["choices"]) - {gold, stale}
            assert len({key(choice) for choice in row["choices"]}) == 4 and len(others) == 2
            assert not any(mentions(text[page], o) for o in others for text in (old, new))
        for row in news.unchanged:
            page, gold = row["evidence"][0], row["choices"][row["answer"]]
            assert mentions(new[page], gold) and mentions(old[page], gold)
            assert "stale" not in row["metadata"]
        asked = [row["id"] for row in (*news.changed, *news.unchanged)]
        assert len(set(asked)) == len(asked)


def test_the_place_of_a_choice_does_not_tell_what_is_stale(later: list[Later]) -> None:
    places = Counter(r["metadata"]["stale"] for news in later for r in news.changed)
    assert len(places) == 4 and max(places.values()) < 0.6 * places.total()


def test_one_edition_asks_held_out_countries_for_any_fact(folder: Path) -> None:
    one = world(folder)
    asked = [row for row in one.questions() if row["split"] != "train"]
    said = texts(folder, DATES[0])
    assert {row["metadata"]["relation"] for row in asked} >= {"Birth rate", "Death rate"}
    assert all(mentions(said[r["evidence"][0]], r["choices"][r["answer"]]) for r in asked)
    assert not any("2019" in r["question"] for r in asked)  # a wording names another year
    assert "Unemployment rate 2021" not in {field.path[-1] for field in one.facts}


def test_a_mistaken_edition_or_too_few_changes_are_one_clear_line(folder: Path) -> None:
    cases = {
        "edition '2022' not found": ["2022"],
        "edition '2021-01-01' comes twice": [DATES[1], DATES[0]],
        "edition '2023-01-26' comes twice": [DATES[1], DATES[1]],
        r"edits=999: edition '2023-01-26' changes \d+ of the facts": [DATES[1]],
    }
    for words, names in cases.items():
        with pytest.raises(UserError, match=words) as error:
            revision.dated(revisions(world(folder), names), 999)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def home(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's knowledge base of the first edition, and random models."""
    home = tmp_path_factory.mktemp("home")
    inputs = pipeline.Inputs(world=world(folder), home=str(home), vocabulary=400)
    pipeline.ensure(inputs, {"data"})
    start_models(home, max_positions=1024)
    return home


def told(path: Path) -> dict[str, str]:
    with KnowledgeBase(path) as kb:
        return {document.id: document.text for document in kb.documents()}


@pytest.mark.parametrize("kind", ["dense", "words"])
def test_what_a_revision_brings_is_found_and_what_it_takes_is_not(
    home: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "kb.sqlite"
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        kb.copy(path)
        chunks, chunker = kb.chunks(), kb.chunker(home / "data" / "tokenizer")
    assert chunker is not None
    encoder = DualEncoder.load(home / "retriever").eval()
    retriever = Dense.over(encoder, chunks) if kind == "dense" else Lexical(BM25(chunks))
    gone = chunks[random.randrange(len(chunks))].document
    news = revision.Revision([Document("new", "zyx wvu", "zyx")], [], [], [gone])
    asked = [Question("q", "zyx wvu", ("a", "b"), 0), Question("r", chunks[0].text, ("a", "b"), 0)]
    with moving.opened(path, retriever) as base:
        before = base.retriever.search(asked, len(chunks))[1]
        np.testing.assert_array_equal(before, retriever.search(asked, len(chunks))[1])
        took = base.take_in(news, chunker)
        by_id = {chunk.id: chunk.document for chunk in base.chunks()}
        found = base.retriever.search(asked, len(by_id))[1]
        assert len(took.document_seconds) == (1 if kind == "dense" else 0)
        assert took.seconds >= sum(took.document_seconds) > 0 or kind == "words"
    names = [by_id[id] for id in found[0].tolist()]  # every id found is live
    assert gone not in names and "new" in names
    if kind == "words":
        assert names[0] == "new"
    assert told(path).keys() == told(home / "data" / "kb.sqlite").keys() - {gone} | {"new"}


LORA = {"lora": {"tuning": "lora", "steps": 2, "batch_size": 2}}


@pytest.mark.parametrize("tunings", [{}, pytest.param(LORA, marks=pytest.mark.slow)])
def test_editions_are_taken_in_one_after_the_other(
    recipe: Load,
    home: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tunings: dict[str, Any],
) -> None:
    module, ran, threads = recipe("eval/freshness.py"), list[str](), torch.get_num_threads()
    monkeypatch.setattr(stages, "run", in_this_process(ran))
    cfg = module.FreshnessConfig(
        kb=str(home / "data" / "kb.sqlite"),
        questions=str(home / "data" / "questions.jsonl"),
        generators={"base": str(home / "generator"), "ft": str(home / "generator")},
        retrievers={"warm": str(home / "retriever")},
        world=world(folder),
        arms=["ft", "frozen_rag", "bm25_rag"],
        tunings=tunings,
        editions=DATES[1:],
        edits=8,
        limit=1,
        ks=[2],
        out=str(tmp_path / "out"),
    )
    try:
        results = module.main(cfg)
    finally:
        torch.set_num_threads(threads)
    assert ran == [*tunings] * 2  # once on each edition
    for told_of, edition in zip(results["revisions"], DATES[1:], strict=True):
        assert told_of["name"] == edition
        assert (told_of["n"]["changed"], told_of["n"]["unchanged"]) == (8, 1)
        rows = {(row["arm"], row["done"]): row for row in told_of["rows"]}
        assert list(rows) == [
            *(("ft", "nothing"), ("frozen_rag", "nothing"), ("frozen_rag", "kb")),
            *(("bm25_rag", "nothing"), ("bm25_rag", "kb"), *(("ft", name) for name in tunings)),
        ]
        assert rows["frozen_rag", "kb"]["document_seconds"]["n"] == told_of["n"]["documents"]
        assert rows["bm25_rag", "kb"]["document_seconds"]["n"] == 0
        assert rows["bm25_rag", "kb"]["seconds"] > 0 and rows["bm25_rag", "kb"]["recall"]["n"] == 8
        assert rows["bm25_rag", "nothing"]["recall"] is None
        assert told(tmp_path / "out" / f"{edition}.sqlite") == texts(folder, edition)
    for name in ("frozen_rag", "bm25_rag"):
        assert told(tmp_path / "out" / f"kb-{name}.sqlite") == texts(folder, DATES[2])
    table = (tmp_path / "out" / "freshness.md").read_text()
    assert all(f"## {edition}" in table for edition in DATES[1:]) and "1 go;" in table
    assert (tmp_path / "out" / "freshness.png").stat().st_size


def test_editions_of_a_world_without_them_are_refused(recipe: Load, tmp_path: Path) -> None:
    module = recipe("eval/freshness.py")
    for settings, words in (
        ({"world": {"name": "almanac"}}, "world factbook alone has dated editions"),
        ({"world": {"name": "factbook", "path": "x"}, "updates": "d", "changed": "q"}, "one of"),
    ):
        cfg = module.FreshnessConfig(editions=["2023"], out=str(tmp_path / "out"), **settings)
        with pytest.raises(UserError, match=words):
            module.main(cfg)
