"""Operations of prompts and searches, by formula and by torch's own count of a real forward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rag2.evaluation import operations
from rag2.evaluation.workload import Cost
from rag2.generator.choices import encode_choices, score_choices
from rag2.generator.load import build_llama
from rag2.kb.lexical import BM25
from rag2.registry import lookup
from rag2.retrieval import Dense, Gold, Lexical, Random
from rag2.retriever.encoder import DualEncoder
from rag2.tuning.lora import LoRA
from rag2.types import Chunk, Question
from small_models import build, small_tokenizer
from small_world import SHAPE


def test_operations_of_two_prompts_that_share_a_beginning_counted_by_hand():
    cost = Cost(body=1000, head=100, width=10)
    pairs = [([1, 2, 3], [4, 5]), ([1, 2], [7])]
    # Inputs 1 2 3 4 and 1 2: tokens after 0, 1, 2, 3 and after 0, 1 others.
    attention = 4 * 10 * ((1 + 2 + 3 + 4) + (1 + 2))
    assert cost.in_full(pairs) == 6 * 2 * 1000 + attention + 6 * 2 * 100
    # Once: 1 2 3 4, with logits after 3, after 4 and after 2.
    assert cost.shared(pairs) == 4 * 2 * 1000 + 4 * 10 * (1 + 2 + 3 + 4) + 3 * 2 * 100


def test_operations_agree_with_those_that_torch_counts(seed):
    model: Any = build_llama(small_tokenizer(), **SHAPE, max_positions=32).model
    model.set_attn_implementation("eager")
    head = model.get_output_embeddings().weight.numel()
    layers = model.model.layers
    body = sum(p.numel() for p in layers.parameters() if p.ndim == 2)  # norms multiply no matrix
    cost = Cost(body, head, SHAPE["layers"] * SHAPE["hidden"])
    past, counted = None, 0
    for token in range(5):  # one by one: no token looks at a later one
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            past = model(torch.tensor([[token]]), past_key_values=past).past_key_values
        counted += flops.get_total_flops()
    assert cost.flops(range(5), 5) == counted


def counted(run: Callable[[], object]) -> int:
    """Operations of a call as torch counts them, kernel by kernel."""
    with FlopCounterMode(display=False) as flops:
        run()
    return flops.get_total_flops()


def texts(words: int, letters: bool) -> tuple[list[str], list[list[str]]]:
    choices = [" A", " B", " C", " D"] if letters else [" old mill", " Karin", " near the copper"]
    return [" ".join(["the lantern lives near"] * (words // 4))], [choices]


@pytest.mark.parametrize("name", ["llama", "gpt2", "adapted"])
@pytest.mark.parametrize("letters", [True, False])
def test_the_operations_of_a_question_are_those_of_a_real_forward(
    tmp_path: Path, seed: int, name: str, letters: bool
):
    """But for what a kernel computes of attention to later tokens, and throws away.

    That is known where the context alone is read at once, as before letters; else it is bounded.
    """
    tokenizer = small_tokenizer()
    model: Any = build("llama" if name == "adapted" else name, tmp_path, tokenizer)
    if name == "adapted":
        model = LoRA(rank=4).apply(model).eval()
    model.set_attn_implementation("eager")
    cost = operations.cost_of(model, model.get_output_embeddings())
    assert cost
    contexts, continuations = texts(40, letters)
    encoded = encode_choices(model, tokenizer, contexts, continuations)
    (formula,) = operations.of_prompts(encoded, cost)
    actual = counted(lambda: score_choices(model, tokenizer, contexts, continuations))
    (tokens,) = encoded.tokens()
    thrown_away = 2 * cost.width * tokens**2
    assert formula * 0.999 < actual < formula * 1.01 + thrown_away
    if letters:
        (read,) = {len(request.context_ids) for request in encoded.requests}
        exactly_so = formula + 2 * cost.width * read * (read - 1)
        assert actual == pytest.approx(exactly_so, rel=2e-3)  # and the angles of positions
    if name == "adapted":
        plain = operations.cost_of(model.base_model.model, model.get_output_embeddings())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert plain == cost and trained > 0
        bare = build("llama", tmp_path, tokenizer)
        under = operations.cost_of(bare, bare.get_output_embeddings())
        assert under and cost.body == under.body + trained  # each adapter weight is read once


def test_of_a_mixture_of_experts_nobody_knows_what_is_read():
    model: Any = nn.Module()
    model.experts = nn.Parameter(torch.zeros(4, 3, 2))
    assert operations.cost_of(model) is None


@pytest.mark.parametrize("name", ["prompt", "prefix", "p_tuning", "dora"])
def test_of_what_reads_more_than_the_text_no_operations_are_told(tmp_path: Path, name: str):
    model: Any = build("llama", tmp_path, small_tokenizer())
    assert operations.cost_of(model)
    assert operations.cost_of(lookup("tuning", name)().apply(model)) is None


def test_the_operations_of_a_search_are_those_of_a_real_one(
    home: Path, encoder: DualEncoder, chunks: list[Chunk], seed: int
):
    for tower in encoder.towers.values():
        tower.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    dense = Dense.over(encoder, chunks)
    # Batches are padded to a multiple of 8 tokens, which the formula leaves out.
    texts = ("the " * words for words in range(1, 60))
    fitting = next(text for text in texts if len(encoder.tokenize([text], "question")[0]) == 32)
    asked = [Question("q", fitting)]
    formula = operations.of_search(dense, asked)
    assert formula == pytest.approx(counted(lambda: dense.search(asked, 3)), rel=0.02)
    fewer = operations.of_search(Dense.over(encoder, chunks[:10]), asked)
    assert formula and fewer
    assert formula - fewer == 2 * encoder.dimension * (len(chunks) - 10)
    for control in (Lexical(BM25(chunks)), Random([1], 0), Gold({})):
        assert operations.of_search(control, asked) == 0
    other: Any = object()
    assert operations.of_search(other, asked) is None
