"""Log-probabilities [M] of labels from the output head's inputs, by whom; H hidden, V words."""

import importlib
from collections.abc import Callable

import torch
from op import Inputs, Provider, blocks
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def rows_of(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_MH, weight_VH, labels_M."""
    return given["hidden"], given["weight"], given["labels"]


def plain_logp(hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor) -> Tensor:
    """What a user writes: logits, log_softmax, gather."""
    logp_MV = (hidden_MH @ weight_VH.T).float().log_softmax(-1)
    return logp_MV.gather(-1, labels_M[:, None])[:, 0]


def torch_logp(hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor) -> Tensor:
    """torch's own chunked cross-entropy."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -functional.linear_cross_entropy(
        hidden_MH, weight_VH, labels_M, reduction="none", options=options
    )


def liger_logp(hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy."""
    layers = importlib.import_module("liger_kernel.transformers")
    loss = layers.LigerFusedLinearCrossEntropyLoss(reduction="none")
    return -loss(weight_VH, hidden_MH, labels_M)


def cut_logp(
    hidden_MH: Tensor, weight_VH: Tensor, labels_M: Tensor, filter_eps: str | None = None
) -> Tensor:
    """Cut cross-entropy; without its filter it drops no small gradient."""
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return -loss(hidden_MH, weight_VH, labels_M, reduction="none", filter_eps=filter_eps)


def exact_logp(given: Inputs) -> Tensor:
    """In fp64, logits of a block at a time, computed again for the gradients."""
    weight_VH, labels_M = given["weight"].double(), given["labels"]

    def logp(hidden_mH: Tensor, weight_VH: Tensor, labels_m: Tensor) -> Tensor:
        logits_mV = hidden_mH.double() @ weight_VH.T
        return logits_mV.gather(-1, labels_m[:, None])[:, 0] - logits_mV.logsumexp(-1)

    parts = [
        checkpoint(logp, given["hidden"][some], weight_VH, labels_M[some], use_reentrant=False)
        for some in blocks(len(labels_M), len(weight_VH), labels_M.device)
    ]
    return torch.cat([part for part in parts if part is not None])


def peers(closed: Callable[[Inputs, Tensor], Tensor]) -> dict[str, Provider]:
    """Those that give log-probabilities; `closed` makes of them what the operation returns."""

    def peer(logp: Callable[..., Tensor], needs: tuple[str, ...], **more) -> Provider:
        return Provider(lambda given, case: (closed(given, logp(*rows_of(given))),), needs, **more)

    filtered = "drops gradients below its filter"
    return {
        "torch_lce": peer(
            torch_logp,
            ("torch.nn.functional:linear_cross_entropy", "torch.nn:LinearCrossEntropyOptions"),
        ),
        "liger": peer(liger_logp, ("liger_kernel", "triton"), gpu_only=True),
        "cce": peer(cut_logp, ("cut_cross_entropy", "triton"), gpu_only=True),
        "cce_filter": peer(
            lambda *rows: cut_logp(*rows, filter_eps="auto"),
            ("cut_cross_entropy", "triton"),
            gpu_only=True,
            note=filtered,
        ),
    }
