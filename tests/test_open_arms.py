"""Arms on open questions: what chooses K, what recall counts, who is ahead of whom."""

from collections.abc import Callable
from types import ModuleType

import pytest

from rag2.evaluation.open_questions import Answers, Writer
from rag2.evaluation.open_results import OpenResult, summarize
from rag2.generator.load import Generator, build_llama
from rag2.generator.prompt import Prompt
from rag2.retrieval import Random
from rag2.types import Chunk, Question
from small_models import small_tokenizer
from small_world import SHAPE


@pytest.fixture
def generator(seed: int) -> Generator:
    return build_llama(small_tokenizer(), **SHAPE, max_positions=128)


def ask(part: str) -> list[Question]:
    return [Question(f"{part}{i}", f"Who {part} {i}?", answers=("Ola",)) for i in range(6)]


def test_k_is_chosen_on_validation_questions_and_recall_counts_the_chunks_of_that_k(
    recipe: Callable[[str], ModuleType], generator: Generator, seed: int
):
    module = recipe("eval/open.py")
    parts = {"validation": (ask("now"), 3), "test": (ask("then"), 1)}
    retriever = Random(range(9), seed)
    writer = Writer(generator, Prompt(), {n: Chunk(n, "d", f"c{n}") for n in range(9)}, {}, 8)
    for questions, right in parts.values():  # the answer is known with so many chunks alone
        _, ids_QK = retriever.search(questions, 4)
        for k in range(5):
            contexts, _ = writer.contexts(questions, ids_QK[:, :k].tolist())
            writer.known |= dict.fromkeys(contexts, "Ola" if k == right else "Nora")
    test = parts["test"][0]
    _, ids_QK = retriever.search(test, 4)
    # The chunk that answers stands at ranks 0, 2, 2, 2, 3, 3.
    gold = {q.id: [int(row[r])] for q, row, r in zip(test, ids_QK, (0, 2, 2, 2, 3, 3), strict=True)}
    result = module.with_chunks(
        module.OpenConfig(), writer, retriever, test, parts["validation"][0], [4, 3, 2, 1, 0], gold,
        lambda *_: None,
    )  # fmt: skip
    assert (result.k, result.choice.k, result.choice.validation_f1) == (3, 3, 1.0)
    assert set(result.answers.texts) == {"Nora"}, "test would need one chunk"
    assert [[item.chunk for item in row] for row in result.retrieved] == ids_QK[:, :3].tolist()
    assert result.recall_at_1 == pytest.approx(1 / 6)
    assert result.recall_at_k == pytest.approx(4 / 6)


def test_both_differences_are_of_the_later_arm_over_the_earlier_one():
    asked = ask("then")[:4]
    texts = {"base": ("Ola", "Nora", "x", "x"), "bm25_rag": ("Ola Dahl", "Ola", "Ola", "Nora Ola")}
    results = [
        OpenResult(name=name, questions=tuple(asked), answers=Answers(said, (0, 0, 0, 0)))
        for name, said in texts.items()
    ]
    (test,) = summarize("made up", results, seed=0, environment={})["paired"]
    assert (test["a"], test["b"]) == ("bm25_rag", "base")
    assert (test["difference"], test["a_only"], test["b_only"]) == (0.25, 2, 1)
    # F1 is 2/3, 1, 1, 2/3 against 1, 0, 0, 0.
    assert test["f1_difference"] == pytest.approx((10 / 3 - 1) / 4, rel=1e-5)
    low, high = test["f1_ci95"]
    assert low <= test["f1_difference"] <= high
