"""Every tuning method in a small size, and how many weights it trains by its formula."""

from typing import Any

import torch

from rag2.generator.learning import answer_logprob_rows
from rag2.generator.load import Generator
from rag2.generator.logprob import pair_logprobs
from rag2.registry import TABLES, lookup

RANK, TOKENS, WIDTH = 3, 5, 6
LOW_RANK = ("lora", "dora", "rslora", "qlora")
VIRTUAL = ("prefix", "prompt", "p_tuning")
METHODS = tuple(TABLES["tuning"])
ADAPTERS = tuple(name for name in METHODS if name != "full")
MERGED = (*LOW_RANK, "ia3")
SIZES: dict[str, dict[str, Any]] = {
    **{name: {"rank": RANK, "alpha": 2 * RANK} for name in LOW_RANK},
    **{name: {"tokens": TOKENS} for name in VIRTUAL},
    "p_tuning": {"tokens": TOKENS, "width": WIDTH},
    "houlsby": {"width": WIDTH},
    "pfeiffer": {"width": WIDTH},
}
PAIRS = [([5, 6, 7, 8, 9] * 3, [3, 4]), ([9, 8], [7]), ([11, 12, 13], [14, 15, 16])]

# (in, out) of the linear layers of a block of small_models: hidden 32, MLP 48, 2 of 4 heads of 8.
LLAMA = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32)} | {
    "gate": (32, 48),
    "up": (32, 48),
    "down": (48, 32),
}
GPT2 = {"c_attn": (32, 96), "o": (32, 32), "c_fc": (32, 128), "down": (128, 32)}
LAYERS, HIDDEN = 2, 32


def method(name: str, **changes: Any) -> Any:
    """A method by its name."""
    return lookup("tuning", name)(**SIZES.get(name, {}) | changes)


def formula(name: str, family: str) -> int:
    """The trained weights of `method(name)` on a family of small_models, but for `full`."""
    block = GPT2 if family == "gpt2" else LLAMA
    inputs, outputs = (sum(pair[i] for pair in block.values()) for i in (0, 1))
    cached = 32 if family == "gpt2" else 16  # of a key, all heads together
    scaled = ("c_attn",) if family == "gpt2" else ("k", "v")
    bottleneck = 2 * HIDDEN * WIDTH + HIDDEN + WIDTH
    network = (HIDDEN * WIDTH + WIDTH) + (WIDTH * WIDTH + WIDTH) + (WIDTH * HIDDEN + HIDDEN)
    return {
        "lora": LAYERS * RANK * (inputs + outputs),
        "rslora": LAYERS * RANK * (inputs + outputs),
        "qlora": LAYERS * RANK * (inputs + outputs),
        "dora": LAYERS * (RANK * (inputs + outputs) + outputs),
        "prefix": TOKENS * 2 * LAYERS * cached,
        "prompt": TOKENS * HIDDEN,
        "p_tuning": TOKENS * HIDDEN + network,
        "houlsby": LAYERS * 2 * bottleneck,
        "pfeiffer": LAYERS * bottleneck,
        "ia3": LAYERS * (sum(block[k][1] for k in scaled) + block["down"][0]),
    }[name]


def trained(model: Any) -> dict[str, torch.Tensor]:
    """The trainable weights by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def left_alone(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights and buffers that training must not touch."""
    rows = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().clone() for name, t in rows.items() if not t.requires_grad}


def learn(model: Any, steps: int = 3, lr: float = 0.05) -> None:
    """A few steps on PAIRS; the model is in evaluation mode afterwards."""
    model.train()
    optimizer = torch.optim.AdamW(list(trained(model).values()), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (-answer_logprob_rows(model, PAIRS)[0].sum()).backward()
        optimizer.step()
    model.eval()


def scores(generator: Generator) -> list[float]:
    """What the generator says of PAIRS, in nats."""
    return pair_logprobs(generator.model, PAIRS)
