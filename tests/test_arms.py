"""What an arm's generator is asked besides: choices that take turns, choices without a context."""

from pathlib import Path

import numpy as np
import pytest

from made import Drawn
from rag2.evaluation import arms
from rag2.evaluation.arms import ARMS, Found, Reader
from rag2.evaluation.select import Choice
from rag2.generator.load import build_llama
from rag2.generator.prompt import Prompt
from rag2.systems import Parts
from rag2.types import Question
from small_models import by_hand, encode_pair, small_tokenizer
from small_world import SHAPE, roughen

ASKED = Question("q", "Which?", ("x", "y", "z"), 0)
CLOSED = Found(np.zeros((1, 0)), np.zeros((1, 0), dtype=np.int64))


def test_every_part_of_an_arm_is_that_of_its_own_stage(tmp_path: Path):
    parts, stages = Parts.of_home(tmp_path), ("base", "ft", "ft_paraphrase", "sft_closed", "sft")
    for stage in (*stages, "joint"):
        assert parts.generators[stage] == str(tmp_path / stage / "final" / "generator")
    for name, stage in (("warm", "retriever"), ("joint", "joint")):
        assert parts.retrievers[name] == str(tmp_path / stage / "final" / "retriever")
    read = {name: arm.generator for name, arm in ARMS.items() if arm.generator}
    assert read["sft"] == "sft_closed" and read["sft_rag"] == "sft"
    assert all(read[name] == name for name in ("base", "ft", "ft_paraphrase", "joint"))


def turns(reader: Drawn, ids: tuple[int, ...], p_TC: list[list[float]]) -> None:
    """Plant p(x), p(y), p(z) for every turn, in which the choices stand in another order."""
    for turn, p_C in enumerate(p_TC):
        name = f"q (rotated {turn})" if turn else "q"
        reader.known[name, ids] = np.log([*p_C[turn:], *p_C[:turn]]).tolist()


def test_turns_are_averaged_as_probabilities_and_not_as_their_logarithms(rng):
    reader = Drawn(rng)
    # Means .367, .350, .283; products .009, .0125, .008.
    turns(reader, (), [[0.9, 0.05, 0.05], [0.1, 0.5, 0.4], [0.1, 0.5, 0.4]])
    assert arms.debiased([ASKED], CLOSED, reader, Choice(0, 1.0, 0.0)).tolist() == [0]


@pytest.mark.parametrize("reading", ["marginal", "concat"])
@pytest.mark.parametrize("k", [1, 2])
def test_the_choices_of_an_arm_with_passages_take_turns_behind_its_passages(rng, k, reading):
    reader = Drawn(rng)
    turns(reader, (), [[0.8, 0.1, 0.1]] * 3)
    for ids in ((5,), (7,), (5, 7)):
        turns(reader, ids, [[0.1, 0.1, 0.8]] * 3)
    found = Found(np.zeros((1, 3)), np.array([[5, 7, 9]]))
    assert arms.debiased([ASKED], found, reader, Choice(k, 1.0, 0.0, reading)).tolist() == [2]


def test_without_a_context_the_choices_stand_behind_nothing_at_all(seed):
    generator = build_llama(small_tokenizer(), **SHAPE, max_positions=128)
    roughen(generator.model, 0.1)
    reader = Reader(generator, Prompt(description="Karin."), {}, headers={"q": "Answer.\n\n"})
    questions = [ASKED, Question("r", "Who?", ("the old mill", "Karin"), 1)]
    found_QC = reader.unconditional(questions)
    assert found_QC[1, 2] == -np.inf
    for row, question in zip(found_QC, questions, strict=True):
        pairs = [encode_pair(generator.tokenizer, "", f" {text}") for text in question.choices]
        expected = [sum(by_hand(generator.model, pair)) for pair in pairs]
        assert row[: len(expected)] == pytest.approx(expected, abs=1e-4)
