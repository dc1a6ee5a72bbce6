"""Decoding from a mixture of contexts: steps multiply to the marginal, company changes nothing."""

import random

import numpy as np
import pytest
import torch

from rag2.generator.logprob import Request, choice_logprobs
from rag2.generator.mixture import Mixture, Mixtures, log_prior
from rag2.generator.pairs import place
from rag2.generator.steps import step_logprobs
from small_models import CONFIGS, build, small_tokenizer

FAMILIES = [*CONFIGS, "sliding_mistral"]  # the last one cannot keep its past behind padding
MEMORY = 1 << 20


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path, seed: int):
    """A random model of a family, in evaluation mode, in double precision: sums of many logs."""
    return build(request.param, tmp_path, small_tokenizer()).double()


def contexts(dice: random.Random, count: int) -> list[list[int]]:
    """Token ids of unequal length."""
    return [[dice.randrange(3, 300) for _ in range(dice.randint(3, 30))] for _ in range(count)]


def mixture(dice: random.Random, reading: str = "marginal") -> Mixture:
    """Some contexts with random weights; they begin with heads that others may share."""
    ids = contexts(dice, dice.randint(1, 4))
    scores_K = np.array([dice.gauss(0, 2) for _ in ids], dtype=np.float32)
    heads = [dice.choice([0, dice.randint(1, len(row) - 1)]) for row in ids]
    return Mixture(ids, log_prior(scores_K, 1.0), reading == "marginal", heads)


def written(mixtures: Mixtures, mixture: Mixture, tokens: list[int]) -> list[float]:
    """log p of each of these tokens, made one after the other."""
    mixtures.add([mixture])
    steps = []
    for at, token in enumerate(tokens):
        (logp_V,) = mixtures.next()
        assert float(logp_V.logsumexp(0)) == pytest.approx(0, abs=1e-9)
        steps.append(float(logp_V[token]))
        mixtures.go_on([token], [at == len(tokens) - 1])
    return steps


@pytest.mark.parametrize("remembered", [0, MEMORY])
def test_the_product_of_the_steps_is_the_sequence_marginal(
    model, dice: random.Random, remembered: int
):
    made, tokens = mixture(dice), [dice.randrange(3, 300) for _ in range(8)]
    prior_S = made.log_weights_S.clone()
    steps = written(Mixtures(model, remembered), made, tokens)
    requests = [Request(ids, [tokens]) for ids in made.contexts]
    logp_S = torch.tensor([row[0] for row in choice_logprobs(model, requests)]).double()
    marginal = float((prior_S + logp_S).logsumexp(0))
    assert sum(steps) == pytest.approx(marginal, abs=1e-5)
    expected = (prior_S + logp_S).softmax(0).tolist()
    assert made.posterior() == pytest.approx(expected, abs=1e-5)


def test_weights_that_stand_still_give_the_product_of_the_mixtures(model, dice: random.Random):
    made, tokens = mixture(dice, "token"), [dice.randrange(3, 300) for _ in range(6)]
    steps = written(Mixtures(model), made, tokens)
    for at, token in enumerate(tokens):
        rows = [torch.tensor([[*ids, *tokens[:at]]], device=place(model)) for ids in made.contexts]
        with torch.no_grad():
            p_S = torch.stack(
                [model(input_ids=row).logits[0, -1].softmax(-1)[token] for row in rows]
            )
        expected = (made.log_weights_S.exp() * p_S.double().cpu()).sum().log()
        assert steps[at] == pytest.approx(float(expected), abs=1e-5)
    assert sum(made.posterior()) == pytest.approx(1)


def test_every_token_is_scored_after_every_context_as_if_alone(model, dice: random.Random):
    starts = contexts(dice, 3)
    continuations = [[dice.randrange(3, 300) for _ in range(dice.randint(1, 6))] for _ in range(5)]
    for ids, logp_ST in zip(
        continuations, step_logprobs(model, starts, continuations), strict=True
    ):
        assert logp_ST.shape == (len(starts), len(ids))
        for start, logp_T in zip(starts, logp_ST, strict=True):
            whole = torch.tensor([[*start, *ids]], device=place(model))
            with torch.no_grad():
                logp_LV = model(input_ids=whole).logits[0].log_softmax(-1)
            expected_T = logp_LV[len(start) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]
            torch.testing.assert_close(logp_T, expected_T, atol=1e-9, rtol=0)


