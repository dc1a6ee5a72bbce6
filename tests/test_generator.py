"""Tokenizer, prompt, loading, and the one quantity: log p(continuation | context)."""

import math
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import peft
import pytest
import torch
import transformers

from rag2.generator.bpe import train_bpe
from rag2.generator.head import plain_weight
from rag2.generator.load import Generator, build_llama
from rag2.generator.logprob import (
    Request,
    answer_logprob_rows,
    choice_logprobs,
    encode_pairs,
    pair_logprobs,
    score_choices,
    sequence_nll,
)
from rag2.generator.past import Past, shares_past
from rag2.generator.prefixes import shared_prefixes
from rag2.generator.prompt import Prompt
from rag2.registry import UserError

WORDS = ["harbour", "lantern", "copper", "meadow", "Karin", "lives", "near", "the", "old", "mill"]


@pytest.fixture(autouse=True)
def seed() -> int:
    """Fresh models and token ids in every run; pytest shows the seed of a failing test."""
    value = random.SystemRandom().randrange(2**31)
    print(f"seed {value}")  # noqa: T201
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture(scope="module")
def tokenizer():
    texts = [" ".join(random.choices(WORDS, k=12)) for _ in range(40)]
    return train_bpe(["Karin"] * 200 + texts, 300)  # Karin: a word that surely is one token


SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # sharp distributions: a wrong position or mask shows
}
GPT2: dict[str, Any] = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3
    ),
}
# What the shared cache or the fused head must leave alone.
SPECIAL = {
    "sliding_mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=8),
    "softcapped_gemma2": lambda: transformers.Gemma2Config(
        **SIZES, head_dim=8, final_logit_softcapping=5.0
    ),
    "scaled_cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.2),
    "biased_phi": lambda: transformers.PhiConfig(**SIZES),
}


def build(name: str, tmp_path, tokenizer):
    """A random model of the family, written to disk and read back through `Generator.load`."""
    config = (CONFIGS | SPECIAL)[name]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases of zero and norms of one would hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
    Generator(model, tokenizer).save(tmp_path / name)
    return Generator.load(tmp_path / name).model


def ids(low: int, high: int) -> list[int]:
    return [random.randrange(3, 300) for _ in range(random.randint(low, high))]


def random_requests(number: int) -> list[Request]:
    choices = [[ids(1, 4) for _ in range(random.randint(1, 5))] for _ in range(number)]
    return [Request(ids(1, 40), continuations) for continuations in choices]


def pairs_of(requests):
    return [(r.context_ids, c) for r in requests for c in r.continuations]


def by_hand(model, pair) -> list[float]:
    """log p of each continuation token from the full logits of one unpadded sequence."""
    context, continuation = pair
    logits_LV = model(torch.tensor([[*context, *continuation]])).logits[0].float()
    logp_LV = logits_LV.log_softmax(-1)
    return [logp_LV[len(context) + t - 1, token].item() for t, token in enumerate(continuation)]


# -- tokenizer -----------------------------------------------------------------------------------


def test_the_tokenizer_represents_every_text_and_survives_a_round_trip(tokenizer, tmp_path):
    text = "Karin lives  near\n\tthe mill, 1987: \u00e9\u4e2d\U0001f600\x00"
    encoded = tokenizer.encode(text)
    assert encoded[0] == tokenizer.bos_token_id and encoded.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(encoded[1:]) == text
    assert tokenizer.unk_token is None and len(tokenizer) == 300
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode(text) == encoded and again.pad_token == "<pad>"
    assert (again.cls_token, again.sep_token, again.mask_token) == ("<s>", "</s>", "<pad>")


