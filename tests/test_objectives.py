"""What each objective makes of a corpus and questions: prompts, chunks, and where the loss is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rag2.evaluation.questions import load_questions, split
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.kb.lexical import BM25
from rag2.registry import UserError
from rag2.retrieval import gold_chunks
from rag2.training.instruction import ASKED, Instruction
from rag2.training.lessons import Given, Validation
from rag2.training.mixed import Mixed
from rag2.training.objectives import Supervised, Unsupervised
from rag2.training.raft import Raft
from rag2.types import Chunk, Question
from small_runs import Load, log, start
from texts import write_jsonl


@pytest.fixture
def given(home: Path, chunks: list[Chunk]) -> Given:
    questions = split(load_questions(home / "data" / "questions.jsonl"), "train")
    return Given(questions[:200], chunks)


def shown(given: Given, **changes: Any) -> list[tuple[Question, list[Chunk]]]:
    return list(Raft(**changes).shown(given, seed=5))


def test_raft_shows_the_gold_chunk_to_its_share_of_the_questions(given: Given):
    gold = gold_chunks(given.questions, given.chunks)
    for share in (0.0, 0.8, 1.0):
        has = [
            any(chunk.id in gold[question.id] for chunk in chosen)
            for question, chosen in shown(given, p_oracle=share)
        ]
        assert len(has) == 200 and abs(sum(has) / 200 - share) < 0.11  # 4 standard deviations
    for question, chosen in shown(given, p_oracle=1.0):
        assert sum(chunk.id in gold[question.id] for chunk in chosen) == 1
        assert len({chunk.id for chunk in chosen}) == 4


def test_the_distractors_of_raft_are_the_first_of_bm25_in_a_seeded_order(given: Given):
    gold, bm25 = gold_chunks(given.questions, given.chunks), BM25(given.chunks)
    places = []
    for question, chosen in shown(given, passages=3, p_oracle=1.0)[:50]:
        _, ids_QK = bm25.search([question.question], 10)
        wrong = [i for i in ids_QK[0].tolist() if i not in gold[question.id]]
        ids = [chunk.id for chunk in chosen]
        assert {i for i in ids if i not in gold[question.id]} == set(wrong[:2])
        places.append(next(n for n, i in enumerate(ids) if i in gold[question.id]))
    assert set(places) == {0, 1, 2}  # where it stands says nothing
    assert shown(given) == shown(given) != list(Raft().shown(given, seed=6))
    one = shown(given, passages=1, p_oracle=0.5)
    right = [chosen[0].id in gold[question.id] for question, chosen in one]
    assert {len(chosen) for _, chosen in one} == {1} and 60 < sum(right) < 140


def test_raft_learns_the_answer_behind_the_prompt_of_the_product(
    given: Given, generator: Generator
):
    question, chosen = shown(given, passages=2)[0]
    lessons = Raft(passages=2).prepare(given, generator, 5)
    passages = [chunk.passage for chunk in chosen]
    text = Prompt().context(question.question, passages, generator.tokenizer).text
    assert all(passage in text for passage in passages)
    expected = nll(generator, text, f" {question.gold}")
    torch.testing.assert_close(lessons.nll([0]), expected)


def nll(generator: Generator, context: str, answer: str) -> torch.Tensor:
    """The mean of -log p of the answer's tokens, by transformers."""
    ids = torch.tensor([generator.tokenizer(context + answer)["input_ids"]])
    labels = ids.clone()
    labels[:, : len(generator.tokenizer(context)["input_ids"])] = -100
    return generator.model(input_ids=ids, labels=labels).loss


def test_raft_says_what_it_lacks(given: Given, generator: Generator, caplog):
    bare = [Question(q.id, q.question, q.choices, q.answer) for q in given.questions]
    with pytest.raises(UserError, match="no question names a gold_chunk or evidence of the corpus"):
        Raft().prepare(Given(bare, given.chunks), generator, 0)
    some = [*given.questions[:3], *bare[3:5]]
    assert len(shown(Given(some, given.chunks))) == 3
    assert "leaves out 2 questions without evidence" in caplog.text
    count = len(given.chunks)
    with pytest.raises(UserError, match=f"passages={count}: the corpus has {count} chunks, up to"):
        shown(given, passages=count)
    with pytest.raises(UserError, match=r"passages=60: \d+ of them do not fit .* 1024 tokens"):
        Raft(passages=60).prepare(given, generator, 0)


def test_instructions_ask_for_a_passage_by_its_title_and_learn_its_text(
    given: Given, generator: Generator
):
    told = Given(chunks=given.chunks[:8], paraphrases=given.chunks[30:34])
    lessons = Instruction().prepare(told, generator, 5)
    assert len(lessons.tokens_N) == 12
    used = set()
    for place, row in enumerate(told.passages):
        texts = [f"Question: {asked.format(title=row.title)}\nAnswer:" for asked in ASKED]
        with torch.no_grad():
            losses = [float(nll(generator, text, f" {row.text}")) for text in texts]
            far = [abs(float(lessons.nll([place])) - loss) for loss in losses]
        assert min(far) < 1e-5
        used.add(int(np.argmin(far)))
    assert len(used) > 3


