"""Rewordings by a causal LM: what is drawn, what is kept through a kill, what is good enough."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rag2.generator.bpe import train_bpe
from rag2.generator.generate import Sampling, generate
from rag2.generator.learning import answer_logprob_rows
from rag2.generator.load import Generator, build_llama
from rag2.generator.pairs import encode_pairs
from rag2.kb.build import build
from rag2.kb.chunk import TokenChunker
from rag2.registry import UserError
from rag2.training import paraphrase
from rag2.training.paraphrase import TOO_LONG, Drafts, accepted, plan
from rag2.training.rewording import Filter, lower_words, names, numbers, similarity
from rag2.training.sequences import read_paraphrases
from rag2.types import Document
from small_runs import Load
from texts import write_jsonl

DOCUMENTS = {
    "a": "The ferry leaves Aldbrook at 7 and returns at noon. Karin Ols steers it.",
    "b": "Lasur Haven sells wax. A bridge of 12 arches was built in 1848.",
    "c": "Old Mats keeps 3 goats near Lillan. They give milk in May.",
}
WORDED = {
    "a": (
        "Karin Ols steers the boat that sails from Aldbrook at 7, to be back by noon.",
        "At 7 a ferry departs from Aldbrook with Karin Ols at the wheel, home again by noon.",
    ),
    "b": (
        "Wax is what Lasur Haven trades in; since 1848 it has had a bridge on 12 arches.",
        "Built in 1848, a bridge with 12 arches stands in Lasur Haven, where wax is sold.",
    ),
    "c": (
        "There are 3 goats near Lillan that belong to Old Mats, milked in May.",
        "In May milk comes from the goats, 3 of them, that Old Mats has near Lillan.",
    ),
}
PROMPT = "{text}\nAgain:"


# -- the filter ------------------------------------------------------------------------------------


def test_numbers_are_runs_of_digits_and_names_are_capitals_that_no_sentence_asks_for():
    found = numbers("In 1848, 12,000 of 3.5 at 7:30 on 1/5.")
    assert found == {
        "1848",
        "12,000",
        "3.5",
        "7:30",
        "1/5",
    }
    known = lower_words(["The old ferry sails. She is old, it is true."])
    assert {"old", "ferry", "true"} <= known and "The" not in known
    found = names(
        "Old Mats said: True, Aldbrook's ferry is I, Karin. Rye grows. It is St Ols.", known
    )
    assert found == {"Mats", "Aldbrook", "Karin", "Rye", "St", "Ols"}
    assert names("Ferry by Ferry", known) == {"Ferry"}  # inside the sentence it is one
    assert names("Zoé LIVES", set()) == {"Zoé", "LIVES"}


def test_texts_are_alike_by_their_runs_of_three_words():
    assert similarity("One two THREE four.", "one two three, four") == 1.0
    assert similarity("one two three four", "one two three five") == 0.5
    assert similarity("four three two one", "one two three four") == 0.0
    assert similarity("one", "two") == 0.0 and similarity("one", "One!") == 1.0


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (WORDED["a"][0], ""),
        ("", "too short"),
        ("Aldbrook 7 Karin Ols.", "too short"),
        (WORDED["a"][0] + WORDED["a"][1], "too long"),
        (DOCUMENTS["a"].upper(), "copy"),
        ("Karin Ols steers it. The ferry leaves Aldbrook at 7 and returns at noon.", "copy"),
        (WORDED["a"][1] + " Yes.", "copy"),  # of an earlier one
        (WORDED["a"][0].replace("7", "8"), "lost number"),
        (WORDED["a"][0].replace("7", "17"), "lost number"),
        (WORDED["a"][0].replace("Karin", "Nora"), "lost name"),
        (WORDED["a"][0].replace("Ols", "Olsen"), "lost name"),
        (WORDED["a"][0].replace("Aldbrook", "aldbrook"), "lost name"),
    ],
)
def test_a_rewording_is_rejected_for_the_first_thing_that_is_wrong(text: str, fault: str):
    known = lower_words(DOCUMENTS.values())
    assert Filter().fault(text, DOCUMENTS["a"], [WORDED["a"][1]], known) == fault


# -- drawing ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents, and a small model that has learned two rewordings of each by heart."""
    folder = tmp_path_factory.mktemp("world")
    rows = [{"id": id, "title": f"T {id}", "text": text} for id, text in DOCUMENTS.items()]
    write_jsonl(folder / "documents.jsonl", rows)
    build(folder / "kb.sqlite", [folder / "documents.jsonl"], TokenChunker())
    texts = [
        (PROMPT.replace("{text}", DOCUMENTS[id]), f" {text}\n")
        for id, worded in WORDED.items()
        for text in worded
    ]
    torch.manual_seed(0)
    tokenizer = train_bpe([context + text for context, text in texts] * 9, 420)
    shape: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 2, "intermediate": 96}
    generator = build_llama(tokenizer, **shape, max_positions=160)
    pairs = encode_pairs(tokenizer, texts)
    optimizer = torch.optim.AdamW(generator.model.parameters(), lr=5e-3)
    for _ in range(70):
        logp_RT, mask_RT = answer_logprob_rows(generator.model, pairs)
        optimizer.zero_grad()
        (-logp_RT.sum() / mask_RT.sum()).backward()
        optimizer.step()
    generator.save(folder / "generator")
    return folder


