"""Open questions: the text generated, its EM and F1, the choice of K, the whole command."""

import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rag2 import cli
from rag2.evaluation import open_questions, squad, stats
from rag2.evaluation.open_questions import Writer, choose
from rag2.generator import generate as module
from rag2.generator import past
from rag2.generator.choices import score_choices
from rag2.generator.generate import generate
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.types import Chunk, Question
from small_models import WORDS, build, small_tokenizer

# --- exact match and F1 ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The  Cat!", ["cat"], True, 1.0),
        ("U.S.", ["us"], True, 1.0),
        ("an 11-year war", ["11year war"], True, 1.0),
        ("theatre", ["atre"], False, 0.0),  # an article is a word, not a beginning
        ("dog", ["cat", "a dog"], True, 1.0),
        ("the black cat sat", ["cat"], False, 2 * (1 / 3) / (1 / 3 + 1)),
        ("cat cat", ["cat"], False, 2 * 0.5 / 1.5),  # a bag of words, not a set
        ("cat dog", ["cat", "cat dog bird"], False, 2 * (2 / 3) / (1 + 2 / 3)),
        ("", ["cat"], False, 0.0),
        ("the", ["a"], True, 0.0),  # nothing is left of both: so says the official script of v1.1
        ("caf\u00e9 \u2014", ["cafe"], False, 0.0),  # only ASCII punctuation goes
    ],
)
def test_exact_match_and_f1_of_answers_computed_by_hand(prediction, answers, exact, f1):
    assert squad.exact_match(prediction, answers) is exact
    assert squad.f1(prediction, answers) == pytest.approx(f1)


def test_f1_is_symmetric_bounded_and_blind_to_what_is_normalised_away(dice: random.Random):
    pool = ["cat", "Cat", "the", "a", "dog,", "U.S.", "1,000", "\u00fcber", "sat"]
    for _ in range(300):
        a, b, c = (" ".join(dice.choices(pool, k=dice.randint(1, 5))) for _ in range(3))
        f1 = squad.f1(a, [b])
        assert 0 <= f1 <= 1 and f1 == squad.f1(b, [a])
        assert f1 <= squad.f1(a, [b, c]) == max(f1, squad.f1(a, [c]))
        noisy = f"  the {a.upper()} {dice.choice(string.punctuation)}"
        assert squad.normalize(noisy) == squad.normalize(a) and squad.f1(noisy, [b]) == f1
        if squad.normalize(a):
            assert squad.f1(a, [a]) == 1 and squad.exact_match(a, [a])
            assert squad.exact_match(a, [b]) <= (f1 == 1)


# --- generation -----------------------------------------------------------------------------------


def some_contexts(dice: random.Random, count: int = 9) -> list[str]:
    return [
        f"{' '.join(dice.choices(WORDS, k=dice.randint(1, 25)))}\nAnswer:" for _ in range(count)
    ]


def by_hand(model: Any, tokenizer: Any, context: str, most: int) -> str:
    """Greedy, one unpadded sequence, everything read anew for each token."""
    ids = tokenizer.encode(context)
    length = len(ids)
    with torch.no_grad():
        while len(ids) < length + most and "\n" not in tokenizer.decode(ids[length:]):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in (tokenizer.eos_token_id, model.config.eos_token_id):
                break
    text = tokenizer.decode(ids[length:], skip_special_tokens=True)
    return text.partition("\n")[0].strip()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "sliding_mistral"])
def test_the_text_is_the_greedy_one_whatever_the_batch(tmp_path, seed, dice, family):
    tokenizer = small_tokenizer()
    model = build(family, tmp_path, tokenizer)
    contexts = some_contexts(dice)
    expected = [by_hand(model, tokenizer, context, 8) for context in contexts]
    for batch_tokens in (1, 100, 8192):
        assert generate(model, tokenizer, contexts, 8, batch_tokens) == expected
    assert len(set(expected)) > 3  # else equal texts would say little


