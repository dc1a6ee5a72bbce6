"""Models and what they read -> floating-point operations of a question, counted by formula.

A multiplication with its addition is two operations. A token after d others costs 2 x the weights
of the layers' matrices, and 4 x layers x heads x head size x (d + 1) for attention's two products;
its logits, only where they are read, 2 x the weights of the head. That is Kaplan et al. 2020, table
1 (N without embeddings; its 2 n_layer n_ctx d_attn is the mean over a causal context), and Hoffmann
et al. 2022, appendix F, without the softmax. An encoder's token attends to all n of its text.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers.pytorch_utils import Conv1D

from rag2.evaluation.workload import Cost
from rag2.generator.choices import Encoded
from rag2.generator.pairs import virtual_tokens
from rag2.retrieval import Dense, Gold, Lexical, Random, Retriever
from rag2.types import Question


def cost_of(model: Any, head: nn.Module | None = None) -> Cost | None:
    """What a token costs a transformer whose weights are all read for it; None for experts.

    None too where more is read than the text (virtual tokens), and where weights are put together
    anew for every forward (DoRA). An adapter's matrices count beside those they stand by; `head`
    makes the logits.
    """
    if any(weight.ndim > 2 for weight in model.parameters()):
        return None  # a router picks some of these
    if virtual_tokens(model) or any("magnitude" in name for name, _ in model.named_parameters()):
        return None
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    apart = set() if head is None else {id(module) for module in head.modules()}
    body = sum(_weights(module) for module in model.modules() if id(module) not in apart)
    rows = 0 if head is None else sum(map(_weights, head.modules()))
    return Cost(body, rows, config.num_hidden_layers * heads * size)


def of_prompts(encoded: Encoded, cost: Cost) -> list[int]:
    """Of each context and its choices, as if nothing were shared with other contexts.

    The context is read once; of its choices all but the last token, equal beginnings once.
    """
    return [_prompt(encoded, places, cost) for places in encoded.places]


def of_search(retriever: Retriever, questions: Sequence[Question]) -> float | None:
    """Mean of encoding a question and comparing it with every vector; None where nobody knows.

    BM25 multiplies no matrix: what it adds up is not counted.
    """
    if isinstance(retriever, (Lexical, Random, Gold)):
        return 0.0
    if not isinstance(retriever, Dense):
        return None
    encoder, index = retriever.encoder, retriever.generation.index
    cost = cost_of(encoder.question_tower)
    if cost is None:
        return None
    rows = encoder.tokenize([question.question for question in questions], "question")
    lengths_Q = np.array([len(row) for row in rows], dtype=np.float64)
    encoding_Q = 2 * cost.body * lengths_Q + 4 * cost.width * lengths_Q**2
    return float(encoding_Q.mean()) + 2 * len(index) * index.dimension


def _prompt(encoded: Encoded, places: Sequence[tuple[int, int]], cost: Cost) -> int:
    read: dict[int, set[tuple[int, ...]]] = {}
    for request, choice in places:
        ids = encoded.requests[request].continuations[choice]
        read.setdefault(request, set()).add(tuple(ids[:-1]))
    total = 0
    for request, beginnings in read.items():
        depth = len(encoded.requests[request].context_ids)
        depths = [*range(depth), *(depth + t for ids in beginnings for t in range(len(ids)))]
        total += cost.flops(depths, 1 + len(depths) - depth)
    return total


def _weights(module: nn.Module) -> int:
    """Numbers in a module's own matrix; by its shape, since 4-bit weights are stored packed."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return module.weight.numel() if isinstance(module, Conv1D) else 0
