"""Log p(continuation | context) in training: with gradient, and logits only where answers are."""

from typing import Any

import peft
import pytest
import torch

from rag2.generator.head import plain_weight
from rag2.generator.learning import answer_logprob_rows, sequence_nll
from rag2.generator.logprob import (
    Request,
    choice_logprobs,
    pair_logprobs,
)
from small_models import (
    CONFIGS,
    SPECIAL,
    build,
    by_hand,
    ids,
    pairs_of,
    random_requests,
    small_tokenizer,
)

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.mark.parametrize("batch_tokens", [None, 60])
@pytest.mark.parametrize("name", [*CONFIGS, *SPECIAL])
def test_answer_rows_equal_the_models_logits_with_gradients_to_every_tensor(
    name, batch_tokens, tmp_path, tokenizer
):
    model = build(name, tmp_path, tokenizer).double()
    pairs = [(ids(1, 20), ids(1, 4)) for _ in range(6)]
    assert (plain_weight(model) is not None) == (name in CONFIGS or name == "sliding_mistral")
    logp_RT, mask_RT = answer_logprob_rows(model, pairs, batch_tokens)
    assert mask_RT.sum(-1).tolist() == [len(continuation) for _, continuation in pairs]
    assert not logp_RT[~mask_RT].any()

    rows = []
    for context, continuation in pairs:
        logp_LV = model(torch.tensor([[*context, *continuation]])).logits[0].log_softmax(-1)
        predicted_TV = logp_LV[len(context) - 1 : -1]
        rows.append(predicted_TV.gather(-1, torch.tensor(continuation)[:, None])[:, 0])
    torch.testing.assert_close(logp_RT[mask_RT], torch.cat(rows), rtol=0, atol=1e-5)

    weights_M = torch.randn(int(mask_RT.sum()), dtype=torch.float64)
    got, expected = (
        torch.autograd.grad((weights_M * logp_M).sum(), list(model.parameters()))
        for logp_M in (logp_RT[mask_RT], torch.cat(rows))
    )
    for (name, _), a, b in zip(model.named_parameters(), got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert all(gradient.any() for gradient in got)


def test_the_head_computes_no_logits_but_those_of_the_answers(tmp_path, tokenizer):
    model = build("llama", tmp_path, tokenizer)
    seen = []
    plain_weight(model)
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    answer_logprob_rows(model, [(ids(20, 20), [5, 6]), (ids(9, 9), [7])])
    assert seen == [(1, 1, 300)], "the fused path needs none, the head runs on a single row"
    seen.clear()
    pair_logprobs(model, [(ids(20, 20), [5, 6]), (ids(9, 9), [7])])
    assert seen == [(1, 1, 300)]
    seen.clear()
    pair_logprobs(model.bfloat16(), [(ids(20, 20), [5, 6]), (ids(9, 9), [7])])
    assert seen == [(1, 3, 300)], "a model in half precision gives its own, rounded logits"
    assert len(model.lm_head._forward_pre_hooks) == 0


def test_a_head_that_is_no_bare_matrix_is_told_once(tmp_path, tokenizer, caplog):
    model = build("scaled_cohere", tmp_path, tokenizer)
    for _ in range(2):
        answer_logprob_rows(model, [(ids(5, 5), [7])])
    assert [r.message for r in caplog.records if "head" in r.message] == [caplog.messages[-1]]


def test_the_probe_of_the_head_does_not_advance_the_random_state(tmp_path, tokenizer):
    model = build("gpt2", tmp_path, tokenizer).train()
    before = torch.get_rng_state()
    assert plain_weight(model) is not None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["lora", "lora_head", "prompt", "prefix"])
def test_wrapped_models_are_scored_with_their_adapters(method, tmp_path, tokenizer):
    base = build("qwen3", tmp_path, tokenizer)
    pair = (ids(10, 10), ids(3, 3))
    before = by_hand(base, pair)
    causal: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    config = {
        "lora": lambda: peft.LoraConfig(
            **causal, target_modules=["q_proj"], init_lora_weights=False
        ),
        "lora_head": lambda: peft.LoraConfig(
            **causal, target_modules=["lm_head"], init_lora_weights=False
        ),
        "prompt": lambda: peft.PromptTuningConfig(**causal, num_virtual_tokens=3),
        "prefix": lambda: peft.PrefixTuningConfig(**causal, num_virtual_tokens=3),
    }[method]()
    model = peft.get_peft_model(base, config).eval()
    assert (plain_weight(model) is not None) == (method != "lora_head")
    requests = [Request(pair[0], [pair[1], ids(2, 2)]), *random_requests(3)]
    logp_RT, mask_RT = answer_logprob_rows(model, pairs_of(requests))
    if method in ("lora", "lora_head"):  # the others put logits of virtual tokens in front
        assert logp_RT[0, :3].tolist() == pytest.approx(by_hand(model, pair), abs=2e-5)
    assert logp_RT[0, :3].tolist() != pytest.approx(before, abs=1e-3)
    sums = logp_RT.sum(-1).tolist()
    assert pair_logprobs(model, pairs_of(requests)) == pytest.approx(sums, abs=5e-5)
    assert sum(choice_logprobs(model, requests), []) == pytest.approx(sums, abs=5e-5)
    logp_RT.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["llama", "scaled_cohere"])
def test_sequence_nll_is_the_weighted_mean_of_the_tokens_losses(name, tmp_path, tokenizer):
    model = build(name, tmp_path, tokenizer)
    ids_BL = torch.randint(3, 300, (3, 12))
    weights_BL = torch.rand(3, 12)
    weights_BL[1, 7:] = 0
    loss = sequence_nll(model, ids_BL, weights_BL)
    logp_BLV = model(ids_BL).logits[:, :-1].log_softmax(-1)
    logp_BL = logp_BLV.gather(-1, ids_BL[:, 1:, None])[..., 0]
    expected = -(weights_BL[:, 1:] * logp_BL).sum() / weights_BL[:, 1:].sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    ids_BL[1, 8:] = 2  # what stands in the padding does not matter
    torch.testing.assert_close(sequence_nll(model, ids_BL, weights_BL), loss)
    full = torch.ones_like(ids_BL).float()
    hf = model(ids_BL, labels=ids_BL).loss
    torch.testing.assert_close(sequence_nll(model, ids_BL, full), hf, rtol=1e-5, atol=1e-5)


def test_shapes_grow_in_steps_but_never_past_the_models_positions(tmp_path, tokenizer):
    model = build("llama", tmp_path, tokenizer)
    widths, model.config.max_position_embeddings = [], 70
    plain_weight(model)  # it looks at the model once, with an input of its own
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: widths.append(out.shape[1]))
    for length in (3, 17, 48, 66):
        context, answer = ids(length - 2, length - 2), ids(2, 2)
        logp_RT, _ = answer_logprob_rows(model, [(context, answer)])
        alone = model(torch.tensor([[*context, *answer]])).logits[0].log_softmax(-1)
        expected = alone[length - 3 : -1].gather(-1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(logp_RT[0], expected, rtol=0, atol=1e-5)
    assert widths[::2] == [16, 16, 48, 70]