def test_padding_that_is_seen_would_be_noticed(tmp_path, seed, dice, monkeypatch):
    tokenizer = small_tokenizer()
    model = build("llama", tmp_path, tokenizer)
    contexts = some_contexts(dice, 20)
    alone = generate(model, tokenizer, contexts, 8, batch_tokens=1)
    honest = past.pad

    def blind(ids, device):
        ids_RL, mask_RL = honest(ids, device)
        return ids_RL, torch.ones_like(mask_RL)

    monkeypatch.setattr(past, "pad", blind)
    # Rows end at their last token all the same: only what the padding does to them is planted.
    lengths = {len(tokenizer.encode(context)) for context in contexts}
    assert len(lengths) > 1 and generate(model, tokenizer, contexts, 8) != alone


@pytest.mark.parametrize("end", ["\n", " \n\n", "</s>", "\nQuestion: next?"])
def test_a_text_ends_with_its_line_or_with_the_end_of_text(
    generator: Generator, tokenizer, dice: random.Random, monkeypatch, end: str
):
    """Rows of different length leave the batch one by one, and the others go on undisturbed."""
    wanted = [" ".join(dice.choices(["Ola", "Nora", "42"], k=k)) for k in (3, 1, 5, 2)]
    scripts = [tokenizer.encode(text + end, add_special_tokens=False) for text in wanted]

    class Scripted:
        def __init__(self, model: Any) -> None:
            self.step = 0

        def add(self, contexts: Any) -> None:
            # Contexts come longest first, as they are batched.
            self.rows = sorted(range(4), key=lambda row: -row)

        @property
        def logits_RV(self) -> torch.Tensor:
            tokens = torch.tensor([scripts[row][self.step] for row in self.rows])
            return torch.nn.functional.one_hot(tokens, len(tokenizer)).float()

        def go_on(self, rows: list[int], tokens: list[int]) -> None:
            assert tokens == [scripts[self.rows[row]][self.step] for row in rows]
            self.rows, self.step = [self.rows[row] for row in rows], self.step + 1

    monkeypatch.setattr(module, "running", Scripted)
    contexts = ["Who?" + " more" * row for row in range(4)]
    assert generate(generator.model, tokenizer, contexts, 40) == wanted
    short = generate(generator.model, tokenizer, contexts, 1)
    assert short == [tokenizer.decode(script[:1]).strip() for script in scripts]


def test_a_context_without_room_for_its_answer_is_told_by_the_questions_name(generator, tokenizer):
    context = "Who? " * 400
    taken = len(tokenizer.encode(context))
    with pytest.raises(UserError) as caught:
        generate(generator.model, tokenizer, ["Who?", context], 13, names=["q1", "q2"])
    assert str(caught.value) == (
        f"question 'q2': a prompt of {taken} tokens and 13 of the answer, the generator has "
        "positions for 512: with passages, a prompt budget of 500 or less drops some; else take "
        "fewer worked examples or shorten the question"
    )
    with pytest.raises(UserError, match=r"question 'q9': .* a prompt budget of 5\d\d or less"):
        score_choices(generator.model, tokenizer, [context], [[" yes", " no"]], names=["q9"])
    with pytest.raises(UserError, match=r"question '.*Who\? Who\? ': a prompt of"):
        score_choices(generator.model, tokenizer, [context], [[" yes", " no"]])


# --- the choice of K ------------------------------------------------------------------------------


def scripted_writer(generator: Generator, texts: dict[tuple[int, ...], str]) -> Writer:
    """A writer that already knows what it will say to `Who?` after each list of chunks."""
    by_id = {n: Chunk(n, "d", f"chunk {n}") for n in range(9)}
    writer = Writer(generator, Prompt(), by_id, {}, 8)
    for ids, text in texts.items():
        (context,), _ = writer.contexts([Question("q", "Who?", answers=("x",))], [ids])
        writer.known[context] = text
    return writer


