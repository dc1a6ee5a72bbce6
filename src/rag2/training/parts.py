"""One joint step of a batch that is taken in parts: one after the other, and by several processes.

B questions of this process, K chunks per question. All parts are equally large, so that the mean of
their gradients is the gradient of the whole batch's mean loss.
"""

import torch

from rag2.losses.base import JointLoss
from rag2.rag import RagModel
from rag2.registry import UserError
from rag2.training import distributed
from rag2.training.step import Batch, OnePass, StepResult, TwoPass


def rows_each(batch_size: int, accumulate: int) -> int:
    """Questions in a part; UserError for a batch that does not divide into equal ones."""
    parts = distributed.world() * accumulate
    if batch_size % parts:
        raise UserError(
            f"batch_size={batch_size} does not divide into {parts} equal parts: "
            f"{distributed.world()} processes, accumulate={accumulate}"
        )
    return batch_size // parts


def slices(batch_size: int, accumulate: int) -> list[slice]:
    """This process's parts of a batch, one after the other; UserError as `rows_each` says."""
    rows, world = rows_each(batch_size, accumulate), distributed.world()
    firsts = range(distributed.rank(), batch_size, rows * world)
    return [slice(first, first + rows * world, world) for first in firsts]


def accumulated(
    step: OnePass | TwoPass,
    rag: RagModel,
    loss: JointLoss,
    batch: Batch,
    in_batch: bool,
    rows: int,
) -> StepResult:
    """`step` of `rows` questions at a time, the gradients averaged, and the figures of all B.

    Memory is that of one part. `in_batch` negatives are the candidates of the same part.
    """
    questions, answers, chunks_BK = batch
    results = []
    for start in range(0, len(questions), rows):
        part = slice(start, start + rows)
        results.append(step(rag, loss, questions[part], answers[part], chunks_BK[part], in_batch))
    if len(results) > 1:
        for parameter in rag.parameters():
            if parameter.grad is not None:
                parameter.grad /= len(results)
    return StepResult(
        torch.cat([result.loss_B for result in results]),
        torch.cat([result.posterior_BK for result in results]),
        sum(result.kept for result in results) / len(results),
    )


def of_all(result: StepResult) -> StepResult:
    """The figures of the whole batch, its rows in order, from what each process has of them."""
    return StepResult(
        distributed.gathered(result.loss_B),
        distributed.gathered(result.posterior_BK),
        float(distributed.gathered(torch.tensor([result.kept], dtype=torch.float64)).mean()),
    )
