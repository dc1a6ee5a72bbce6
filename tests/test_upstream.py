"""A generator behind an OpenAI-compatible server gives the answers and scores of one at home."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from rag2.answering.ask import Ask
from rag2.answering.rag import Rag
from rag2.answering.remote import Remote
from rag2.answering.settings import Reading
from rag2.answering.thorough import _total
from rag2.answering.wire import Choice, Unavailable
from rag2.answering.writing import Writing, kept
from rag2.evaluation.questions import load_questions
from rag2.generator.mixture import log_prior
from rag2.generator.pairs import encode_pairs
from rag2.registry import UserError
from rag2.types import Question
from small_systems import small_system
from upstreams import Fake, remote, running


@pytest.fixture(scope="module")
def home_system(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rag]:
    """Random models over the small world's documents, all in this process."""
    # Random encoders score chunks much alike: cold, so that p(z|x) matters.
    with small_system(home, tmp_path_factory.mktemp("up"), temperature=0.05) as rag:
        yield rag


@pytest.fixture(scope="module")
def shared(home_system: Rag) -> Iterator[Fake]:
    """A server of its generator."""
    with running(Fake(home_system.generator)) as fake:
        yield fake


@pytest.fixture
def fake(shared: Fake) -> Iterator[Fake]:
    """The same, well behaved."""
    shared.fault, shared.echoes = "", True
    shared.asked.clear()
    yield shared
    shared.fault, shared.echoes = "", True


@pytest.fixture
def system(home_system: Rag, fake: Fake) -> Iterator[Remote]:
    """The system whose generator is there."""
    with remote(home_system, fake.url) as system:
        fake.asked.clear()
        yield system


@pytest.fixture
def questions(home: Path, dice: random.Random) -> list[Question]:
    """Some of the small world's."""
    return dice.sample(load_questions(home / "data" / "questions.jsonl"), 4)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_chunks_in_one_prompt_give_the_answers_of_a_generator_at_home(
    home_system: Rag, system: Remote, questions: list[Question], k: int
):
    for question in questions:
        ask: dict[str, Any] = {"k": k, "reading": "concat", "max_new_tokens": 12}
        expected = home_system.answer(question.question, **ask)
        got = system.answer(question.question, **ask)
        assert (got.text, got.finish, got.tokens) == (
            expected.text,
            expected.finish,
            expected.tokens,
        )
        assert got.logps == pytest.approx(expected.logps, abs=1e-4)
        assert got.citations == expected.citations and got.dropped == expected.dropped
        assert got.prompt_tokens == expected.prompt_tokens and got.place == expected.place
        *pieces, last = system.stream(question.question, **ask)
        assert "".join(map(str, pieces)) == expected.text and last == got


