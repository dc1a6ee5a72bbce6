"""The definition of every operation in plain torch; slow and hungry, for tests to compare with.

Letters: M answer-token rows, H hidden, V vocabulary, B questions, K retrieved chunks, S prompts a
question (K, unless a loss reads others), T answer tokens, N chunks or rows of a corpus, D
embedding, G groups a question. Products, sums, softmax and log-sum-exp
are in fp32, or in fp64 when the inputs are.
"""

from collections.abc import Callable

import torch
from einops import einsum
from torch import Tensor
from torch.nn.functional import cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(scores_BK, logp_BST, mask_BST) -> (loss_B in nats, posterior_BK)."""


def answer_logprob(hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor) -> Tensor:
    """logp_M: log softmax_v(hidden_m . weight_v) at labels_m, in nats.

    With g = dloss/dlogp:
        dlogits = g (onehot(label) - softmax);  dhidden = dlogits W;  dweight = dlogits^T hidden
    Relations: `-logp` is torch's cross_entropy without reduction.
    """
    wide = promoted(hidden_MH, weight_VH)
    logits_MV = hidden_MH.to(wide) @ weight_VH.to(wide).T
    return logits_MV.log_softmax(-1).gather(-1, labels_M[:, None])[:, 0]


def greedy_logprob(hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """logp_M as `answer_logprob`, and whether the label is the most likely token [M]; no gradient.

    Of tokens that are equally likely the first is it; the Triton kernel takes each of them for it.
    """
    wide = promoted(hidden_MH, weight_VH)
    logits_MV = hidden_MH.to(wide) @ weight_VH.to(wide).T
    return answer_logprob(hidden_MH, weight_VH, labels_M), logits_MV.argmax(-1) == labels_M


def marginal_nll(
    scores_BK: Tensor, logp_BKT: Tensor, mask_BKT: Tensor, level: str = "sequence"
) -> tuple[Tensor, Tensor]:
    """-log sum_k p(k) p(y|k) of each question in nats, and the posterior p(k|y), both fp32.

    With s the scores, p = softmax_k(s) and l the log-probabilities of the T answer tokens
    (Lewis et al. 2020, section 2.1):
        "sequence"   loss_b = LSE_k(s) - LSE_k(s + sum_t l),            r = softmax_k(s + sum_t l)
        "token"      loss_b = sum_t [LSE_k(s) - LSE_k(s + l_t)],  r = mean_t of softmax_k(s + l_t)
    Gradient: dloss/ds = p - r (for "token": the number of answer tokens times p - r).
    A chunk is masked by s = -inf; a question without chunks has loss 0 and no gradient. Whatever
    stands under a false mask, NaN included, is ignored. The posterior carries no gradient.
    Relations: K = 1 is the cross-entropy of the answer; equal for both levels when T = 1.
    """
    wide = promoted(scores_BK, logp_BKT)
    alive_BK = scores_BK > -torch.inf
    used_BKT = mask_BKT.bool() & alive_BK[..., None]
    logp_BKT = torch.where(used_BKT, logp_BKT, 0).to(wide)
    # A question whose chunks are all masked is computed on zeros: -inf everywhere gives NaN.
    dead_B1 = ~alive_BK.any(-1, keepdim=True)
    prior_BK = torch.where(dead_B1, 0, scores_BK).to(wide).log_softmax(-1)

    logp_BKS = logp_BKT.sum(-1, keepdim=True) if level == "sequence" else logp_BKT
    joint_BKS = prior_BK[..., None] + logp_BKS
    used_BS = used_BKT.any(1) if level == "token" else ~dead_B1
    loss_B = -(joint_BKS.logsumexp(1) * used_BS).sum(-1)
    posterior_BKS = joint_BKS.detach().softmax(1) * used_BS[:, None]
    posterior_BK = posterior_BKS.sum(-1) / used_BS.sum(-1, keepdim=True).clamp_min(1)
    return loss_B, posterior_BK


def rag_loss(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    labels_M: Tensor,
    pair_M: Tensor,
    scores_BK: Tensor,
    loss: Loss,
    prompts: int,
) -> tuple[Tensor, Tensor]:
    """Loss_B in nats and posterior_BK of `loss` on the rows' log-probabilities.

    Row m belongs to prompt `pair_M[m]` = b S + s; a prompt's rows are its answer's tokens in order.
    """
    logp_M = answer_logprob(hidden_MH, weight_VH, labels_M)
    logp_BST, mask_BST = padded(logp_M, pair_M, len(scores_BK), prompts)
    return loss(scores_BK, logp_BST, mask_BST)


def mips_topk(queries_BD: Tensor, corpus_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest inner products of each query with the corpus, and their rows (exact MIPS).

    Best first; equal scores in the order of their rows. Gradient through the scores that were
    chosen: dqueries_b = sum_k ds_bk corpus_(rows_bk), and dcorpus likewise.
    """
    wide = promoted(queries_BD, corpus_ND)
    scores_BN = queries_BD.to(wide) @ corpus_ND.to(wide).T
    best = scores_BN.sort(dim=1, descending=True, stable=True)
    return best.values[:, :k], best.indices[:, :k]


