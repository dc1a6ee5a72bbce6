"""Retriever and generator as one module: which weights the loss reaches, and by which two ways."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from joint_gradients import Batch, dead, differing, gradients, left
from rag2.evaluation.questions import load_questions, split
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.losses.base import JointLoss
from rag2.losses.emdr2 import EMDR2
from rag2.losses.hard_em import HardEM
from rag2.losses.loop import LOOP
from rag2.losses.marginal import Marginal
from rag2.losses.pdist import PDist
from rag2.rag import Pair, Rag
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training.candidates import NULL
from rag2.training.step import OnePass, TwoPass
from rag2.tuning.lora import LoRA
from rag2.types import Chunk
from small_world import SHAPE, roughen

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture
def rag(tokenizer, generator: Generator) -> Rag:
    """Two towers and a Llama, all random, with posteriors that differ from chunk to chunk."""
    encoder = DualEncoder.build(EncoderConfig(towers="two", **SHAPE), tokenizer)
    for model in (encoder.towers, generator.model):
        roughen(model, 0.1)
    return Rag(encoder, generator, Prompt()).train()


@pytest.fixture
def batch(home: Path, chunks: list[Chunk], seed: int) -> Batch:
    """Three questions with four chunks each; they share the first chunk."""
    questions = split(load_questions(home / "data" / "questions.jsonl"), "train")
    picked = torch.randperm(len(questions))[:3].tolist()
    rows = torch.randperm(len(chunks))[:10].tolist()
    groups = [[rows[0], *rows[1 + 3 * b : 4 + 3 * b]] for b in range(3)]
    return (
        [questions[i].question for i in picked],
        [questions[i].gold for i in picked],
        [[chunks[i] for i in group] for group in groups],
    )


# --- what the loss reaches ------------------------------------------------------------------------

steps = pytest.mark.parametrize("step", [OnePass(), TwoPass(micro_batch=5)], ids=lambda s: s.name)


@steps
def test_a_step_reaches_every_tensor_but_the_key_biases_of_bert(rag: Rag, batch: Batch, step):
    names = {name for name, _ in rag.named_parameters()}
    # Softmax over keys does not feel what all keys have in common.
    keys = {name for name in names if name.endswith("attention.self.key.bias")}
    assert len(keys) == 2 * SHAPE["layers"] and not any("pooler" in name for name in names)
    assert dead(rag, step, batch) == keys
    assert {name.split(".")[0] for name in names} == {"retriever", "generator"}
    assert {"retriever.towers.question", "retriever.towers.chunk", "retriever.log_scale"} <= {
        ".".join(name.split(".")[:3]) for name in names
    }


@steps
def test_a_chunk_encoder_that_is_cut_off_is_noticed(
    rag: Rag, batch: Batch, step, monkeypatch: pytest.MonkeyPatch
):
    honest = DualEncoder.encode_chunks
    monkeypatch.setattr(
        DualEncoder, "encode_chunks", lambda self, texts: honest(self, texts).detach()
    )
    found = dead(rag, step, batch)
    towers = {n for n, _ in rag.named_parameters() if n.startswith("retriever.towers.chunk")}
    assert towers and towers <= found


def test_the_gradient_at_the_scores_is_prior_minus_posterior(rag: Rag, batch: Batch):
    scores_BK, _, logp_BKT, mask_BKT = rag.double()(*batch)
    scores_BK = scores_BK.detach().double().requires_grad_()
    logp_BKT = logp_BKT.detach().requires_grad_()
    loss_B, posterior_BK = Marginal()(scores_BK, logp_BKT, mask_BKT)
    (grad_BK,) = torch.autograd.grad(loss_B.sum(), scores_BK)
    prior_BK = scores_BK.detach().softmax(-1)
    assert float((grad_BK - (prior_BK - posterior_BK)).abs().max()) <= 1e-6
    assert float((prior_BK - posterior_BK).abs().max()) > 1e-3  # else the line above says nothing
    joint_BK = (prior_BK.log() + (logp_BKT * mask_BKT).detach().sum(-1)).softmax(-1)
    torch.testing.assert_close(posterior_BK, joint_BK)
    for level in ("sequence", "token"):
        loss = Marginal(level=level)
        assert torch.autograd.gradcheck(
            lambda s, y, loss=loss: loss(s, y, mask_BKT)[0],
            (scores_BK, logp_BKT),
            atol=1e-6,
            rtol=1e-6,
        )


@steps
def test_with_one_chunk_a_step_is_plain_cross_entropy(rag: Rag, batch: Batch, step):
    questions, answers, chunks_BK = batch
    single = (questions, answers, [row[:1] for row in chunks_BK])
    found = gradients(rag, step, single)
    rag.zero_grad(set_to_none=True)
    nll_B = []
    for context_ids, answer_ids in rag.pairs(*single):
        ids = torch.tensor([[*context_ids, *answer_ids]])
        logits = rag.generator(input_ids=ids).logits[0, len(context_ids) - 1 : -1]
        labels = torch.tensor(answer_ids)
        nll_B.append(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    torch.stack(nll_B).mean().backward()
    expected = {f"generator.{n}": p.grad for n, p in rag.generator.named_parameters()}
    for name, grad in found.items():
        if name.startswith("generator."):
            torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-3)
        else:  # one chunk is certain, whatever its score
            assert not grad.any(), name
    result = step(rag, Marginal(), *single)
    torch.testing.assert_close(result.loss_B, torch.stack(nll_B).detach(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(result.posterior_BK, torch.ones(3, 1))


def test_a_chunk_that_questions_share_is_encoded_once_and_scored_for_each(
    rag: Rag, batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []
    honest = DualEncoder.encode_chunks

    def counted(self: DualEncoder, texts: Sequence[str]) -> Tensor:
        seen.extend(texts)
        return honest(self, texts)

    monkeypatch.setattr(DualEncoder, "encode_chunks", counted)
    questions, _, chunks_BK = batch
    scores_BK, _ = rag.scores(questions, chunks_BK)
    assert len(seen) == len(set(seen)) == 10
    for row, question in enumerate(questions):
        alone_K = torch.cat([rag.scores([question], [[c]])[0][0] for c in chunks_BK[row]])
        torch.testing.assert_close(scores_BK[row], alone_K, atol=1e-4, rtol=1e-4)


def test_a_chunk_that_the_budget_has_no_room_for_stops_training(rag: Rag, batch: Batch):
    longest = max(len(rag.tokenizer.encode(c.passage)) for row in batch[2] for c in row)
    rag.prompt = Prompt(budget=longest)
    with pytest.raises(UserError, match=rf"prompt.budget={longest}: chunk \d+ of document .* fit"):
        rag.pairs(*batch)


# --- negatives from the batch --------------------------------------------------------------------


def test_in_batch_negatives_normalise_the_prior_over_all_chunks_of_the_batch(
    rag: Rag, batch: Batch
):
    questions, answers, chunks_BK = batch
    result = OnePass()(rag, Marginal(), *batch, in_batch=True)
    every = list({chunk.id: chunk for row in chunks_BK for chunk in row}.values())
    assert len(every) == 10
    with torch.no_grad():
        scores_BU, none_B = rag.scores(questions, [every] * 3)
        logp_RT, mask_RT = rag.logp(rag.pairs(questions, answers, [every] * 3))
    torch.testing.assert_close(none_B, torch.zeros(3), atol=1e-5, rtol=0)
    joint_BU = scores_BU.log_softmax(1) + (logp_RT * mask_RT).sum(1).view(3, 10)
    own_BU = torch.tensor([[c.id in {own.id for own in row} for c in every] for row in chunks_BK])
    by_hand_B = -joint_BU.masked_fill(~own_BU, -torch.inf).logsumexp(1)
    torch.testing.assert_close(result.loss_B, by_hand_B, atol=1e-4, rtol=1e-4)
    assert (result.loss_B >= -joint_BU.logsumexp(1) - 1e-4).all(), "no bound of the larger marginal"
    assert (result.loss_B > OnePass()(rag, Marginal(), *batch).loss_B).all()


def test_negatives_from_the_batch_push_the_retriever_away(rag: Rag, batch: Batch):
    questions, _, chunks_BK = batch
    rag.double()
    weights = [p for p in rag.retriever.parameters() if p.requires_grad]
    along = [torch.randn_like(weight) for weight in weights]
    rag.scores(questions, chunks_BK)[1].sum().backward()
    slope = sum(
        (p.grad * d).sum() for p, d in zip(weights, along, strict=True) if p.grad is not None
    )

    def crowding(size: float) -> Tensor:
        with torch.no_grad():
            for weight, direction in zip(weights, along, strict=True):
                weight.add_(direction, alpha=size)
            value = rag.scores(questions, chunks_BK)[1].sum()
            for weight, direction in zip(weights, along, strict=True):
                weight.sub_(direction, alpha=size)
        return value

    by_hand = (crowding(1e-6) - crowding(-1e-6)) / 2e-6
    assert abs(by_hand) > 1e-4
    torch.testing.assert_close(slope, by_hand, rtol=1e-4, atol=1e-6)


def test_one_question_alone_has_no_negatives_in_the_batch(rag: Rag, batch: Batch):
    questions, _, chunks_BK = batch
    _, crowding_B = rag.scores(questions[:1], chunks_BK[:1])
    torch.testing.assert_close(crowding_B, torch.zeros(1), atol=1e-5, rtol=0)


@steps
def test_a_loss_that_nothing_trainable_takes_part_in_leaves_everything_as_it_is(
    rag: Rag, batch: Batch, step: OnePass | TwoPass
):
    rag.retriever.requires_grad_(False)  # and without a reader the generator is only a teacher
    result = step(rag, PDist(reader="none"), *batch)
    assert result.loss_B.isfinite().all() and not any(grad.any() for grad in left(rag).values())


# --- the two equal paths --------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 5, 12, 64])
@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("in_batch", [False, True], ids=["own", "in_batch"])
def test_one_pass_and_two_passes_leave_equal_gradients(
    rag: Rag, batch: Batch, micro_batch: int, level, in_batch: bool
):
    results = []
    for step in (OnePass(), TwoPass(micro_batch=micro_batch)):
        rag.zero_grad(set_to_none=True)
        result = step(rag, Marginal(level=level), *batch, in_batch=in_batch)
        results.append((result, left(rag)))
    (one, a), (two, b) = results
    assert not differing(a, b)
    for field in ("loss_B", "posterior_BK", "prior_BK"):
        torch.testing.assert_close(getattr(one, field), getattr(two, field), atol=1e-4, rtol=1e-4)
    assert one.kept == two.kept == 1.0


@pytest.mark.parametrize("loss", [EMDR2(), PDist(), LOOP(), HardEM()], ids=lambda loss: loss.name)
def test_both_paths_agree_on_losses_that_read_chunks_together_and_on_the_null_chunk(
    rag: Rag, batch: Batch, loss: JointLoss
):
    questions, answers, chunks_BK = batch
    # Short ones: all of a question's chunks must fit one prompt.
    chunks_BK = [[*(replace(c, text=c.text[:150]) for c in row), NULL] for row in chunks_BK]
    results = []
    for step in (OnePass(), TwoPass(micro_batch=4)):
        rag.zero_grad(set_to_none=True)
        results.append((step(rag, loss, questions, answers, chunks_BK), left(rag)))
    (one, a), (two, b) = results
    assert not differing(a, b)
    torch.testing.assert_close(one.loss_B, two.loss_B, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.posterior_BK, two.posterior_BK, atol=1e-4, rtol=1e-4)
    for half in (rag.retriever, rag.generator):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in half.parameters())


def test_the_prompts_of_a_loss_hold_their_chunks_the_first_nearest_the_question(
    rag: Rag, batch: Batch
):
    questions, answers, chunks_BK = batch
    chunks_BK = [[*row[:2], NULL] for row in chunks_BK]
    subsets = EMDR2().subsets(3)
    assert subsets == [(0,), (1,), (2,), (0, 1, 2)]
    pairs = rag.pairs(questions, answers, chunks_BK, subsets)
    for row, question in enumerate(questions):
        first, second = (chunk.passage for chunk in chunks_BK[row][:2])
        for place, passages in enumerate([[first], [second], [], [first, second]]):
            expected = Prompt().context(question, passages, rag.tokenizer).text
            assert pairs[4 * row + place][0] == rag.tokenizer.encode(expected), place
        assert Prompt().context(question, [first, second], rag.tokenizer).text.startswith(second)


class Pieced(Rag):
    """One graph, but prompts go through the generator in the micro-batches of two passes.

    Dropout masks depend on the shape of a batch, so this is what `TwoPass` has to equal.
    """

    micro_batch = 5

    def logp(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        order = sorted(range(len(pairs)), key=lambda r: len(pairs[r][0]) + len(pairs[r][1]))
        width = max(len(answer) for _, answer in pairs)
        rows: list[Tensor] = [torch.empty(0)] * len(pairs)
        for start in range(0, len(order), self.micro_batch):
            piece = order[start : start + self.micro_batch]
            logp, _ = super().logp([pairs[r] for r in piece])
            logp = nn.functional.pad(logp, (0, width - logp.shape[1]))
            for row, values in zip(piece, logp, strict=True):
                rows[row] = values
        counts = torch.tensor([len(answer) for _, answer in pairs])
        return torch.stack(rows), torch.arange(width) < counts[:, None]


class Forgetful(TwoPass):
    """The planted fault: the second pass draws other dropout masks than the first."""

    def _second_pass(self, rag, pairs, pieces, states, grad_RT, felt_R):
        other = [torch.Generator().manual_seed(i).get_state() for i in range(len(states))]
        super()._second_pass(rag, pairs, pieces, other, grad_RT, felt_R)


def with_dropout(kind: str, tokenizer) -> Generator:
    """A generator that draws random numbers in training: in modules, or inside of attention."""
    vocabulary = len(tokenizer)
    if kind == "gpt2":
        sizes = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 2}
        rates = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes, **rates, **ends))
        return Generator(model.train(), tokenizer)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        attention_dropout=0.2 if kind == "llama attention" else 0.0,
    )
    model = LlamaForCausalLM(config)
    if kind == "lora":
        model = LoRA(rank=4, dropout=0.3).apply(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # B starts at zero, where dropout would change nothing
                    parameter.normal_(std=0.1)
    return Generator(model.train(), tokenizer)


@pytest.mark.parametrize("kind", ["gpt2", "lora", "llama attention"])
def test_with_dropout_both_passes_draw_the_same_masks(rag: Rag, batch: Batch, tokenizer, kind: str):
    pieced = Pieced(rag.retriever, with_dropout(kind, tokenizer), Prompt()).train()
    one = gradients(pieced, OnePass(), batch)
    plain = Rag(rag.retriever, Generator(pieced.generator, tokenizer), Prompt()).train()
    two = gradients(plain, TwoPass(micro_batch=Pieced.micro_batch), batch)
    assert not differing(one, two)
    again = gradients(plain, TwoPass(micro_batch=Pieced.micro_batch), batch, seed=1)
    assert differing(one, again), "dropout does nothing here: the test could not fail"
    assert differing(one, gradients(plain, Forgetful(micro_batch=Pieced.micro_batch), batch))


def test_two_passes_leave_the_random_state_that_one_pass_leaves(rag: Rag, batch: Batch, tokenizer):
    pieced = Pieced(rag.retriever, with_dropout("gpt2", tokenizer), Prompt()).train()
    plain = Rag(rag.retriever, Generator(pieced.generator, tokenizer), Prompt()).train()
    states = []
    for module, step in ((pieced, OnePass()), (plain, TwoPass(micro_batch=Pieced.micro_batch))):
        gradients(module, step, batch)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


# --- prompts that the loss does not feel ----------------------------------------------------------


def test_skipping_leaves_out_the_share_of_the_skipped_prompts_and_nothing_else(
    rag: Rag, batch: Batch
):
    full = gradients(rag, TwoPass(micro_batch=5), batch)
    posterior_BK = TwoPass()(rag, Marginal(), *batch).posterior_BK
    # In the widest gap, so that rounding, which differs between the passes, moves none across.
    ranked_R = posterior_BK.flatten().sort().values
    skipped = int(ranked_R.diff()[2:9].argmax()) + 3  # 3..9 of the twelve prompts
    bar = float(ranked_R[skipped - 1 : skipped + 1].mean())
    rag.zero_grad(set_to_none=True)
    result = TwoPass(micro_batch=5, skip_below=bar)(rag, Marginal(), *batch)
    short = left(rag)
    assert result.kept == pytest.approx(1 - skipped / 12)
    skipped_R = (posterior_BK < bar).flatten()
    # What is missing is -r_k grad logp_k of each skipped prompt, k by k.
    rag.zero_grad(set_to_none=True)
    logp_RT, mask_RT = rag.logp(rag.pairs(*batch))
    weight_R = posterior_BK.flatten() * skipped_R / len(batch[0])
    (-(weight_R * (logp_RT * mask_RT).sum(1))).sum().backward()
    missing = {f"generator.{n}": p.grad for n, p in rag.generator.named_parameters()}
    whole = {n: short[n] + missing.get(n, 0.0) for n in short}
    assert not differing(full, whole)
    assert differing(full, short), "nothing was skipped: the test could not fail"
    assert all(torch.equal(full[n], short[n]) for n in full if n.startswith("retriever"))


def test_skipping_changes_the_gradient_by_at_most_the_skipped_mass(rag: Rag, batch: Batch):
    full = gradients(rag, TwoPass(), batch)
    posterior_BK = TwoPass()(rag, Marginal(), *batch).posterior_BK
    norm_R = []
    for pair in rag.pairs(*batch):
        rag.zero_grad(set_to_none=True)
        rag.logp([pair])[0].sum().backward()
        norm_R.append(norm({n: p.grad for n, p in rag.generator.named_parameters()}))
    for bar in (0.01, 0.1, 0.3, 0.99):
        short = gradients(rag, TwoPass(skip_below=bar), batch)
        mass = float((posterior_BK * (posterior_BK < bar)).sum(-1).mean())
        change = norm({n: full[n] - short[n] for n in full})
        assert change <= mass * max(norm_R) * 1.01 + 1e-5, (bar, mass)


def norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([t.norm() for t in tensors.values()]).norm())


def test_a_frozen_generator_is_read_once_and_gets_no_gradient(
    rag: Rag, batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    before = gradients(rag, TwoPass(), batch)
    rag.generator.requires_grad_(False)
    calls = []
    honest = Rag.logp
    monkeypatch.setattr(Rag, "logp", lambda self, pairs: (calls.append(1), honest(self, pairs))[1])
    after = gradients(rag, TwoPass(), batch)
    assert len(calls) == 1
    for name, grad in after.items():
        if name.startswith("generator."):
            assert not grad.any()
        else:
            torch.testing.assert_close(grad, before[name])