@pytest.mark.parametrize("reading", ["marginal", "concat"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_scores_are_those_of_the_harness(
    home_system: Rag, system: Remote, questions: list[Question], reading: Reading, k: int
):
    for question in questions:
        expected = home_system.score(question.question, question.choices, k=k, reading=reading)
        got = system.score(question.question, question.choices, k=k, reading=reading)
        assert got.logps == pytest.approx(expected.logps, abs=1e-4)
        for one, other in zip(got.citations, expected.citations, strict=True):
            assert one.chunk == other.chunk
            assert one.posterior == pytest.approx(other.posterior, abs=1e-4)


def by_force(rag: Rag, question: str, stops: list[str]) -> tuple[str, float, list[float]]:
    """Thorough decoding with the model at hand: text, log p(y|x) without its end, p(z|x,y)."""
    tokenizer = rag.generator.tokenizer
    ((hits, _),) = rag.searched([Ask(question)])
    prompts = [
        rag.settings.prompt.context(question, [hit.chunk.passage], tokenizer).text for hit in hits
    ]
    prior_K = log_prior(np.array([hit.score for hit in hits]), rag.settings.temperature).numpy()
    server = Fake(rag.generator)
    best: tuple[float, str, str] = (-math.inf, "", "")
    for prompt in prompts:
        body = {"max_tokens": 12, "temperature": 0, "stop": stops}
        made, _, text, finish = server.written(tokenizer(prompt)["input_ids"], body)
        whole = tokenizer.decode(made, skip_special_tokens=True)
        last = tokenizer.decode(made[-1:])
        ends = [(whole.find(stop), number) for number, stop in enumerate(stops) if stop in whole]
        end = stops[min(ends)[1]] if ends else last
        end = "" if finish == "length" else end
        total = np.logaddexp.reduce(prior_K + given(rag, prompts, text + end)[0])
        if total > best[0]:
            best = (float(total), text, end)
    _, logp_KT, tokens = given(rag, prompts, best[1] + best[2])
    own = kept(tokens, stops, [tokenizer.eos_token])
    logp_K = prior_K + logp_KT[:, :own].sum(1)
    total = np.logaddexp.reduce(logp_K)
    return best[1].strip(), float(total), np.exp(logp_K - total).tolist()


def given(rag: Rag, prompts: list[str], text: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """log p(text | prompt) of each, of each token, and the tokens."""
    pairs = encode_pairs(rag.generator.tokenizer, [(prompt, text) for prompt in prompts])
    logp_KT = np.array([by_model(rag.generator.model, *pair) for pair in pairs])
    return logp_KT.sum(1), logp_KT, [rag.generator.tokenizer.decode([id]) for id in pairs[0][1]]


@torch.no_grad()
def by_model(model: Any, context: list[int], own: list[int]) -> list[float]:
    logp_LV = model(torch.tensor([[*context, *own]])).logits[0].float().log_softmax(-1)
    return [logp_LV[len(context) + t - 1, token].item() for t, token in enumerate(own)]


@pytest.mark.parametrize("count", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_chunks_read_apart_give_the_best_of_their_candidates(
    home_system: Rag, system: Remote, home: Path, dice: random.Random, fake: Fake, count: int
):
    for question in dice.sample(load_questions(home / "data" / "questions.jsonl"), count):
        # Stops that random models write; most of them are more than the server is told of.
        stops = ["\n", *dice.sample("aeinorst0123456789", 8)]
        text, logp, posterior = by_force(home_system, question.question, stops)
        ask: dict[str, Any] = {"max_new_tokens": 12, "stop": tuple(stops[1:])}
        fake.asked.clear()
        got = system.answer(question.question, reading="marginal", **ask)
        assert len(fake.asked) == 2  # all prompts in one request, all scores in another
        assert got.text == text
        assert got.logp == pytest.approx(logp, abs=1e-3)
        assert [c.posterior for c in got.citations] == pytest.approx(posterior, abs=1e-3)
        *pieces, last = system.stream(question.question, reading="marginal", **ask)
        assert "".join(map(str, pieces)) == text and last == got


def test_a_drawn_answer_begins_with_the_draw_of_a_chunk(
    system: Remote, questions: list[Question], fake: Fake
):
    question = questions[0].question
    system.settings = system.settings.model_copy(update={"temperature": 10.0})  # all chunks alike
    ask: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 6}
    texts = {system.answer(question, seed=seed, **ask).text for seed in range(12)}
    assert len(texts) > 1
    assert system.answer(question, seed=3, **ask) == system.answer(question, seed=3, **ask)
    written = [asked for asked in fake.asked if not asked.get("echo")]
    assert all(isinstance(asked["prompt"], str) for asked in written)
    assert len({asked["prompt"] for asked in written}) > 1


def test_answers_are_asked_for_at_the_same_time(system: Remote, questions: list[Question]):
    asks = [Ask(q.question, reading="concat", max_new_tokens=5) for q in questions]
    alone = [system.answer(q.question, reading="concat", max_new_tokens=5) for q in questions]
    assert system.answers(asks) == alone


def test_a_server_without_echo_reads_in_one_prompt_and_says_so(
    home_system: Rag, fake: Fake, questions: list[Question]
):
    fake.echoes = False
    with remote(home_system, fake.url) as system:
        question = questions[0].question
        assert system.readings == ("concat",)
        expected = home_system.answer(question, reading="concat")
        assert system.answer(question, reading="concat").text == expected.text
        assert system.answer(question, k=0).text == home_system.answer(question, k=0).text
        for wrong in (lambda: system.answer(question), lambda: system.score(question, ["a"])):
            with pytest.raises(UserError, match="reading=concat"):
                wrong()


def test_reading_by_token_is_refused(system: Remote):
    with pytest.raises(UserError, match="token.*reading=concat"):
        system.answer("Who?", reading="token")
    with pytest.raises(UserError, match="token.*reading=concat"):
        system.score("Who?", ["a"], reading="token")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8001", "such as http"),
        ("ftp://localhost/v1", "such as http"),
        ("http://a:b@localhost/v1", "RAG2_GENERATOR_KEY"),
        ("http://127.0.0.1:1/v1", "does not answer"),
    ],
)
def test_a_wrong_address_is_one_line(home_system: Rag, url: str, said: str):
    with pytest.raises(UserError, match=said) as error, remote(home_system, url):
        pass
    assert "\n" not in str(error.value)


def test_a_server_of_something_else_is_one_line(home_system: Rag, fake: Fake):
    before = fake.models
    for models, said in [
        ([{"id": "a", "owned_by": "rag2"}], "rag2 server"),
        ([{"id": "a"}, {"id": "b"}], "a, b.*--generator-model"),
        ([], "none.*--generator-model"),
    ]:
        fake.models = models
        with pytest.raises(UserError, match=said), remote(home_system, fake.url):
            pass
    fake.models = before
    with pytest.raises(UserError, match="Did you mean 'small'"):
        with remote(home_system, fake.url, model="smal"):
            pass
    with pytest.raises(UserError, match="'small'.*Not Found"):
        with remote(home_system, fake.url.removesuffix("/v1"), model="small"):
            pass
    with pytest.raises(UserError, match="ends in /v1"):
        with remote(home_system, fake.url.removesuffix("/v1")):
            pass
    with pytest.raises(UserError, match="RAG2_GENERATOR_KEY"):
        with remote(home_system, fake.url, key="schlüssel"):
            pass


def test_another_generators_tokens_are_noticed(
    home_system: Rag, fake: Fake, tokenizers: list[Path]
):

    own = fake.tokenizer
    fake.tokenizer = AutoTokenizer.from_pretrained(str(tokenizers[0]))
    try:
        with pytest.raises(UserError, match="not its generator"), remote(home_system, fake.url):
            pass
    finally:
        fake.tokenizer = own


def test_the_key_is_sent_and_every_setting_is_said(home_system: Rag, fake: Fake):
    with remote(home_system, fake.url, key="secret") as system:
        system.answer("Who?", reading="concat", max_new_tokens=2)
    assert fake.keys[-1] == "Bearer secret"
    asked = fake.asked[-1]
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"]) == (0.0, 1.0, 2)
    assert asked["stop"] == ["\n"]


FAULTS = [
    "breaks",
    "moves",
    "packs",
    "floods",
    "null",
    "nan",
    "busy",
    "short",
    "html",
    "fails",
    "locks",
]


CASES = [(fault, reading) for fault in FAULTS for reading in ("marginal", "concat")]


@pytest.mark.parametrize(("fault", "reading"), [*CASES, ("hangs up", "concat")])
def test_a_server_that_misbehaves_is_one_line_and_the_next_answer_is_good(
    system: Remote, fake: Fake, fault: str, reading: Reading
):
    expected = system.answer("Who?", reading=reading, max_new_tokens=4)
    fake.fault = fault
    with pytest.raises(Unavailable) as error:
        system.answer("Who?", reading=reading, max_new_tokens=4)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    fake.fault = ""
    assert system.answer("Who?", reading=reading, max_new_tokens=4) == expected
    assert fake.open == 0


def test_a_slow_server_is_given_up(home_system: Rag, fake: Fake):
    with remote(home_system, fake.url, seconds=0.5) as system:
        for fault in ("sleeps", "dawdles"):
            fake.fault = fault
            with pytest.raises(Unavailable, match="answer"):
                system.answer("Who?", reading="concat", max_new_tokens=4)


def test_a_busy_server_is_asked_again(system: Remote, fake: Fake):
    fake.fault = "busy once"
    assert system.answer("Who?", reading="concat", max_new_tokens=2).tokens
    assert len(fake.asked) == 2


@pytest.mark.parametrize("stops", [["\n"], ["\n", "###"], ["Ola", "é🙂"]])
def test_a_text_in_pieces_ends_before_its_first_stop(dice: random.Random, stops: list[str]):
    for _ in range(200):
        pieces = dice.choices([" Ola", " Nora", "é", "🙂", "#", "##", " ", "\n", "é🙂", "x"], k=9)
        wanted, writing, told = "".join(pieces), Writing(stops, ("</s>",)), ""
        for at, piece in enumerate(pieces):
            finish = "stop" if at == len(pieces) - 1 else None
            goes_on = writing.add(Choice(text=piece, finish_reason=finish))
            told += writing.news()
            if not goes_on:
                break
        cut = min((at for stop in stops if (at := wanted.find(stop)) >= 0), default=len(wanted))
        assert told == writing.text == wanted[:cut].strip()


@pytest.mark.parametrize(
    ("tokens", "stops", "count"),
    [
        (["a", "b"], ["x"], 2),
        (["a", "\n", "b"], ["\n"], 1),
        (["a", "b\n", "c"], ["\n"], 2),
        (["a", " ", "\n"], ["\n"], 2),
        (["</s>", "a"], ["x"], 0),
        (["a", "b", "</s>", "x"], ["x"], 2),
        (["the e", "nd."], ["end"], 1),
        (["\n"], ["\n"], 0),
    ],
)
def test_the_token_that_only_ends_a_text_is_none_of_its_tokens(
    tokens: list[str], stops: list[str], count: int
):
    assert kept(tokens, stops, ["</s>"]) == count


def test_a_candidate_is_weighed_by_the_prior_of_its_chunks():
    prior_S = torch.tensor([0.9, 0.1]).double().log()
    rows = [[("a", -1.0), ("b", -0.5)], [("a", -3.0), ("b", -0.25)]]
    assert _total(prior_S, rows) == pytest.approx(
        math.log(0.9 * math.exp(-1.5) + 0.1 * math.exp(-3.25))
    )
    assert _total(prior_S, []) == -math.inf
