"""Worked examples before a question: the header, who is in it, and what the budget does to it."""

import pytest

from rag2.evaluation.shots import Shots
from rag2.generator.prompt import Prompt
from rag2.registry import UserError
from rag2.types import Question

POOL = [
    Question(f"{subject}{i}", f"Which is {i}?", ("no", str(i)), 1, metadata={"subject": subject})
    for subject in ("world_religions", "law")
    for i in range(4)
]
ASKED = Question("asked", "Which is 9?", ("9", "no"), 0, metadata={"subject": "world_religions"})
PROMPT = Prompt(format="letters", description="Questions about {subject}.\n\n")


def test_the_header_is_description_and_examples_with_their_letters_to_the_character():
    (header,) = Shots(count=2).headers([ASKED], POOL, PROMPT)
    assert header == (
        "Questions about world religions.\n\n"
        "Which is 0?\nA. no\nB. 0\nAnswer: B\n\n"
        "Which is 1?\nA. no\nB. 1\nAnswer: B\n\n"
    )


def test_the_cloze_header_holds_the_answers_text_and_open_questions_their_first_answer():
    pool = [POOL[0], Question("o", "Who?", answers=("Ola", "Nora"))]
    assert Prompt().header("", pool) == (
        "Question: Which is 0?\nAnswer: 0\n\nQuestion: Who?\nAnswer: Ola\n\n"
    )
    assert Prompt().header("law") == ""


def test_examples_are_of_the_questions_own_subject_and_never_the_question_itself():
    (header,) = Shots(count=3).headers([POOL[4]], POOL, PROMPT)
    assert "about law" in header and "Which is 0?" not in header and "Which is 3?" in header


def test_seeded_examples_depend_on_seed_and_question_alone():
    shots = Shots(count=2, sampler="seeded", seed=3)
    many = [Question(f"q{i}", "?", ("a", "b"), 0, metadata=ASKED.metadata) for i in range(20)]
    headers = shots.headers(many, POOL, PROMPT)
    assert len(set(headers)) > 1
    assert shots.headers(many[::-1], POOL, PROMPT) == headers[::-1]
    assert Shots(count=2, sampler="seeded", seed=4).headers(many, POOL, PROMPT) != headers


def test_too_few_examples_of_a_subject_are_refused():
    with pytest.raises(UserError, match="question 'asked' has only 4 worked examples of subject"):
        Shots(count=5).headers([ASKED], POOL, PROMPT)


def test_passages_stand_between_header_and_question_and_give_way_to_it(tokenizer):
    header = Prompt().header("", POOL[:1])
    whole = Prompt().context("Who?", ["best", "second"], tokenizer, header=header).text
    assert whole == f"{header}second\n\nbest\n\nQuestion: Who?\nAnswer:"
    bare = len(tokenizer.encode(f"{header}Question: Who?\nAnswer:"))
    kept = Prompt(budget=bare).context("Who?", ["best", "second"], tokenizer, header=header)
    assert (kept.text, kept.dropped) == (f"{header}Question: Who?\nAnswer:", 2)
    with pytest.raises(UserError, match=f"budget={bare - 1} tokens: .* alone takes {bare}"):
        Prompt(budget=bare - 1).context("Who?", [], tokenizer, header=header)
