"""Numbers of an answer and of scored choices, computed again from the models' plain outputs."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rag2.answering.ask import Ask, Hit, Place
from rag2.answering.draft import Draft, Prompts, drawer
from rag2.answering.rag import Rag, step
from rag2.answering.scoring import log_likelihoods
from rag2.answering.settings import Reading, Settings
from rag2.answering.text import Text
from rag2.evaluation.questions import load_questions
from rag2.generator.mixture import Mixtures
from rag2.generator.prompt import Prompt
from rag2.types import Chunk, Document, Question
from rough_systems import log_prior, prompt, rough_system, steps
from small_models import by_hand

WARM = 3.0
APART: list[Reading] = ["marginal", "token"]
READINGS: list[Reading] = [*APART, "concat"]


@pytest.fixture(scope="module")
def system(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rag]:
    """A system whose p(z|x) has a temperature of its own, and that stops at no text."""
    folder = tmp_path_factory.mktemp("scores")
    with rough_system(home, folder, temperature=WARM, prompt=Prompt(budget=800), stop=[]) as rag:
        yield rag


@pytest.fixture
def asked(home: Path, dice: random.Random) -> Question:
    """One of the small world's."""
    return dice.choice(load_questions(home / "data" / "questions.jsonl"))


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ends an answer."""
    monkeypatch.setattr("rag2.answering.draft.ends_of", lambda *_: set())


def found(system: Rag, ask: Ask) -> list[Hit]:
    ((hits, _),) = system.searched([ask])
    return hits


def told_by(log_prior_S: Tensor, logp_ST: Tensor, reading: str) -> tuple[float, list[float]]:
    """log p(y|x), and p(z|x,y) or, of weights that stand still, the mean of p(z|x,y_<=t)."""
    if reading == "marginal":
        joint_S = log_prior_S + logp_ST.sum(1)
        return float(joint_S.logsumexp(0)), joint_S.softmax(0).tolist()
    joint_ST = log_prior_S[:, None] + logp_ST
    return float(joint_ST.logsumexp(0).sum()), joint_ST.softmax(0).mean(1).tolist()


def choice_steps(
    system: Rag, hits: Sequence[Hit], question: str, choice: str, header: str = ""
) -> Tensor:
    """log p(y_t | x, z, y_<t) [S, T] of a choice."""
    contexts = [prompt([hit.chunk.passage], question, header) for hit in hits]
    return torch.stack([steps(system.generator, context, f" {choice}") for context in contexts])


@pytest.mark.parametrize("reading", APART)
def test_a_score_is_the_mixture_and_cites_the_posterior_of_the_likeliest_choice(
    system: Rag, asked: Question, dice: random.Random, reading: Reading
):
    choices = [*asked.choices, "Karin lives near the old mill", "no", str(dice.randrange(10**9))]
    dice.shuffle(choices)
    hits = found(system, Ask(asked.question, k=4))
    log_prior_S = log_prior([hit.score for hit in hits], WARM)
    expected, shares = zip(
        *[
            told_by(log_prior_S, choice_steps(system, hits, asked.question, choice), reading)
            for choice in choices
        ],
        strict=True,
    )
    scored = system.score(asked.question, choices, k=4, reading=reading)
    assert list(scored.logps) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    best = max(range(len(choices)), key=expected.__getitem__)
    assert scored.best == best
    assert [cited.posterior for cited in scored.citations] == pytest.approx(shares[best], abs=1e-4)


@pytest.mark.parametrize("reading", APART)
@pytest.mark.usefixtures("endless")
def test_an_answer_cites_what_its_chunks_gave_to_its_tokens(
    system: Rag, asked: Question, reading: Reading
):
    ask = Ask(asked.question, k=4, reading=reading, max_new_tokens=5)
    draft = written(system, ask)
    hits = found(system, ask)
    contexts = [ids_of(system, prompt([hit.chunk.passage], asked.question)) for hit in hits]
    with torch.no_grad():
        rows = [by_hand(system.generator.model, (ids, draft.ids)) for ids in contexts]
    log_prior_S = log_prior([hit.score for hit in hits], WARM)
    logp, shares = told_by(log_prior_S, torch.tensor(rows).double(), reading)
    answer = draft.answer()
    assert len(answer.logps) == 5 and answer.logp == pytest.approx(logp, rel=1e-5, abs=1e-4)
    assert [cited.posterior for cited in answer.citations] == pytest.approx(shares, abs=1e-4)


def written(system: Rag, ask: Ask) -> Draft:
    """An answer, whole, with its tokens."""
    live = drafts = system.drafts([ask])
    mixtures = Mixtures(system.generator.model)
    mixtures.add([draft.mixture for draft in drafts])
    while live:
        live = step(mixtures, live)
    return drafts[0]


def ids_of(system: Rag, text: str) -> list[int]:
    return system.generator.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("reading", READINGS)
def test_a_score_cites_the_namespaces_asked_for_alone(
    system: Rag, asked: Question, dice: random.Random, reading: Reading
):
    space = f"space {dice.randrange(10**9)}"
    system.put([Document(f"d{n}", f"Aksel knows number {n}.") for n in range(2)], space)
    for namespaces, documents in ([space], {"d0", "d1"}), ([space, "none"], {"d0", "d1"}), ([], ()):
        scored = system.score(
            asked.question, asked.choices, k=9, reading=reading, namespaces=namespaces
        )
        assert {cited.namespace for cited in scored.citations} == ({space} if documents else set())
        assert {cited.document for cited in scored.citations} == set(documents)
    closed = system.score(asked.question, asked.choices, k=0, reading=reading)
    assert scored.logps == pytest.approx(closed.logps, abs=1e-5)
    system.remove(["d0", "d1"], space)


def uneven(dice: random.Random) -> tuple[list[Hit], list[int]]:
    """Chunks in the order of their scores, some of which no prompt of 120 tokens has room for."""
    fits = [False, *dice.sample([True, True, True, False], 4)]
    scores = sorted((dice.uniform(0, 9) for _ in fits), reverse=True)
    texts = ["the old mill " * (3 if short else 200) + str(n) for n, short in enumerate(fits)]
    chunks = [Chunk(n + 1, f"d{n}", text, end=len(text)) for n, text in enumerate(texts)]
    hits = [Hit(chunk, score, "") for chunk, score in zip(chunks, scores, strict=True)]
    return hits, [n for n, short in enumerate(fits) if short]


@pytest.mark.parametrize("reading", APART)
def test_chunks_without_room_leave_the_others_their_own_scores(
    system: Rag, dice: random.Random, reading: Reading
):
    hits, read = uneven(dice)
    settings = Settings(prompt=Prompt(budget=120), reading=reading, temperature=WARM)
    draft = Draft(Ask("Who?"), hits, Place("", 0, 0), settings, system.generator)
    expected = log_prior([hits[at].score for at in read], WARM).exp()
    assert draft.mixture.log_weights_S.exp().tolist() == pytest.approx(expected.tolist())
    answer = draft.answer()
    assert [cited.document for cited in answer.citations] == [f"d{at}" for at in read]
    assert [cited.score for cited in answer.citations] == [hits[at].score for at in read]
    assert [cited.posterior for cited in answer.citations] == pytest.approx(expected.tolist())
    assert answer.dropped == len(hits) - len(read)


def test_choices_are_scored_by_the_chunks_that_have_room(system: Rag, dice: random.Random):
    hits, read = uneven(dice)
    settings = Settings(prompt=Prompt(budget=120), reading="token", temperature=WARM)
    choices = ["Karin", "the harbour"]
    logps, shares = log_likelihoods(system.generator, settings, Ask("Who?"), hits, choices)
    log_prior_S = log_prior([hits[at].score for at in read], WARM)
    kept = [hits[at] for at in read]
    told = [
        told_by(log_prior_S, choice_steps(system, kept, "Who?", choice), "token")
        for choice in choices
    ]
    assert logps == pytest.approx([logp for logp, _ in told], rel=1e-5, abs=1e-4)
    by_place = dict(zip(read, max(told)[1], strict=True))
    expected = [by_place.get(at, 0.0) for at in range(len(hits))]
    assert shares == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_every_prompt_begins_with_what_an_ask_says_it_should(
    system: Rag, asked: Question, dice: random.Random, reading: Reading, k: int
):
    header = f"Be brief, {dice.randrange(10**9)}.\n\nQuestion: Who?\nAnswer: Ola\n\n"
    ask = Ask(asked.question, header, k=k, reading=reading, max_new_tokens=1)
    chunks = [hit.chunk for hit in found(system, ask)]
    groups = [[c.passage for c in chunks]] if reading == "concat" or not k else None
    texts = [prompt(g, asked.question, header) for g in groups or [[c.passage] for c in chunks]]
    prompts = Prompts.of(ask, chunks, system.settings, system.generator.tokenizer, 1, None)
    assert prompts.texts == texts
    (draft,) = system.drafts([ask])
    assert list(draft.mixture.contexts) == [ids_of(system, text) for text in texts]
    counted = sum(len(ids_of(system, text)) for text in texts)
    assert system.answers([ask])[0].prompt_tokens == counted


@pytest.mark.parametrize("reading", APART)
def test_choices_are_scored_behind_what_an_ask_begins_with(
    system: Rag, asked: Question, reading: Reading
):
    header = "Be brief.\n\nQuestion: Who?\nAnswer: Ola\n\n"
    ask = Ask(asked.question, header, k=2, reading=reading)
    hits = found(system, ask)
    logps, _ = log_likelihoods(system.generator, system.settings, ask, hits, ["Ola", "Nora"])
    log_prior_S = log_prior([hit.score for hit in hits], WARM)
    expected = [
        told_by(log_prior_S, choice_steps(system, hits, asked.question, choice, header), reading)
        for choice in ("Ola", "Nora")
    ]
    assert logps == pytest.approx([logp for logp, _ in expected], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("letters", [["ab#"], ["ab#", "cd"]])
def test_a_stop_that_begins_several_times_holds_back_all_that_it_may_yet_take(
    system: Rag, dice: random.Random, letters: list[str]
):
    tokenizer, ended = system.generator.tokenizer, 0
    for _ in range(100):
        stops = ["".join(dice.choices(some, k=dice.randint(4, 8))) for some in letters]
        parts = [stop[: dice.randint(1, len(stop) - 1)] for stop in dice.choices(stops, k=5)]
        wanted = "x".join(["Karin", *parts]) + dice.choice([*stops, *stops, " mill"])
        text, told = Text(tokenizer, stops), ""
        for token in tokenizer.encode(wanted, add_special_tokens=False):
            if not text.add(token) or text.ended:
                break
            told += text.news(all=False)
            sure = without_begun(text.whole(), stops)
            assert told == sure if len(stops) == 1 else sure.startswith(told), (wanted, stops)
        told += text.news(all=True)
        cut = min((at for stop in stops if (at := wanted.find(stop)) >= 0), default=len(wanted))
        assert told == text.whole() == wanted[:cut], (wanted, stops)
        ended += text.ended
    assert ended > 20


def without_begun(text: str, stops: Sequence[str]) -> str:
    """A text without the longest end of it that one of the stops begins with."""
    begun = [at for at in range(len(text)) if any(stop.startswith(text[at:]) for stop in stops)]
    return text[: min(begun, default=len(text))]


@pytest.mark.parametrize(("count", "kept"), [(2, 1), (4, 1), (4, 3), (8, 4), (1024, 512)])
def test_a_nucleus_that_is_exactly_full_takes_no_token_more(seed: int, count: int, kept: int):
    same_V = torch.zeros(count).double() - 3
    draws = {
        drawer(Ask("?", temperature=0.5, top_p=kept / count, seed=seed + n))(same_V)
        for n in range(200)
    }
    assert max(draws) < kept
    assert len(draws) >= min(kept, 5) - 1


def test_a_nucleus_that_lacks_a_little_takes_one_token_more(seed: int):
    logp_V = torch.tensor([0.5, 0.3, 0.2]).double().log()
    for top_p, kept in ((0.4998, 1), (0.5004, 2), (0.7996, 2), (0.8004, 3)):
        drawn = {
            drawer(Ask("?", temperature=1.0, top_p=top_p, seed=seed + n))(logp_V)
            for n in range(100)
        }
        assert drawn == set(range(kept))
