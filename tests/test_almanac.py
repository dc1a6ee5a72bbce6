"""The almanac: true, answerable by reading, not by matching words, and not known beforehand."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rag2.worlds.almanac import Almanac
from rag2.worlds.lore.everyday import EVERYDAY
from rag2.worlds.lore.facts import KINDS
from rag2.worlds.lore.prose import CONTRASTS, _phrasing
from rag2.worlds.lore.values import VALUES

SMALL: dict[str, Any] = {
    "train": 40,
    "validation": 16,
    "test": 40,
    "two_hop": 40,
    "pretrain_rows": 1500,
}
FILES = ("documents", "paraphrases", "questions", "control", "two_hop", "pretrain")
RELATIONS = [(kind, relation) for kind in KINDS for relation in kind.relations]
STOP = frozenset(
    "a an the and or of in on at to from by for with as off over into is are was were be been "
    "has have had do does did must can could would what which who when where how it its them his "
    "he she her their they there then that this one no not all only up out so if".split()
)


def stem(word):
    for ending in ("ing", "ed", "es", "s", "e", "ly", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def content(texts):
    words = re.findall(r"[a-z]+", re.sub(r"\{\w+\}('s)?", " ", " ".join(texts)).lower())
    return {stem(word) for word in words if word not in STOP}


def states(text, value):
    return re.search(rf"\b{re.escape(value)}\b", text, re.IGNORECASE) is not None


@pytest.fixture(scope="module")
def seed():
    seed = int.from_bytes(os.urandom(2), "big")
    print(f"seed={seed}")  # noqa: T201
    return seed


@pytest.fixture(scope="module")
def almanac(seed):
    return Almanac(seed=seed, **SMALL)


@pytest.fixture(scope="module")
def files(almanac, tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    almanac.write(directory)

    def rows(name):
        text = (directory / f"{name}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    return {name: rows(name) for name in FILES}


@pytest.fixture(scope="module")
def own_text(almanac):
    """Document id -> its sentences about the entity itself, without the aside."""
    texts = {}
    for entity in almanac.world.entities:
        for number in range(len(entity.pages)):
            page = almanac.page(entity, number)
            name = page.aside.about.name if page.aside else None
            kept = [s for s in page.text.split(". ") if name is None or name not in s]
            assert len(kept) == 2, page.text
            texts[entity.document(number)] = ". ".join(kept)
    return texts


@pytest.mark.parametrize("kind,relation", RELATIONS, ids=lambda x: x.name)
def test_questions_share_no_content_word_with_the_documents_that_answer_them(kind, relation):
    stated = content((*relation.stated, *kind.openings, *kind.nouns, *CONTRASTS))
    assert not stated & content(relation.asked + relation.held_out)


@pytest.mark.parametrize("kind,relation", RELATIONS, ids=lambda x: x.name)
def test_held_out_wordings_are_new_combinations_of_words_known_from_seen_ones(kind, relation):
    assert not set(relation.held_out) & set(relation.asked)
    assert content(relation.held_out) <= content(relation.asked)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_phrasing_contains_a_value_of_any_kind(kind):
    values = {value.lower() for values in VALUES.values() for value in values}
    phrasings = [*kind.openings, *CONTRASTS]
    phrasings += [text for r in kind.relations for text in (*r.stated, *r.asked, *r.held_out)]
    assert not values & set(re.findall(r"[a-z]+", " ".join(phrasings).lower()))


def test_every_relation_has_enough_phrasings_and_wordings():
    for kind in KINDS:
        assert len(kind.relations) == 8
        for relation in kind.relations:
            assert len(set(relation.stated)) == 5
            assert len(set(relation.asked)) == 4
            assert relation.held_out
            for text in relation.stated:
                assert re.search(r"\{[va]\}", text) and re.search(r"\{[XOP]\}", text), text
    words = [word for values in VALUES.values() for word in values]
    assert len(words) == len(set(words))


def test_the_evidence_states_the_gold_value_and_no_other_choice_about_the_entity(files, own_text):
    for row in files["questions"]:
        (evidence,) = row["evidence"]
        choices = row["choices"]
        assert len(set(choices)) == 4
        stated = [choice for choice in choices if states(own_text[evidence], choice)]
        assert stated == [choices[row["answer"]]], (row, own_text[evidence])
        assert row["metadata"]["entity"] in own_text[evidence]


def test_no_other_document_of_the_entity_states_the_gold_value(files, own_text):
    for row in files["questions"]:
        gold = row["choices"][row["answer"]]
        slug = row["evidence"][0].rpartition("-")[0]
        pages = [f"{slug}-{page}" for page in range(1, 5)]
        assert [page for page in pages if states(own_text[page], gold)] == row["evidence"]


def test_paraphrases_state_the_same_facts_and_repeat_no_sentence(files):
    documents = {row["id"]: row for row in files["documents"]}
    golds = {}
    for row in files["questions"]:
        golds.setdefault(row["evidence"][0], set()).add(row["choices"][row["answer"]])
    counts = Counter()
    for row in files["paraphrases"]:
        original = documents[row["metadata"]["of"]]
        counts[original["id"]] += 1
        assert row["title"] == original["title"] and row["title"] in row["text"]
        assert len(golds[original["id"]]) == 2
        assert all(states(row["text"], gold) for gold in golds[original["id"]])
        sentences = {s.rstrip(".") for s in original["text"].split(". ") if row["title"] in s}
        assert not sentences & {s.rstrip(".") for s in row["text"].split(". ")}
    assert set(counts.values()) == {4} and len(counts) == len(documents)


def test_ten_paraphrases_are_ten_texts_and_repeat_no_sentence_of_the_document(almanac, files):
    few = files["paraphrases"]
    many = list(almanac.model_copy(update={"paraphrases": 10}).paraphrase_rows())
    kept = [row for row in many if int(row["id"].rpartition("#p")[2]) <= 4]
    assert kept == few and len(many) == len(few) * 10 // 4
    documents = {row["id"]: row for row in files["documents"]}
    golds = {}
    for row in files["questions"]:
        golds.setdefault(row["evidence"][0], set()).add(row["choices"][row["answer"]])
    texts = {}
    for row in many:
        of = row["metadata"]["of"]
        texts.setdefault(of, []).append(row["text"])
        assert all(states(row["text"], gold) for gold in golds[of])
        own = {s.rstrip(".") for s in documents[of]["text"].split(". ") if row["title"] in s}
        assert not own & {s.rstrip(".") for s in row["text"].split(". ")}
    assert len(texts) == len(documents)
    assert all(len(set(found)) == 10 for found in texts.values())


def test_the_phrasings_of_a_page_are_paired_anew_in_every_version():
    for count in (3, 5):
        pairs = [
            [_phrasing(v, place, count) for place in (0, 1)] for v in range(1 + (count - 1) ** 2)
        ]
        assert pairs[0] == [0, 0] and all(0 not in pair for pair in pairs[1:])
        assert len({tuple(pair) for pair in pairs}) == len(pairs)
        assert pairs[1:count] == [[n, n] for n in range(1, count)]


def test_the_default_files_stay_as_they_were():
    world = Almanac(seed=0, train=16, validation=16, test=16, two_hop=8, pretrain_rows=50)
    digest = hashlib.sha256()
    for rows in (world.documents(), world.paraphrase_rows(), world.questions(), world.pretrain()):
        for row in rows:
            digest.update(json.dumps(row).encode())
    assert digest.hexdigest().startswith("64b187aca6eb680c")


def test_asides_are_true_and_compete_with_the_entitys_own_value(almanac):
    asides = 0
    for entity in almanac.world.entities:
        for number in range(len(entity.pages)):
            for version in range(5):
                page = almanac.page(entity, number, version)
                if page.aside is None:
                    continue
                asides += 1
                other, relation = page.aside.about, page.aside.relation
                assert other.kind is entity.kind and relation in entity.pages[number]
                assert states(page.text, other.facts[relation.name])
                assert other.facts[relation.name] not in entity.same_type(relation.type)
    pages = 4 * 5 * len(almanac.world.entities)
    assert abs(asides / pages - almanac.asides) < 0.06


def test_two_hop_answers_need_both_documents(files, own_text):
    assert len(files["two_hop"]) == 40
    for row in files["two_hop"]:
        first, second = row["evidence"]
        town = second.rpartition("-")[0]
        gold = row["choices"][row["answer"]]
        bridge = next(d["title"] for d in files["documents"] if d["id"] == second)
        assert states(own_text[first], bridge) and bridge not in row["question"]
        assert states(own_text[second], gold) and not states(own_text[first], gold)
        assert row["metadata"]["entity"] in own_text[first] and town != first.rpartition("-")[0]


def test_splits_share_no_entity_and_only_test_hears_unseen_wordings(files):
    entities, wordings = {}, {}
    for row in files["questions"]:
        entities.setdefault(row["split"], set()).add(row["metadata"]["entity"])
        wordings.setdefault(row["split"], Counter())[row["metadata"]["wording"]] += 1
    assert {split: len(names) for split, names in entities.items()} == {
        "train": 40,
        "validation": 16,
        "test": 40,
    }
    assert not entities["train"] & entities["test"]
    assert not entities["validation"] & (entities["train"] | entities["test"])
    assert wordings["train"] == {"seen": 40 * 8 * 3} and wordings["validation"] == {"seen": 128}
    assert 0.27 < wordings["test"]["unseen"] / 320 < 0.53


def test_held_out_wordings_occur_nowhere_before_the_test(files):
    held = [text for _, relation in RELATIONS for text in relation.held_out]
    slots = (re.escape(text).replace(r"\{x\}", ".+").replace(r"\{px\}", ".+") for text in held)
    pattern = re.compile("|".join(slots))
    early = [row["question"] for row in files["questions"] if row["split"] != "test"]
    early += [question for row in files["pretrain"] for question, _ in row["qa"]]
    assert not [question for question in early if pattern.fullmatch(question)]
    tested = [r for r in files["questions"] if r["metadata"]["wording"] == "unseen"]
    assert tested and all(pattern.fullmatch(row["question"]) for row in tested)


def test_pretraining_knows_no_name_of_the_world(almanac, files):
    parts = set(almanac.world.parts)
    names = {word for row in files["documents"] for word in row["title"].split()}
    assert parts & names
    for row in files["pretrain"]:
        words = set(re.findall(r"\w+", json.dumps(row)))
        assert not parts & words, row


def test_pretraining_mixes_reading_with_closed_book_and_plain_text(files):
    rows = files["pretrain"]
    known = {question for fact in EVERYDAY for question in fact.asked}
    reading = [r for r in rows if r["text"] and r["qa"]]
    answered = [r for r in reading if all(states(r["text"], gold) for _, gold in r["qa"])]
    heart = [r for r in rows if r["qa"] and r["qa"][0][0] in known]
    assert len(rows) == 1500
    assert 0.84 < len(reading) / 1500 < 0.94  # .89 expected, 6 standard deviations
    assert 0.76 < len(answered) / 1500 < 0.88  # .82 expected
    assert 0.015 < len(heart) / 1500 < 0.07 and not any(r["text"] for r in heart)


def test_control_asks_only_everyday_facts(files):
    facts = {question: fact.answer for fact in EVERYDAY for question in fact.asked}
    assert len(facts) == len(files["control"]) == 2 * len(EVERYDAY) == 120
    for row in files["control"]:
        assert len(set(row["choices"])) == 4
        assert row["choices"][row["answer"]] == facts[row["question"]]


def test_the_place_of_the_gold_choice_tells_nothing(files):
    places = Counter(row["answer"] for row in files["questions"])
    expected = len(files["questions"]) / 4
    chi2 = sum((places[place] - expected) ** 2 / expected for place in range(4))
    assert chi2 < 21.1, places  # p = 1e-4 with 3 degrees of freedom


def test_ids_are_unique_and_evidence_exists(files):
    documents = {row["id"] for row in files["documents"]}
    assert len(documents) == len(files["documents"])
    for name in ("questions", "two_hop", "control", "paraphrases"):
        ids = [row["id"] for row in files[name]]
        assert len(ids) == len(set(ids))
        assert all(set(row.get("evidence", ())) <= documents for row in files[name])


def test_a_larger_test_split_leaves_the_others_alone(almanac, files):
    larger = almanac.model_copy(update={"test": 60, "pretrain_rows": 10})
    titles = {row["metadata"]["entity"] for row in files["questions"] if row["split"] != "test"}
    before = [row for row in files["documents"] if row["title"] in titles]
    after = [row for row in larger.documents() if row["title"] in titles]
    assert before == after


def test_the_files_depend_on_the_seed_alone(seed, tmp_path):
    sizes = SMALL | {"pretrain_rows": 50}
    script = (
        "import sys; from pathlib import Path; from rag2.worlds.almanac import Almanac\n"
        f"Almanac(seed=int(sys.argv[1]), **{sizes}).write(Path(sys.argv[2]))"
    )
    for place, hash_seed, world_seed in (("a", "1", seed), ("b", "2", seed), ("c", "1", seed + 1)):
        command = [sys.executable, "-c", script, str(world_seed), str(tmp_path / place)]
        path = os.pathsep.join(sys.path)
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        subprocess.run(command, check=True, env=environment, timeout=60)

    def written(place):
        return {name: Path(tmp_path, place, f"{name}.jsonl").read_bytes() for name in FILES}

    assert written("a") == written("b")
    assert all(written("a")[name] != written("c")[name] for name in FILES)
