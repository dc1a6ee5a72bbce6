"""Question and chunk embeddings -> in-batch contrastive loss, the retriever's warm start."""

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn.functional import cross_entropy


def info_nce(
    queries_BD: Tensor,
    chunks_ND: Tensor,
    positive_B: Tensor,
    scale: Tensor | float,
    mask_BN: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """Mean over questions of -log softmax_n(scale q.c_n) at the positive chunk, in nats, a scalar.

    InfoNCE (van den Oord et al. 2018, eq. 4) with in-batch negatives (Karpukhin et al. 2020).
    Chunk `positive_B[b]` answers question b, all others are negatives except where `mask_BN` is
    true (false negatives, see `same_group`). `symmetric` averages in the other direction: which of
    the B questions does this chunk answer? Gradient to the scores: softmax - one-hot, over B.
    Relations: scale = 1 / temperature = `encoder.scale`; N = 1 gives 0; it is the marginal loss
    with a posterior that is certain of the positive.
    """
    wide = torch.promote_types(queries_BD.dtype, torch.float32)
    scores_BN = scale * einsum(queries_BD.to(wide), chunks_ND.to(wide), "b d, n d -> b n")
    columns_N = torch.arange(len(chunks_ND), device=positive_B.device)
    is_positive_BN = rearrange(positive_B, "b -> b 1") == columns_N
    if mask_BN is not None:
        scores_BN = scores_BN.masked_fill(mask_BN & ~is_positive_BN, -torch.inf)
    forward = cross_entropy(scores_BN, positive_B)
    if not symmetric:
        return forward
    # Two questions may share a positive chunk: neither is the other's negative.
    scores_BB = scores_BN[:, positive_B]
    diagonal_B = torch.arange(len(positive_B), device=positive_B.device)
    shared_BB = is_positive_BN[:, positive_B] & (
        rearrange(diagonal_B, "b -> b 1") != rearrange(diagonal_B, "b -> 1 b")
    )
    backward = cross_entropy(
        rearrange(scores_BB.masked_fill(shared_BB, -torch.inf), "b c -> c b"), diagonal_B
    )
    return (forward + backward) / 2


def same_group(question_group_B: Tensor, chunk_group_N: Tensor) -> Tensor:
    """mask_BN of chunks from the question's own document or entity: no fair negatives for it."""
    return rearrange(question_group_B, "b -> b 1") == rearrange(chunk_group_N, "n -> 1 n")
