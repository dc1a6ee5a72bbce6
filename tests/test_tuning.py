"""Tuning methods: what trains, and that merging changes nothing."""

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from rag2.training.optim import trainable
from rag2.tuning.full import Full
from rag2.tuning.lora import LoRA

pytestmark = pytest.mark.usefixtures("seed")


def trained_parameters(model) -> int:
    """Number of trainable weights; tied weights count once."""
    return sum(p.numel() for p in trainable([model]))


def causal_lm():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )


def text_encoder():
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False)


def train(model, steps=3):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        # Cubes: the mean square of what a LayerNorm gives is the same for all weights.
        model(input_ids=torch.randint(50, (4, 8)))[0].pow(3).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


models = pytest.mark.parametrize("make", [causal_lm, text_encoder])


@models
def test_lora_starts_as_the_base_and_merged_equals_unmerged(make):
    model, ids, lora = make().double(), torch.randint(50, (3, 9)), LoRA(rank=4)
    before = model(input_ids=ids)[0].detach()
    adapted: Any = lora.apply(model)
    torch.testing.assert_close(adapted(input_ids=ids)[0], before)
    train(adapted)
    unmerged = adapted(input_ids=ids)[0].detach()
    assert (unmerged - before).abs().max() > 1e-3  # else the comparison below shows nothing
    merged = lora.merge(adapted)
    assert type(merged) is type(make())
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(merged(input_ids=ids)[0], unmerged, rtol=0, atol=1e-5)


@models
def test_lora_trains_only_its_adapters_in_every_linear_layer_but_the_head(make):
    model = make()
    linear = [
        m
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    ]
    expected = sum(4 * (m.in_features + m.out_features) for m in linear)
    adapted = LoRA(rank=4).apply(model)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert trained_parameters(adapted) == expected
    frozen = {n: p.clone() for n, p in adapted.named_parameters() if n not in trained}
    train(adapted)
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.named_parameters() if n in frozen)


def test_full_tuning_trains_every_weight_and_has_nothing_to_merge():
    model = causal_lm().requires_grad_(False)
    assert trained_parameters(model) == 0
    full = Full()
    tuned = full.apply(model)
    assert trained_parameters(tuned) == sum(p.numel() for p in model.parameters())
    assert full.merge(tuned) is model
