"""Log p(continuation | context) in evaluation: whatever is shared, the scores of full sequences."""

import math
import os
import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from rag2.generator.choices import score_choices
from rag2.generator.learning import answer_logprob_rows
from rag2.generator.logprob import (
    Request,
    choice_answers,
    choice_logprobs,
    pair_logprobs,
)
from rag2.generator.past import Past, shares_past
from rag2.generator.prefixes import shared_prefixes
from rag2.registry import UserError
from small_models import (
    CONFIGS,
    SPECIAL,
    build,
    by_hand,
    encode_pair,
    ids,
    pairs_of,
    random_requests,
    small_tokenizer,
)

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.mark.parametrize("name", [*CONFIGS, *SPECIAL])
def test_choices_on_a_shared_cache_score_as_full_sequences_in_any_batch(name, tmp_path, tokenizer):
    model = build(name, tmp_path, tokenizer)
    requests = random_requests(9)
    shared = shares_past(model)
    assert shared == (name not in ("sliding_mistral", "softcapped_gemma2"))
    expected = [sum(by_hand(model, pair)) for pair in pairs_of(requests)]
    for batch_tokens in (1, 300, 100_000):
        for scores in (
            pair_logprobs(model, pairs_of(requests), batch_tokens),
            sum(choice_logprobs(model, requests, batch_tokens), []),
        ):
            assert scores == pytest.approx(expected, abs=1e-4 if name == "gpt2" else 2e-5)


def passages_and_questions(passages: int, questions: int) -> list[Request]:
    """Every question after every passage and after none: prompts that share their beginnings."""
    starts = [[0], *([0, *ids(1, 40)] for _ in range(passages))]
    asked = [(ids(1, 30), [ids(1, 4) for _ in range(4)]) for _ in range(questions)]
    requests = [Request(start + question, some) for start in starts for question, some in asked]
    return random.sample(requests, len(requests))


@pytest.mark.parametrize("name", CONFIGS)
def test_choices_behind_shared_passages_score_as_full_sequences_in_any_batch(
    name, tmp_path, tokenizer
):
    model = build(name, tmp_path, tokenizer)
    requests = passages_and_questions(4, 5)
    # One context the beginning of another, and one that is there twice.
    requests.append(Request(requests[0].context_ids[:-1], [ids(1, 1), ids(3, 3)]))
    requests.append(Request(requests[1].context_ids, [ids(2, 2)]))
    assert any(g.shared for g in shared_prefixes([r.context_ids for r in requests]))
    expected = [sum(by_hand(model, pair)) for pair in pairs_of(requests)]
    tolerance = 1e-4 if name == "gpt2" else 2e-5
    assert pair_logprobs(model, pairs_of(requests)) == pytest.approx(expected, abs=tolerance)
    for batch_tokens in (1, 300, 1000, 100_000):
        scores = sum(choice_logprobs(model, requests, batch_tokens), [])
        assert scores == pytest.approx(expected, abs=tolerance)


def test_a_past_is_read_on_from_any_of_its_rows_as_often_as_wanted(tmp_path, tokenizer):
    model = build("llama", tmp_path, tokenizer)
    starts, rests = [ids(2, 20) for _ in range(3)], [ids(1, 9) for _ in range(4)]
    _, past = Past.nothing(model, 3).read(model, starts)
    for owners in ([2, 0, 0, 1], [1, 1, 2, 0]):
        logits_GV, _ = past.take(torch.tensor(owners)).read(model, rests)
        for owner, rest, logits_V in zip(owners, rests, logits_GV, strict=True):
            expected_V = model(torch.tensor([[*starts[owner], *rest]])).logits[0, -1]
            torch.testing.assert_close(logits_V, expected_V, rtol=1e-4, atol=1e-4)


def test_padding_takes_no_position_even_at_the_models_last_one(tmp_path, tokenizer):
    model = build("gpt2", tmp_path, tokenizer)  # a table of positions: one beyond it is an error
    requests = [Request(ids(127, 127), [ids(2, 2)]), Request(ids(120, 120), [ids(8, 8)])]
    expected = pair_logprobs(model, pairs_of(requests))
    assert sum(choice_logprobs(model, requests), []) == pytest.approx(expected, abs=1e-4)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every way to put the items into groups."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [items[0], *group], *rest[i + 1 :]]


def test_no_other_whole_groups_save_more_tokens_than_those_of_shared_prefixes():
    def saved(group: Sequence[int]) -> float:
        begin = os.path.commonprefix([heads[i] for i in group])
        whole = sum(head[: len(begin)] == begin for head in heads) == len(group)
        return (len(group) - 1) * len(begin) if whole or len(group) == 1 else -math.inf

    for _ in range(30):
        contexts = [random.choices([3, 4], k=random.randint(1, 7)) for _ in range(6)]
        heads = [context[:-1] for context in contexts]
        groups = shared_prefixes(contexts)
        assert sorted(i for group in groups for i in group.members) == list(range(6))
        for group in groups:
            begin = contexts[group.members[0]][: group.shared]
            assert all(heads[i][: group.shared] == begin for i in group.members)
        best = max(sum(map(saved, other)) for other in partitions(list(range(6))))
        assert sum((len(g.members) - 1) * g.shared for g in groups) == best