def run(recipe: Load, world: Path, out: Path, **changes: Any) -> dict[str, int]:
    module = recipe("train/paraphrase.py")
    given = {"kb": str(world / "kb.sqlite"), "generator": str(world / "generator")}
    given |= {"prompt": PROMPT, "count": 6, "batch_size": 4, "out": str(out)}
    return module.main(module.ParaphraseConfig(**given | changes))


@pytest.fixture(scope="module")
def whole(recipe: Load, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(recipe, world, out)
    return out


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".jsonl", ".json")}


def test_a_model_rewords_and_what_is_good_is_what_fine_tuning_reads(whole: Path):
    rows = read_paraphrases(whole / "paraphrases.jsonl", counted=True)
    counts = json.loads((whole / "paraphrase.json").read_text())
    assert counts["accepted"] == len(rows) >= 3
    assert counts["accepted"] + counts["rejected"] == 18 == 3 * 6
    assert counts["rejected"] == sum(counts["reasons"].values()) > 0
    assert counts["reasons"]["copy"] > 0  # two are known, six are drawn
    known = lower_words(DOCUMENTS.values())
    for row in rows:
        earlier = [r.text for r in rows if r.document == row.document and r.id < row.id]
        assert Filter().fault(row.text, DOCUMENTS[row.document], earlier, known) == ""
        assert row.title == f"T {row.document}"
    drafts = [json.loads(line) for line in (whole / "drafts.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in drafts}) == len(drafts) == 18
    assert {row["text"] for row in drafts} & {text for pair in WORDED.values() for text in pair}


def test_a_kill_in_the_middle_of_a_line_loses_nothing_and_doubles_nothing(
    recipe: Load, world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = (whole / "drafts.jsonl").read_bytes()
    ends = [n for n, byte in enumerate(data) if byte == ord("\n")]
    drawn: list[int] = []
    honest = paraphrase.generate

    def counting(model: Any, tokenizer: Any, contexts: Any, *rest: Any, **more: Any) -> list[str]:
        drawn.append(len(contexts))
        return honest(model, tokenizer, contexts, *rest, **more)

    monkeypatch.setattr(paraphrase, "generate", counting)
    cuts = {ends[3] + 1: 4, ends[5] + 30: 6, len(data) - 1: 17, len(data): 18}
    for cut, kept in cuts.items():
        out = tmp_path / str(cut)
        out.mkdir()
        (out / "drafts.jsonl").write_bytes(data[:cut])
        drawn.clear()
        run(recipe, world, out)
        assert sum(drawn) == 18 - kept and files(out) == files(whole)
    out = tmp_path / "zeros"
    out.mkdir()
    (out / "drafts.jsonl").write_bytes(data[: ends[2] + 1] + bytes(70))  # a power loss
    run(recipe, world, out)
    assert files(out) == files(whole)


def test_only_what_decides_a_text_makes_it_be_drawn_anew(
    recipe: Load, world: Path, whole: Path, tmp_path: Path
):
    out = tmp_path / "run"
    run(recipe, world, out, batch_size=7, count=3)  # the batch changes nothing
    mine, theirs = (Drafts(o / "drafts.jsonl").texts for o in (out, whole))
    assert len(mine) == 9 and mine.items() <= theirs.items()
    run(recipe, world, out, filter={"longest": 1.15})
    assert Drafts(out / "drafts.jsonl").texts == theirs
    few, many = (json.loads((o / "paraphrase.json").read_text())["accepted"] for o in (out, whole))
    assert 0 < few < many

    documents = [Document(id, text) for id, text in DOCUMENTS.items()]
    given: dict[str, Any] = {"prompt": PROMPT, "temperature": 0.8, "seed": 0, "fingerprint": "f"}
    keys = {draft.key for draft in plan(documents, 2, **given)}
    assert keys < {draft.key for draft in plan(documents, 3, **given)}
    other = {"prompt": f"{PROMPT} ", "temperature": 0.9, "seed": 1, "fingerprint": "g"}
    for key, value in other.items():
        assert not keys & {draft.key for draft in plan(documents, 2, **given | {key: value})}
    slot = Document("slot", "of wax", "The {text} slot")
    assert plan([slot], 1, "{title}: {text}", 0.8, 0, "f")[0].context == "The {text} slot: of wax"
    documents[0] = Document("a", WORDED["a"][0])
    assert len(keys & {draft.key for draft in plan(documents, 2, **given)}) == 4


def test_documents_without_room_and_foreign_files_are_told(
    recipe: Load, world: Path, tmp_path: Path
):
    documents = [Document("long", "wax " * 200), Document("a", DOCUMENTS["a"])]
    generator = Generator.load(world / "generator")
    drafts = plan(documents, 2, PROMPT, 0.8, 0, "f")
    done = Drafts(tmp_path / "drafts.jsonl")
    advanced: list[int] = []
    paraphrase.draw(generator, drafts, done, 0.8, 3, advanced.append)
    assert sum(advanced) == 4 and len(done.texts) == 2
    _, rejected = accepted(drafts, done, Filter())
    assert rejected[TOO_LONG] == 2
    (tmp_path / "drafts.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(UserError, match="drafts.jsonl:1: not a draft; delete the file"):
        Drafts(tmp_path / "drafts.jsonl")
    with pytest.raises(ValueError, match="must hold {text}"):
        recipe("train/paraphrase.py").ParaphraseConfig(prompt="Again:")


def test_when_nothing_is_good_the_line_says_why(recipe: Load, world: Path, tmp_path: Path):
    strict = {"shortest": 0.0, "longest": 0.01}
    with pytest.raises(
        UserError, match=r"0 accepted \+ 3 rejected = 3 \(3 too long\): no rewording"
    ):
        run(recipe, world, tmp_path / "run", count=1, filter=strict)
    assert not (tmp_path / "run/paraphrases.jsonl").exists()
    with paraphrase.alone(tmp_path / "run"), pytest.raises(UserError, match="another process is"):
        run(recipe, world, tmp_path / "run", count=1)


def test_tokens_are_drawn_from_the_softmax_whatever_the_batch(world: Path):
    generator = Generator.load(world / "generator")
    contexts = [PROMPT.replace("{text}", text)[:40] for text in DOCUMENTS.values()] * 40
    seeds = list(range(120))

    def draw(temperature: float, batch_tokens: int = 8192, **more: Any) -> list[str]:
        given = Sampling(temperature, more.get("seeds", seeds))
        return generate(
            generator.model, generator.tokenizer, contexts, 6, batch_tokens, sampling=given
        )

    assert draw(0.9) == draw(0.9, 300)
    assert draw(0.9) != draw(0.9, seeds=[seed + 1 for seed in seeds])
    greedy = generate(generator.model, generator.tokenizer, contexts, 6)
    assert draw(1e-4) == greedy != draw(0.9)


def test_how_often_a_token_is_drawn_is_its_probability():
    logits_RV = torch.tensor([[0.0, 1.0, -1.0, float("-inf"), 2.0]]).repeat(4000, 1)
    pick = Sampling(0.7, range(4000)).picker(range(4000), 3)
    counts = Counter(pick(range(4000), 2, logits_RV))
    chances = torch.softmax(logits_RV[0].double() / 0.7, -1).numpy()
    found = np.array([counts[token] / 4000 for token in range(5)])
    assert counts[3] == 0
    assert (np.abs(found - chances) <= 5 * np.sqrt(chances * (1 - chances) / 4000)).all()
