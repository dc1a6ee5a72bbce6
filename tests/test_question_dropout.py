"""Questions that lose words on their way to a retriever in training, and only there."""

from pathlib import Path

import pytest
import torch

from rag2.evaluation.questions import load_questions
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.rag import Rag
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk

pytestmark = pytest.mark.usefixtures("seed")


def test_the_retriever_misses_words_of_a_question_while_it_trains_and_nothing_else_does(
    home: Path,
    chunks: list[Chunk],
    encoder: DualEncoder,
    generator: Generator,
    monkeypatch: pytest.MonkeyPatch,
):
    asked = load_questions(home / "data" / "questions.jsonl")[:8]
    questions, answers = [q.question for q in asked], [q.gold for q in asked]
    chunks_BK = [[chunks[b], chunks[b + 1]] for b in range(8)]
    rag = Rag(encoder, generator, Prompt(), question_dropout=0.5).train()
    heard: list[str] = []
    encode = encoder.encode_questions
    monkeypatch.setattr(
        encoder, "encode_questions", lambda texts: heard.extend(texts) or encode(texts)
    )
    for step in range(10):
        rag.draw = (0, step)
        rag.scores(questions, chunks_BK)
    words = [(text.split(), questions[i % 8].split()) for i, text in enumerate(heard)]
    for kept, whole in words:
        rest = iter(whole)
        assert kept and all(word in rest for word in kept)  # some of them, in their order
    share = sum(len(kept) for kept, _ in words) / sum(len(whole) for _, whole in words)
    assert 0.3 < share < 0.7 and len(set(heard)) > 40
    read = rag.pairs(questions, answers, chunks_BK)  # what the generator reads

    heard.clear()
    rag.draw = (0, 0)
    for b in reversed(range(8)):  # parts of a batch, in any order, miss the same words
        rag.scores(questions[b : b + 1], chunks_BK[b : b + 1])
    assert heard[::-1] == [" ".join(kept) for kept, _ in words[:8]]

    heard.clear()
    rag.eval().scores(questions, chunks_BK)
    assert heard == questions
    assert read == rag.pairs(questions, answers, chunks_BK)


@pytest.mark.parametrize(("half", "dropout"), [("generator", 0.0), ("retriever", 0.5)])
def test_a_frozen_retriever_hears_whole_questions(home: Path, recipe, half: str, dropout: float):
    joint = recipe("train/joint.py")
    inputs = {"generator": str(home / "generator"), "retriever": str(home / "retriever")}
    cfg = joint.JointConfig(**inputs, train=[half], question_dropout=0.5)
    rag, _ = joint.load(cfg, torch.device("cpu"))
    assert rag.question_dropout == dropout