def test_no_requests_have_no_scores_and_no_contexts_no_groups(tmp_path, tokenizer):
    assert shared_prefixes([]) == []
    assert choice_logprobs(build("llama", tmp_path, tokenizer), []) == []


def test_contexts_that_all_begin_each_other_need_no_deep_recursion():
    groups = shared_prefixes([[3] * length for length in range(1, 1200)])
    assert sum(len(group.members) for group in groups) == 1199


def test_each_context_is_encoded_once_for_all_its_choices(tmp_path, tokenizer):
    model = build("llama", tmp_path, tokenizer)
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    choices = [[token, *ids(1, 1)] for token in (4, 5, 6, 7)]  # equal beginnings are read once
    choice_logprobs(model, [Request(ids(30, 30), choices)])
    assert seen == [(1, 30), (1, 4)]
    seen.clear()
    choice_logprobs(model, [Request([4, *ids(29, 29)], [[7], [8]]), Request([5] * 20, [[9]])])
    assert seen == [(2, 30)]
    seen.clear()
    passage = ids(30, 30)
    choice_logprobs(model, [Request([*passage, token, *ids(4, 4)], [[7]]) for token in (4, 5, 6)])
    assert seen == [(1, 30), (3, 5)], "the passage once, then the questions"


def test_choices_that_change_the_context_ids_are_scored_on_their_own_context(tmp_path, tokenizer):
    model = build("llama", tmp_path, tokenizer)
    contexts = ["Karin lives near", "Karin lives near the old", "Karin lives near"]
    choices = [[" the mill", " copper"], ["\n", " mill", "er"], [" copper"]]
    scores = score_choices(model, tokenizer, contexts, choices)
    assert [len(s) for s in scores] == [2, 3, 1]
    assert scores[0][1] == pytest.approx(scores[2][0], abs=2e-5)  # two rows of one batch may round
    for context, continuations, got in zip(contexts, choices, scores, strict=True):
        expected = [
            sum(by_hand(model, encode_pair(tokenizer, context, choice))) for choice in continuations
        ]
        assert got == pytest.approx(expected, abs=2e-5)


def test_all_continuations_of_one_token_share_the_probability_also_in_bfloat16(tmp_path, tokenizer):
    model = build("llama", tmp_path, tokenizer).to(torch.bfloat16)
    every = [[token] for token in range(300)]
    requests = [Request(ids(5, 30), every) for _ in range(3)]
    flat = pair_logprobs(model, pairs_of(requests[:1]), batch_tokens=10_000)
    for logp in (*choice_logprobs(model, requests), flat):
        assert sum(map(math.exp, logp)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "sliding_mistral"])
def test_a_continuation_is_greedy_only_if_every_token_of_it_is_the_most_likely(
    name, tmp_path, tokenizer
):
    model = build(name, tmp_path, tokenizer)
    for context in (ids(1, 20) for _ in range(5)):
        greedy: list[int] = []
        for _ in range(3):
            greedy.append(int(model(torch.tensor([[*context, *greedy]])).logits[0, -1].argmax()))
        other = [(token + 1) % 300 for token in greedy]
        mixed = [[*greedy[:t], other[t], *greedy[t + 1 :]] for t in range(3)]
        continuations = [greedy, *mixed, greedy[:1], other[:1], other]
        (answers,) = choice_answers(model, [Request(context, continuations)])
        assert [flag for _, flag in answers] == [True, False, False, False, True, False, False]


def test_scoring_ignores_dropout_and_gives_every_module_its_mode_back(tmp_path, tokenizer):
    model = build("gpt2", tmp_path, tokenizer)
    requests = random_requests(3)
    expected = choice_logprobs(model, requests)
    model.train()
    model.transformer.ln_f.eval()
    assert choice_logprobs(model, requests) == expected
    assert model.training and not model.transformer.ln_f.training


def test_a_sequence_beyond_the_positions_is_refused(tmp_path, tokenizer):
    model = build("llama", tmp_path, tokenizer)
    assert choice_logprobs(model, [Request(ids(127, 127), [[5, 6]])])
    with pytest.raises(UserError, match="129 tokens, .* positions for 128: lower prompt.budget"):
        choice_logprobs(model, [Request(ids(127, 127), [[5, 6, 7]])])
    with pytest.raises(UserError, match="positions"):
        answer_logprob_rows(model, [(ids(128, 128), [5, 6])])