def info_nce(
    queries_BD: Tensor,
    chunks_ND: Tensor,
    positive_B: Tensor,
    scale: Tensor | float,
    groups: tuple[Tensor, Tensor] | None = None,
    symmetric: bool = False,
) -> Tensor:
    """Mean over questions of -log softmax_n(scale q.c_n) at the positive chunk, in nats, a scalar.

    InfoNCE (van den Oord et al. 2018, eq. 4) with in-batch negatives (Karpukhin et al. 2020, eq. 2
    and section 3.2). With s_bn = scale q_b.c_n, n_b = `positive_B[b]` and A_b the chunks that count
    for question b:
        loss = mean_b [LSE_(n in A_b) s_bn - s_b(n_b)]
    A_b is n_b and every chunk whose group is none of the question's: `groups` is (question_BG,
    chunk_N), int64 ids of at least 0, rows of the former padded with -1. `symmetric` averages with
    the other direction, which of the questions does a positive answer:
        loss' = mean_b [LSE_c s_c(n_b) - s_b(n_b)],   c = b, or n_c is not n_b and n_b in A_c
    Two questions with one positive are not each other's negatives. Gradient: ds = (softmax -
    onehot) / B in either direction; dq = scale ds c; dc = scale ds^T q; dscale = <ds, q c^T>.
    Relations: scale = 1 / temperature; N = 1 gives 0; a chunk that counts for no question might as
    well be absent; it is the marginal loss with a posterior that is certain of the positive.
    """
    wide = promoted(queries_BD, chunks_ND)
    scores_BN = scale * einsum(queries_BD.to(wide), chunks_ND.to(wide), "b d, n d -> b n")
    is_positive_BN = positive_B[:, None] == torch.arange(len(chunks_ND), device=positive_B.device)
    if groups is not None:
        scores_BN = scores_BN.masked_fill(same_group(*groups) & ~is_positive_BN, -torch.inf)
    forward = cross_entropy(scores_BN, positive_B)
    if not symmetric:
        return forward
    itself_BB = torch.eye(len(positive_B), dtype=torch.bool, device=positive_B.device)
    shared_BB = is_positive_BN[:, positive_B] & ~itself_BB
    scores_BB = scores_BN[:, positive_B].masked_fill(shared_BB, -torch.inf)
    diagonal_B = torch.arange(len(positive_B), device=positive_B.device)
    return (forward + cross_entropy(scores_BB.T, diagonal_B)) / 2


def same_group(question_BG: Tensor, chunk_N: Tensor) -> Tensor:
    """mask_BN of the chunks whose group is among a question's."""
    return (question_BG[..., None] == chunk_N).any(1)


def masked_mean_pool(hidden_BLH: Tensor, mask_BL: Tensor, normalize: bool = True) -> Tensor:
    """The mean of the states under a true mask, to length 1 if asked: embedding_BH in fp32.

    A text without tokens is 0. Whatever stands under a false mask, NaN included, is ignored.
    Gradient, with e the result of length 1, n the tokens and d the upstream gradient:
        dhidden = mask (d - (d.e) e) / (n |mean|), and mask d / n where it is not normalised
    """
    wide = promoted(hidden_BLH)
    used_BL = mask_BL.bool()
    sum_BH = torch.where(used_BL[..., None], hidden_BLH.to(wide), 0).sum(1)
    mean_BH = sum_BH / used_BL.sum(1, keepdim=True).clamp_min(1)
    return torch.nn.functional.normalize(mean_BH, dim=-1) if normalize else mean_BH


def padded(logp_M: Tensor, pair_M: Tensor, questions: int, prompts: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of their prompts -> logp_BST, padded with 0, and its mask_BST."""
    counts_R = torch.bincount(pair_M, minlength=questions * prompts)
    steps_T = torch.arange(int(counts_R.max()) if len(pair_M) else 0, device=pair_M.device)
    mask_RT = steps_T < counts_R[:, None]
    logp_RT = logp_M.new_zeros(mask_RT.shape).masked_scatter(mask_RT, logp_M)
    shape = (questions, prompts, len(steps_T))
    return logp_RT.view(shape), mask_RT.view(shape)


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype of the sums: fp64 if an input has it, else fp32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
