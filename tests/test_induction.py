"""The start of a base that is trained from scratch: two heads that look back."""

import numpy as np
import pytest
import torch

from rag2.generator import load
from rag2.generator.learning import sequence_nll
from rag2.generator.load import build_llama
from rag2.training import optim
from rag2.training.sequences import Weighted, collate

pytestmark = pytest.mark.usefixtures("seed")


def attentions(model, ids_BL: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Weights (B, heads, L, L) of each layer."""
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        return model(ids_BL, output_attentions=True).attentions


def test_a_base_is_born_with_a_head_on_the_token_before_and_one_on_what_followed_it(tokenizer):
    size = 50
    built = build_llama(tokenizer, 256, 2, 4, 64, 2 * size).model
    ids_BL = torch.stack([torch.randperm(len(tokenizer))[:size] for _ in range(4)]).repeat(1, 2)
    first, second = attentions(built, ids_BL)
    assert first[:, 0].diagonal(-1, 1, 2).mean() > 0.99
    again = torch.arange(size, 2 * size)
    followed = again - size + 1  # where the same token stood before, one on
    found = second[:, 0, again, followed].mean()
    assert found > 10 / size  # an even share is less than 1 / size
    others = second[:, 1:, again, followed].mean()
    assert others < 2 / size  # the other heads are as random as ever


def test_copying_from_many_distances_is_learnt_in_some_steps_with_the_two_heads_and_not_without(
    tokenizer, monkeypatch: pytest.MonkeyPatch, rng
):
    def row(size: int) -> Weighted:
        """Random tokens that come again and again after 4 to 12; only repeats count in the loss."""
        period = int(rng.integers(4, 13))
        ids_L = np.resize(rng.integers(5, len(tokenizer), period), size)
        return Weighted(ids_L, (np.arange(size) > period).astype(np.float32))

    def copied(size: int = 24, steps: int = 60) -> float:
        """Share of right tokens in the second half of random rows of twice 8 tokens."""
        model = build_llama(tokenizer, 64, 2, 2, 64, size).model
        optimizer = optim.muon(model, 1e-2, 1e-2, 0.0, (0.9, 0.98))
        for _ in range(steps):
            optimizer.zero_grad()
            sequence_nll(model, *collate([row(size) for _ in range(16)])).backward()
            optimizer.step()
        ids_BL = torch.from_numpy(rng.integers(5, len(tokenizer), (64, 8))).repeat(1, 2)
        with torch.no_grad():
            said_BL = model(ids_BL).logits.argmax(-1)
        return float((said_BL[:, 8:-1] == ids_BL[:, 9:]).float().mean())

    with_the_heads = copied()
    monkeypatch.setattr(load, "looking_back", lambda model: None)
    assert with_the_heads > 0.5 > 2 * copied()


@pytest.mark.parametrize(("layers", "same"), [(1, True), (2, False)])
def test_a_base_of_one_layer_stays_as_random_as_it_was(
    tokenizer, monkeypatch: pytest.MonkeyPatch, seed: int, layers: int, same: bool
):
    def weights() -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_llama(tokenizer, 32, layers, 4, 48, 64).model.state_dict()

    born = weights()
    monkeypatch.setattr(load, "looking_back", lambda model: None)
    assert all(tensor.equal(born[name]) for name, tensor in weights().items()) == same
