"""The definition of every operation in plain torch.

Letters: M answer-token rows, H hidden, V vocabulary, B questions, K retrieved chunks, T answer
tokens. Sums, softmax and log-sum-exp are in fp32, or in fp64 when the inputs are.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WORKSPACE = 1 << 24  # logits held at once: 64 MiB in fp32


def answer_logprob(
    hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, chunk: int | None = None
) -> Tensor:
    """logp_M: log softmax_v(hidden_m . weight_v) at labels_m, in nats, for `chunk` rows at once.

    No [M, V] tensor is stored unless it fits into one chunk, by default of 2^24 logits; otherwise
    the backward pass computes the logits again. With g = dloss/dlogp:
        dlogits = g (onehot(label) - softmax);  dhidden = dlogits W;  dweight = dlogits^T hidden
    Relations: `-logp` is torch's cross_entropy without reduction.
    """
    assert hidden_MH.ndim == weight_VH.ndim == 2 and labels_M.shape == hidden_MH.shape[:1], (
        f"hidden {tuple(hidden_MH.shape)}, weight {tuple(weight_VH.shape)}, "
        f"labels {tuple(labels_M.shape)}"
    )
    if chunk is None:
        chunk = max(1, WORKSPACE // weight_VH.shape[0])
    assert chunk > 0, f"chunk {chunk} must be positive"
    # Autocast would round the fp32 products of the Function back to half precision.
    with torch.autocast(hidden_MH.device.type, enabled=False):
        return _AnswerLogprob.apply(hidden_MH, weight_VH, labels_M, chunk)


class _AnswerLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, chunk: int) -> Tensor:
        wide = torch.promote_types(
            torch.promote_types(hidden_MH.dtype, weight_VH.dtype), torch.float32
        )
        logp_M = hidden_MH.new_empty(hidden_MH.shape[0], dtype=wide)
        lse_M = torch.empty_like(logp_M)
        logits_CV = None
        for rows in _chunks(len(labels_M), chunk):
            logits_CV = _matmul(hidden_MH[rows], weight_VH.T)
            lse_M[rows] = logits_CV.logsumexp(-1)
            logp_M[rows] = logits_CV.gather(-1, labels_M[rows, None])[:, 0] - lse_M[rows]
        kept = logits_CV if len(labels_M) <= chunk else None
        ctx.chunk = chunk
        ctx.save_for_backward(hidden_MH, weight_VH, labels_M, lse_M, kept)
        return logp_M

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_M: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_MH, weight_VH, labels_M, lse_M, kept = ctx.saved_tensors
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        dhidden_MH = torch.zeros_like(hidden_MH) if for_hidden else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=grad_M.dtype) if for_weight else None
        with torch.autocast(hidden_MH.device.type, enabled=False):
            for rows in _chunks(len(labels_M), ctx.chunk):
                logits_CV = kept if kept is not None else _matmul(hidden_MH[rows], weight_VH.T)
                dlogits_CV = (logits_CV - lse_M[rows, None]).exp_().mul_(-grad_M[rows, None])
                dlogits_CV.scatter_add_(-1, labels_M[rows, None], grad_M[rows, None])
                if dhidden_MH is not None:
                    dlogits = dlogits_CV.to(weight_VH.dtype)
                    dhidden_MH[rows] = _matmul(dlogits, weight_VH).to(hidden_MH.dtype)
                if dweight_VH is not None:
                    dweight_VH += _matmul(dlogits_CV.to(hidden_MH.dtype).T, hidden_MH[rows])
        if dweight_VH is not None:
            dweight_VH = dweight_VH.to(weight_VH.dtype)
        return dhidden_MH, dweight_VH, None, None


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b summed and returned in fp32 (fp64 for fp64), whatever the dtypes of the inputs."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)  # tensor cores, no fp32 copy of the weight
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(wide) @ b.to(wide)


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
    assert level in ("sequence", "token"), f"level {level!r} is neither 'sequence' nor 'token'"
    wide = torch.promote_types(scores_BK.dtype, torch.promote_types(logp_BKT.dtype, torch.float32))
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