def test_k_is_the_one_with_the_highest_f1_and_of_equals_the_smallest(generator: Generator):
    texts = {(): "no", (4,): "Ola Nora", (4, 2): "Ola", (4, 2, 7): "the Ola"}
    questions = [Question("q", "Who?", answers=("Ola",), split="validation")]
    writer = scripted_writer(generator, texts)
    chosen = choose(writer, questions, [[4, 2, 7]], [3, 2, 1, 0])
    assert (chosen.k, chosen.validation_f1) == (2, 1.0)
    assert choose(writer, questions, [[4, 2, 7]], [0, 1]).k == 1
    assert choose(writer, [Question("q", "Who?", answers=("?",))], [[4, 2, 7]], [3, 1]).k == 1


def test_the_best_chunk_stands_nearest_the_question_and_what_has_no_room_is_counted(
    generator: Generator,
):
    asked = [Question("q", "Who?", answers=("x",))]
    writer = Writer(generator, Prompt(), {n: Chunk(n, "d", f"chunk {n}") for n in (1, 2, 3)}, {}, 4)
    (context,), dropped = writer.contexts(asked, [[3, 1, 2]])
    assert context == "chunk 2\n\nchunk 1\n\nchunk 3\n\nQuestion: Who?\nAnswer:"
    assert dropped == [0]
    budget = len(generator.tokenizer.encode("chunk 3\n\nQuestion: Who?\nAnswer:"))
    writer.prompt = Prompt(budget=budget)
    (context,), dropped = writer.contexts(asked, [[3, 1, 2]])
    assert context == "chunk 3\n\nQuestion: Who?\nAnswer:" and dropped == [2]


def test_answers_do_not_depend_on_how_many_are_asked_at_once(generator, seed, dice, monkeypatch):
    asked = [Question(f"q{i}", text, answers=("x",)) for i, text in enumerate(some_contexts(dice))]
    ids = [[0]] * len(asked)
    runs = []
    for at_once in (1, 4, 256):
        monkeypatch.setattr(open_questions, "AT_ONCE", at_once)
        ticks: list[int] = []
        runs.append(scripted_writer(generator, {}).answer(asked, ids, ticks.append))
        assert sum(ticks) == len(asked)
    assert runs[0] == runs[1] == runs[2]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def asked(home: Path, tmp_path: Path) -> Path:
    """Open questions over the small world; what the generator says to `o2` is right."""
    with KnowledgeBase(home / "data" / "kb.sqlite") as kb:
        chunks = kb.chunks()
    rows = [
        {
            "id": f"o{i}",
            "question": f"Who is {' '.join(chunk.text.split()[:4])}?",
            "answers": [chunk.text.split()[-1], "Nobody"],
            "split": ("train", "validation", "test")[i % 3],
            "evidence": [chunk.document],
        }
        for i, chunk in enumerate(chunks[:24])
    ]
    generator = Generator.load(home / "generator")
    shown = Question("o0", rows[0]["question"], answers=tuple(rows[0]["answers"]))
    tokenizer, header = generator.tokenizer, Prompt().header("", [shown])
    context = Prompt().context(rows[2]["question"], [], tokenizer, header=header).text
    rows[2]["answers"] = generate(generator.model, tokenizer, [context], 6)
    return write(tmp_path, rows)


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "open.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sampled(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def words(home: Path, asked: Path, *more: str) -> list[str]:
    kb = f"kb={home / 'data' / 'kb.sqlite'}"
    given = [f"generator={home / 'generator'}", f"questions={asked}", kb, "max_new_tokens=6"]
    return ["eval", "open", *given, *more]


