"""What classic fine-tuning minimises: the corpus as plain text, or answers to questions."""

from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

from pydantic import Field
from torch import Tensor

from rag2.config import Config
from rag2.generator.learning import answer_logprob_rows, sequence_nll
from rag2.generator.load import Generator
from rag2.generator.pairs import encode_pairs
from rag2.generator.prompt import Prompt
from rag2.training import batches
from rag2.training.sequences import blocks, collate
from rag2.types import Question

WHOLE = slice(None)


class BatchLoss(Protocol):
    """The loss of a step's batch in nats per token, or what a part of its rows adds to it.

    That is a sum over the part's tokens, divided by the number of tokens of the whole batch.
    """

    def __call__(self, step: int, part: slice = WHOLE) -> Tensor: ...


class Unsupervised(Config):
    """Continued pretraining on the corpus (Ovadia et al. 2024, section 4.2).

    The chunks between BOS and EOS marks in one line, cut into equal blocks; next-token prediction.
    """

    name: Literal["unsupervised"] = "unsupervised"
    block: int = Field(default=256, ge=2)
    """tokens per block"""

    needs: ClassVar[str] = "texts"

    def prepare(self, data: Sequence[str], generator: Generator, size: int, seed: int) -> BatchLoss:
        """The loss of `size` blocks a step."""
        rows = blocks(data, self.block, generator.tokenizer)

        def loss(step: int, part: slice = WHOLE) -> Tensor:
            picked = [rows[row] for row in batches.sample(len(rows), size, seed, step)]
            total = sum(float(row.weights_L[1:].sum()) for row in picked)
            return sequence_nll(generator.model, *collate(picked[part]), total)

        return loss


class Supervised(Config):
    """Closed-book question answering: -log p(answer | question) on training questions."""

    name: Literal["supervised"] = "supervised"

    needs: ClassVar[str] = "questions"

    def prepare(
        self, data: Sequence[Question], generator: Generator, size: int, seed: int
    ) -> BatchLoss:
        """The loss of `size` questions a step."""
        prompt, tokenizer = Prompt(), generator.tokenizer
        texts = [(prompt.context(q.question, [], tokenizer).text, " " + q.gold) for q in data]
        pairs = encode_pairs(tokenizer, texts)

        def loss(step: int, part: slice = WHOLE) -> Tensor:
            picked = [pairs[row] for row in batches.sample(len(pairs), size, seed, step)]
            logp_RT, _ = answer_logprob_rows(generator.model, picked[part])
            return -logp_RT.sum() / logp_RT.new_tensor(sum(len(answer) for _, answer in picked))

        return loss