def test_one_context_is_plain_generation(model, dice: random.Random):
    (ids,) = contexts(dice, 1)
    mixtures = Mixtures(model)
    mixtures.add([Mixture([ids], torch.zeros(1).double())])
    with torch.no_grad():
        expected_V = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(mixtures.next()[0], expected_V.double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("remembered", [0, MEMORY, 3000])
def test_answers_that_come_and_go_beside_it_change_nothing(
    model, dice: random.Random, remembered: int
):
    """Answers join, leave and are dropped at random; each has the steps that it has alone."""
    plans = [(mixture(dice), [dice.randrange(3, 300) for _ in range(dice.randint(1, 9))])]
    plans += [(mixture(dice), [5] * dice.randint(1, 9)) for _ in range(7)]
    for made, _ in plans[4:]:  # the same passages as another's, and another question
        made.contexts = [[*plans[0][0].contexts[0], dice.randrange(3, 300)] for _ in made.contexts]
        made.heads = [len(plans[0][0].contexts[0])] * len(made.contexts)
    alone = [written(Mixtures(model), again(made), tokens) for made, tokens in plans]
    together, waiting, done = Mixtures(model, remembered), dict(enumerate(plans)), {}
    steps: dict[int, list[float]] = {number: [] for number in waiting}
    owners: list[int] = []
    while waiting or owners:
        joining = [number for number in waiting if not owners or dice.random() < 0.3]
        if joining:
            together.add([waiting.pop(number)[0] for number in joining])
            owners += joining
        if len(owners) > 1 and dice.random() < 0.15:
            gone = owners.pop(dice.randrange(len(owners)))
            together.drop([plans[gone][0]])
            done[gone] = "dropped"
        tokens = [plans[number][1][len(steps[number])] for number in owners]
        for number, token, logp_V in zip(owners, tokens, together.next(), strict=True):
            steps[number].append(float(logp_V[token]))
        over = [len(steps[number]) == len(plans[number][1]) for number in owners]
        together.go_on(tokens, over)
        owners = [number for number, ends in zip(owners, over, strict=True) if not ends]
    assert not together.live
    for number, found in steps.items():
        assert found == pytest.approx(alone[number][: len(found)], abs=1e-5)
        assert number in done or len(found) == len(alone[number])


def again(made: Mixture) -> Mixture:
    """The same mixture before its first token."""
    return Mixture(made.contexts, made.log_weights_S, made.moving, made.heads)


def test_what_is_remembered_stays_within_its_bytes_and_is_read_once(dice: random.Random, tmp_path):
    model = build("llama", tmp_path, small_tokenizer())
    reads: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    mixtures, head = Mixtures(model, MEMORY), [7] * 20
    for tail in (8, 9):
        mixtures.add([Mixture([[*head, tail]], torch.zeros(1).double(), heads=[20])])
    assert reads == [20, 1, 1]
    small = Mixtures(model, 3000)
    for start in range(9):
        small.add([Mixture([[start + 10] * 9], torch.zeros(1).double(), heads=[8])])
        assert small._running.heads.bytes <= 3000  # pyright: ignore[reportAttributeAccessIssue]


def test_equal_contexts_are_read_once_and_written_on_apart(dice: random.Random, tmp_path):
    model = build("llama", tmp_path, small_tokenizer()).double()
    made, reads = mixture(dice), list[int]()
    copies = [again(made) for _ in range(3)]
    model.register_forward_pre_hook(
        lambda _, args, kwargs: reads.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    mixtures = Mixtures(model)
    mixtures.add(copies)
    assert sum(reads) == len({tuple(ids) for ids in made.contexts})
    mixtures.next()
    mixtures.go_on([5, 6, 7], [False] * 3)
    for token, logp_V in zip((5, 6, 7), mixtures.next(), strict=True):
        alone = Mixtures(model)
        alone.add([again(made)])
        alone.next()
        alone.go_on([token], [False])
        torch.testing.assert_close(logp_V, alone.next()[0], atol=1e-9, rtol=0)
