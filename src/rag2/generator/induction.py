"""A transformer that is born looking back: two heads start as an induction circuit.

A head of the first layer attends to the token before; one of the second finds where the present
token stood earlier and says what followed it there (Olsson et al. 2022, "In-context Learning and
Induction Heads"). Random weights come to this late, by chance, or only for one distance; as a start
(after Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers") it is trained
like any other. F: rotary frequencies of a head.
"""

from typing import Any

import torch
from torch import Tensor

FREQUENCIES = 8  # the fastest of a head, enough to tell a token from its neighbours
SHARPNESS = 20.0  # the token before gets nearly all attention
WRITTEN = 0.04  # what the first head adds is about as large as an embedding
MATCHED = 2.0  # of keys and queries: a token that fits stands out of some hundred
SAID = 0.3  # what the second head adds


@torch.no_grad()
def looking_back(model: Any) -> None:
    """Set the first heads of the first two layers of a Llama, in place.

    It must have attention biases and as many key heads as query heads. The smaller a head, the
    blunter the circuit: below 8 dimensions there is none to speak of. A model with one layer, which
    cannot hold it, is left as it is.
    """
    layers = model.model.layers
    if len(layers) < 2:
        return
    before, match = layers[0].self_attn, layers[1].self_attn
    size = before.head_dim
    _attend_to_the_token_before(before, model.model.rotary_emb.inv_freq, size)
    read, write = before.v_proj.weight[:size], before.o_proj.weight[:, :size]
    torch.nn.init.orthogonal_(read)
    torch.nn.init.orthogonal_(write)
    # Queries hold the token itself, as the first head reads it, keys what that head wrote.
    match.q_proj.weight[:size] = MATCHED * read
    match.k_proj.weight[:size] = MATCHED * write.T
    write.mul_(WRITTEN)
    said = torch.nn.init.orthogonal_(torch.empty_like(read))
    match.v_proj.weight[:size] = said
    match.o_proj.weight[:, :size] = SAID * said.T


def _attend_to_the_token_before(attention: Any, speed_F: Tensor, size: int) -> None:
    """Make scores of the first head a sum of cos(speed * (distance - 1)), whatever the tokens."""
    half = size // 2
    amplitude_F = torch.zeros(half)
    amplitude_F[:FREQUENCIES] = 1.0
    amplitude_F *= SHARPNESS / amplitude_F.norm()
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[:size] = 0.0
        projection.bias[:size] = 0.0
    attention.k_proj.bias[:half] = amplitude_F
    attention.q_proj.bias[:half] = amplitude_F * torch.cos(speed_F)
    attention.q_proj.bias[half:size] = -amplitude_F * torch.sin(speed_F)
