"""The joint step in one pass and in two: equal gradients, dropout included, and what is skipped."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from joint_gradients import Batch, differing, gradients, left
from rag2.generator.load import Generator
from rag2.generator.prompt import Prompt
from rag2.losses.base import JointLoss
from rag2.losses.emdr2 import EMDR2
from rag2.losses.hard_em import HardEM
from rag2.losses.loop import LOOP
from rag2.losses.marginal import Marginal
from rag2.losses.pdist import PDist
from rag2.rag import Pair, RagModel
from rag2.training.candidates import NULL
from rag2.training.step import OnePass, TwoPass
from rag2.tuning.lora import LoRA

pytestmark = pytest.mark.usefixtures("seed")


# --- the two equal paths --------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 5, 12, 64])
@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("in_batch", [False, True], ids=["own", "in_batch"])
def test_one_pass_and_two_passes_leave_equal_gradients(
    rag: RagModel, batch: Batch, micro_batch: int, level, in_batch: bool
):
    results = []
    for step in (OnePass(), TwoPass(micro_batch=micro_batch)):
        rag.zero_grad(set_to_none=True)
        result = step(rag, Marginal(level=level), *batch, in_batch=in_batch)
        results.append((result, left(rag)))
    (one, a), (two, b) = results
    assert not differing(a, b)
    for field in ("loss_B", "posterior_BK"):
        torch.testing.assert_close(getattr(one, field), getattr(two, field), atol=1e-4, rtol=1e-4)
    assert one.kept == two.kept == 1.0


@pytest.mark.parametrize(
    "loss",
    [EMDR2(), PDist(), LOOP(), HardEM(), Marginal(level="mean"), EMDR2(level="token")],
    ids=repr,
)
def test_both_paths_agree_on_losses_that_read_chunks_together_and_on_the_null_chunk(
    rag: RagModel, batch: Batch, loss: JointLoss
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
    rag: RagModel, batch: Batch
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


class Pieced(RagModel):
    """One graph, but prompts go through the generator in the micro-batches of two passes.

    Dropout masks depend on the shape of a batch, so this is what `TwoPass` has to equal.
    """

    micro_batch = 5

    def head_weight(self) -> None:
        """Log-probabilities, not a loss closed in the head."""

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
def test_with_dropout_both_passes_draw_the_same_masks(
    rag: RagModel, batch: Batch, tokenizer, kind: str
):
    pieced = Pieced(rag.retriever, with_dropout(kind, tokenizer), Prompt()).train()
    one = gradients(pieced, OnePass(), batch)
    plain = RagModel(rag.retriever, Generator(pieced.generator, tokenizer), Prompt()).train()
    two = gradients(plain, TwoPass(micro_batch=Pieced.micro_batch), batch)
    assert not differing(one, two)
    again = gradients(plain, TwoPass(micro_batch=Pieced.micro_batch), batch, seed=1)
    assert differing(one, again), "dropout does nothing here: the test could not fail"
    assert differing(one, gradients(plain, Forgetful(micro_batch=Pieced.micro_batch), batch))


def test_two_passes_leave_the_random_state_that_one_pass_leaves(
    rag: RagModel, batch: Batch, tokenizer
):
    pieced = Pieced(rag.retriever, with_dropout("gpt2", tokenizer), Prompt()).train()
    plain = RagModel(rag.retriever, Generator(pieced.generator, tokenizer), Prompt()).train()
    states = []
    for module, step in ((pieced, OnePass()), (plain, TwoPass(micro_batch=Pieced.micro_batch))):
        gradients(module, step, batch)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


class Unfused(RagModel):
    """A generator whose head is more than a matrix."""

    def head_weight(self) -> None:
        """None."""


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize(
    "loss",
    [Marginal(level="token"), EMDR2(), PDist(), PDist(reader="none"), LOOP(), HardEM()],
    ids=lambda loss: f"{loss.name}-{loss.model_dump_json()}",
)
def test_one_pass_is_the_same_through_the_fused_head_and_through_log_probabilities(
    rag: RagModel, batch: Batch, tokenizer, loss: JointLoss, in_batch: bool
):
    questions, answers, chunks_BK = batch
    short_BK = [[replace(c, text=c.text[:150]) for c in row] for row in chunks_BK]
    unfused = Unfused(rag.double().retriever, Generator(rag.generator, tokenizer), rag.prompt)
    found, reached, results = [], [], []
    for module in (rag, unfused):
        module.zero_grad(set_to_none=True)
        results.append(OnePass()(module, loss, questions, answers, short_BK, in_batch))
        found.append(left(module))
        reached.append({n for n, p in module.named_parameters() if p.grad is not None})
    assert reached[0] == reached[1] and reached[0] and not differing(*found)
    torch.testing.assert_close(results[0].loss_B, results[1].loss_B, rtol=1e-9, atol=0)
    torch.testing.assert_close(results[0].posterior_BK, results[1].posterior_BK)


def test_skipping_in_one_pass_spares_the_head_and_leaves_the_retriever_its_gradient(
    rag: RagModel, batch: Batch
):
    full = gradients(rag, OnePass(), batch)
    posterior_BK = OnePass()(rag, Marginal(), *batch).posterior_BK
    bar = float(posterior_BK.median())
    assert 0 < OnePass(skip_below=bar)(rag, Marginal(), *batch).kept < 1
    short = gradients(rag, OnePass(skip_below=bar), batch)
    changed = set(differing(full, short))
    assert changed and all(name.startswith("generator.") for name in changed)


# --- prompts that the loss does not feel ----------------------------------------------------------


def test_skipping_leaves_out_the_share_of_the_skipped_prompts_and_nothing_else(
    rag: RagModel, batch: Batch
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


@pytest.mark.parametrize(
    ("loss", "kept"),
    [(Marginal(), 1.0), (HardEM(), 1 / 4), (EMDR2(), 1 / 5), (PDist(), 1 / 5), (LOOP(), 1 / 5)],
    ids=lambda value: getattr(value, "name", None),
)
def test_prompts_that_the_loss_does_not_feel_at_all_are_never_read_twice(
    rag: RagModel, batch: Batch, loss: JointLoss, kept: float
):
    questions, answers, chunks_BK = batch
    chunks_BK = [[replace(c, text=c.text[:150]) for c in row] for row in chunks_BK]
    assert TwoPass()(rag, loss, questions, answers, chunks_BK).kept == pytest.approx(kept)


def test_skipping_changes_the_gradient_by_at_most_the_skipped_mass(rag: RagModel, batch: Batch):
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
    rag: RagModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    before = gradients(rag, TwoPass(), batch)
    rag.generator.requires_grad_(False)
    calls = []
    honest = RagModel.logp
    monkeypatch.setattr(
        RagModel, "logp", lambda self, pairs: (calls.append(1), honest(self, pairs))[1]
    )
    after = gradients(rag, TwoPass(), batch)
    assert len(calls) == 1
    for name, grad in after.items():
        if name.startswith("generator."):
            assert not grad.any()
        else:
            torch.testing.assert_close(grad, before[name])