@pytest.mark.parametrize("retriever", ["bm25", "gold", "dense"])
def test_both_arms_are_compared_and_every_number_follows_from_the_samples(
    home: Path, asked: Path, tmp_path: Path, recipe: Callable[[str], ModuleType], retriever: str
):
    out = tmp_path / "out"
    where = str(home / "retriever") if retriever == "dense" else retriever
    with pytest.raises(SystemExit) as caught:
        cli.main(words(home, asked, f"retriever={where}", "ks=[1,2]", f"out={out}", "shots=1"))
    assert caught.value.code == 0
    results = json.loads((out / "results.json").read_text())
    name = f"{retriever}_rag"
    assert results["format"] == "rag2.results/1" and list(results["arms"]) == ["base", name]
    samples = {arm: sampled(out / f"samples_{arm}.jsonl") for arm in results["arms"]}
    for arm, rows in samples.items():
        told = results["arms"][arm]
        assert len(rows) == results["n"] == 8 and {row["doc"]["split"] for row in rows} == {"test"}
        for row in rows:
            (text,) = row["filtered_resps"]
            assert row["resps"] == [[text]] and "\n" not in text
            assert row["f1"] == squad.f1(text, row["doc"]["answers"])
            assert len(row["retrieved"]) == told["k"]
            assert row["arguments"]["gen_args_0"]["arg_1"]["until"] == ["\n"]
        exact = [bool(row["exact_match"]) for row in rows]
        assert told["accuracy"] == told["exact_match"] == sum(exact) / 8
        assert told["ci95"] == pytest.approx(stats.wilson(sum(exact), 8), rel=1e-5)
        assert told["f1"] == pytest.approx(sum(row["f1"] for row in rows) / 8, rel=1e-5)
        assert told["f1_ci95"][0] <= told["f1"] <= told["f1_ci95"][1]
    assert samples["base"][0]["exact_match"] == 1
    hashes = [[row["prompt_hash"] for row in rows] for rows in samples.values()]
    assert hashes[0] == hashes[1]
    (test,) = results["paired"]
    assert (test["a"], test["b"]) == (name, "base") and {"mcnemar_p", "f1_ci95"} <= set(test)
    assert results["k_selection"]["chosen"] == (
        {} if retriever == "gold" else {name: results["arms"][name]["k"]}
    )
    assert results["arms"][name]["recall_at_1"] is not None
    if retriever == "gold":
        assert results["arms"][name]["recall_at_1"] == 1
    assert f"| {name} | {retriever} |" in (out / "report.md").read_text()


def test_without_a_knowledge_base_there_is_the_closed_book_alone(
    home: Path, asked: Path, tmp_path: Path
):
    with pytest.raises(SystemExit, match="0"):
        cli.main(words(home, asked, "kb=null", f"out={tmp_path / 'out'}"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["arms"]) == ["base"] and results["paired"] == []


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["ks=[0,5000]"], "ks=[0, 5000]: each is from 0 to the"),
        (["ks=[-1]"], "ks=[-1]: each is from 0"),
        (["prompt.format=letters"], "open questions have no choices"),
        (["retreiver=gold"], "retriever"),
        (["retriever=nowhere/at/all/x"], "nowhere/at/all/x"),
        (["split=tests"], "Did you mean 'test'?"),
        (["shots=9"], "has only 8 worked examples"),
        (["prompt.budget=3"], "prompt.budget=3 tokens: question 'o2' alone takes"),
        (["max_new_tokens=510"], "question 'o2': a prompt of"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    home: Path, asked: Path, tmp_path: Path, capsys, more: list[str], says: str
):
    with pytest.raises(SystemExit) as caught:
        cli.main(words(home, asked, *more, f"out={tmp_path / 'out'}"))
    error = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and error[-1].startswith("error: ") and says in error[-1]
    assert sum(line.startswith("error: ") for line in error) == 1
    assert not (tmp_path / "out").exists()


def test_a_question_longer_than_the_model_is_named_with_the_remedy(
    home: Path, asked: Path, tmp_path: Path, capsys
):
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    rows[5]["question"] = "Who? " * 400
    for budget, says in (
        (2048, "positions for 512: with passages, a prompt budget of 507 or less"),
        (507, "prompt.budget=507 tokens: question 'o5' alone takes"),
    ):
        line = words(home, write(tmp_path, rows), f"prompt.budget={budget}", "kb=null")
        with pytest.raises(SystemExit, match="2"):
            cli.main([*line, f"out={tmp_path / 'out'}"])
        error = capsys.readouterr().err.splitlines()[-1]
        assert "question 'o5'" in error and says in error
        assert not (tmp_path / "out").exists()


def test_questions_with_choices_belong_elsewhere(home: Path, tmp_path: Path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(words(home, home / "data" / "questions.jsonl", f"out={tmp_path / 'out'}"))
    assert "answered by rag2 eval mc" in capsys.readouterr().err