def test_the_same_texts_give_the_same_tokenizer():
    texts = [" ".join(random.choices(WORDS, k=9)) for _ in range(30)]
    first, second = (train_bpe(iter(texts), 290).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(UserError, match="vocab_size 200 .* 259"):
        train_bpe(["text"], 200)


# -- prompt --------------------------------------------------------------------------------------


def test_a_number_has_the_same_tokens_at_the_start_of_a_line_as_after_a_space():
    tokenizer = train_bpe(["in 1848 and\n1848 again, 42,972 of 42,972"] * 50, 400)
    ids = {digit: tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"}
    spelled = [ids["4"], ids["2"]]
    for text in ("42", "a 42", "a\n42"):
        assert tokenizer.encode(text)[-2:] == spelled
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_the_best_passage_stands_nearest_to_the_question(tokenizer):
    built = Prompt().context("Who?", ["best", "second"], tokenizer)
    assert built.text == "second\n\nbest\n\nQuestion: Who?\nAnswer:" and built.dropped == 0
    assert Prompt().context(" Who? ", [], tokenizer).text == "Question: Who?\nAnswer:"
    assert Prompt().continuations(["Karin"]) == [" Karin"]


def test_letters_lists_the_choices_as_mmlu_does(tokenizer):
    prompt = Prompt(format="letters")
    built = prompt.context("Who?", ["p"], tokenizer, choices=["Karin", "Ola"])
    assert built.text == "p\n\nWho?\nA. Karin\nB. Ola\nAnswer:"
    assert prompt.continuations(["Karin", "Ola"]) == [" A", " B"]
    with pytest.raises(UserError, match="needs the choices"):
        prompt.context("Who?", [], tokenizer)
    with pytest.raises(UserError, match="26 letters, not 27"):
        prompt.continuations(["x"] * 27)


def test_passages_over_budget_are_dropped_whole_worst_first_and_counted(tokenizer):
    passages = [f"{word} {'mill ' * 10}" for word in ("best", "second", "worst")]
    whole = len(tokenizer.encode(Prompt().context("Who?", passages, tokenizer).text))
    assert Prompt(budget=whole).context("Who?", passages, tokenizer).dropped == 0
    built = Prompt(budget=whole - 1).context("Who?", passages, tokenizer)
    assert built.dropped == 1
    assert built.text == f"{passages[1]}\n\n{passages[0]}\n\nQuestion: Who?\nAnswer:"


def test_a_question_that_does_not_fit_is_refused_not_cut(tokenizer):
    with pytest.raises(UserError, match="budget=10 .* alone takes"):
        Prompt(budget=10).context("mill " * 50, ["p"], tokenizer)


# -- encode_pairs --------------------------------------------------------------------------------


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    return encode_pairs(tokenizer, [(context, continuation)])[0]


def test_whitespace_at_the_end_of_the_context_moves_to_the_continuation(tokenizer):
    moved = encode_pair(tokenizer, "Karin lives near \n", "the mill")
    assert moved == encode_pair(tokenizer, "Karin lives near", " \nthe mill")
    assert tokenizer.decode(moved[1]) == " \nthe mill"
    assert sum(moved, []) == tokenizer.encode("Karin lives near \nthe mill")


def test_an_empty_context_is_the_beginning_of_text(tokenizer):
    bare = tokenizer.encode("mill", add_special_tokens=False)
    assert encode_pair(tokenizer, "", "mill") == ([0], bare)
    assert encode_pair(tokenizer, "", "<s>mill") == ([0], bare)


def test_a_beginning_of_text_written_in_the_context_is_not_doubled(tokenizer):
    assert encode_pair(tokenizer, "<s>Karin", " lives") == encode_pair(tokenizer, "Karin", " lives")


@pytest.mark.parametrize("context, continuation", [("Karin", ""), ("", ""), ("Ka", "rin")])
def test_a_continuation_without_a_token_of_its_own_is_refused(tokenizer, context, continuation):
    assert len(tokenizer.encode("Karin")) == 2
    with pytest.raises(UserError, match="no token of its own"):
        encode_pair(tokenizer, context, continuation)


# -- loading -------------------------------------------------------------------------------------


def test_a_generator_survives_a_round_trip_and_its_fingerprint_sees_every_weight(
    tokenizer, tmp_path
):
    generator = build_llama(tokenizer, 32, 2, 4, 48, 64)
    assert generator.model.config._attn_implementation == "sdpa"
    generator.save(tmp_path / "g")
    assert (tmp_path / "g/model.safetensors").exists()
    loaded = Generator.load(tmp_path / "g")
    assert loaded.fingerprint() == generator.fingerprint() and not loaded.model.training
    half = Generator.load(tmp_path / "g", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16 and half.fingerprint() != generator.fingerprint()
    with torch.no_grad():
        loaded.model.model.norm.weight[3] += 1e-3
    assert loaded.fingerprint() != generator.fingerprint()


def test_a_missing_pad_token_falls_back_to_eos(tokenizer, tmp_path):
    build_llama(tokenizer, 32, 1, 4, 48, 64).save(tmp_path)
    bare = transformers.AutoTokenizer.from_pretrained(tmp_path)
    bare.pad_token = bare.mask_token = None
    bare.save_pretrained(tmp_path)
    assert Generator.load(tmp_path).tokenizer.pad_token == "</s>"


def test_mistakes_in_loading_are_one_clear_line(tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in [
        ("nothing", "does not exist"),
        ("empty", "config.json"),
        ("file", "is a"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            Generator.load(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="Did you mean 'bfloat16'"):
        Generator.load(tmp_path, dtype="bfloat")
    (tmp_path / "empty/config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load generator"):
        Generator.load(tmp_path / "empty")
    with pytest.raises(UserError, match="4 heads"):
        build_llama(tokenizer, 36, 1, 4, 48, 64)


# -- evaluation ----------------------------------------------------------------------------------


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
    choice_logprobs(model, [Request(ids(30, 30), [ids(2, 2) for _ in range(4)])])
    assert seen == [(1, 30), (4, 1)]
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
    assert [len(s) for s in scores] == [2, 3, 1] and scores[0][1] == scores[2][0]
    for context, continuations, got in zip(contexts, choices, scores, strict=True):
        expected = [
            sum(by_hand(model, encode_pair(tokenizer, context, choice))) for choice in continuations
        ]
        assert got == pytest.approx(expected, abs=2e-5)


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


# -- training ------------------------------------------------------------------------------------


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
    assert seen == [(1, 3, 300)]
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