def test_instructions_need_titles_and_room(given: Given, generator: Generator):
    bare = Given(chunks=[*given.chunks[:2], Chunk(7, "notes.txt", "Some words.")])
    with pytest.raises(UserError, match=r"one of document 'notes.txt' has none; .*unsupervised"):
        Instruction().prepare(bare, generator, 0)
    long = Given(chunks=[Chunk(7, "d", "wax " * 600, "Lasur")])
    with pytest.raises(UserError, match="cut the documents into shorter chunks"):
        Instruction().prepare(long, generator, 0)


def test_mixed_reads_documents_rewordings_and_answered_questions_in_a_seeded_order(
    given: Given, generator: Generator
):
    few = Given(given.questions[:6], given.chunks[:5], given.chunks[20:23])
    tokenizer = generator.tokenizer
    told = [f"Question: {q.question}\nAnswer: {q.gold}" for q in few.questions]
    texts = [*(passage.passage for passage in few.passages), *told]
    marked = [tokenizer.bos_token + text + tokenizer.eos_token for text in texts]
    lengths = [len(ids) for ids in tokenizer(marked, add_special_tokens=False)["input_ids"]]

    orders = {}
    for seed in (1, 2):
        lessons = Mixed(block=100_000).prepare(few, generator, seed)
        assert lessons.tokens_N.tolist() == [sum(lengths) - 1]
        orders[seed] = read(Mixed(), few, generator, seed)
        assert sorted(orders[seed]) == sorted(texts)
    assert orders[1] != orders[2] and orders[1] == read(Mixed(), few, generator, 1)
    assert read(Unsupervised(), few, generator, 1) == texts[:8]  # in their own order, no question


def read(objective: Any, given: Given, generator: Generator, seed: int) -> list[str]:
    """The texts between the marks of what an objective makes the model read."""
    seen: list[torch.Tensor] = []
    hook = generator.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    lessons = objective.prepare(given, generator, seed)
    with hook, torch.no_grad():
        for row in range(len(lessons.tokens_N)):
            lessons.nll([row])
    tokenizer = generator.tokenizer
    line = tokenizer.decode(torch.cat([ids[0] for ids in seen]))  # padding is a bos here
    return line.replace(tokenizer.bos_token, "").split(tokenizer.eos_token)[:-1]


@pytest.mark.parametrize(
    "objective", [Unsupervised(block=64), Supervised(), Raft(), Instruction(), Mixed(block=64)]
)
def test_the_held_out_loss_is_the_mean_over_tokens_whatever_the_batch(
    objective: Any, given: Given, generator: Generator
):
    few = Given(given.questions[:7], given.chunks[:20])
    lessons = objective.prepare(few, generator, 1)
    norm = generator.model.model.norm
    generator.model.model.norm = torch.nn.Sequential(norm, torch.nn.Dropout(0.5)).train()
    generator.model.train()
    state = torch.get_rng_state()
    losses = [Validation(generator.model, lessons, n).measure("x")["x"] for n in (1, 3, 50)]
    assert torch.equal(torch.get_rng_state(), state) and generator.model.training
    assert max(losses) - min(losses) < 1e-5 * losses[0]
    generator.model.eval()
    parts = [float(lessons.nll([n]).detach()) for n in range(len(lessons.tokens_N))]
    assert losses[0] == pytest.approx(np.average(parts, weights=lessons.tokens_N), rel=1e-5)


def test_nothing_held_out_measures_nothing(generator: Generator):
    assert Validation(generator.model, None, 4).measure("x") == {}


@pytest.mark.parametrize("name", ["raft", "instruction", "mixed"])
def test_the_new_objectives_train(
    recipe: Load, home: Path, chunks: list[Chunk], tmp_path: Path, name: str
):
    given = {"objective": {"name": name}, "steps": 5, "validation": 8, "batch_size": 8}
    if name == "instruction":
        rows = [
            {"title": chunk.title, "text": chunk.text, "metadata": {"of": chunk.document}}
            for chunk in chunks[:8] * 2
        ]
        given["paraphrases"] = str(write_jsonl(tmp_path / "paraphrases.jsonl", rows))
    if name == "raft":
        given["objective"]["passages"] = 1
    start(recipe, "finetune", home, tmp_path / name, **given)
    rows = log(tmp_path / name)
    assert len(rows) == 5 and rows[-1]["validation_nll"] < rows[0]["validation_nll_before"]
    assert (tmp_path / name / "final/generator").is_dir()
