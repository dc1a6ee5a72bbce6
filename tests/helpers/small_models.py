"""Random causal language models of several families, and their log-probabilities by hand."""

import random
from typing import Any

import torch
import transformers

from rag2.generator.bpe import train_bpe
from rag2.generator.load import Generator
from rag2.generator.logprob import Request
from rag2.generator.pairs import encode_pairs

WORDS = ["harbour", "lantern", "copper", "meadow", "Karin", "lives", "near", "the", "old", "mill"]


def small_tokenizer():
    """300 tokens; Karin is a word that surely is one of them."""
    texts = [" ".join(random.choices(WORDS, k=12)) for _ in range(40)]
    return train_bpe(["Karin"] * 200 + texts, 300)


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    return encode_pairs(tokenizer, [(context, continuation)])[0]


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
