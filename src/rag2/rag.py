"""Question -> chunks -> log-probabilities: retriever and generator as one module.

Letters: B questions, K chunks per question, S prompts per question (by default K, a chunk each),
R = B*S prompts of a batch, T answer tokens, D embedding, U distinct chunks of a batch.
"""

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from rag2.generator.head import plain_weight
from rag2.generator.learning import HeadRows, answer_head_rows, answer_logprob_rows
from rag2.generator.load import Generator
from rag2.generator.pairs import encode_pairs
from rag2.generator.prompt import Prompt
from rag2.losses.base import Subset
from rag2.registry import UserError
from rag2.retriever.encoder import DualEncoder
from rag2.types import Chunk

Pair = tuple[list[int], list[int]]


class RagModel(nn.Module):
    """p(y|x) = sum_k p(z_k|x) p(y|x,z_k) over retrieved chunks (Lewis et al. 2020, eq. 1)."""

    def __init__(self, retriever: DualEncoder, generator: Generator, prompt: Prompt) -> None:
        super().__init__()
        self.retriever = retriever
        self.generator = generator.model
        self.tokenizer = generator.tokenizer
        self.prompt = prompt

    def scores(
        self, questions: Sequence[str], chunks_BK: Sequence[Sequence[Chunk]]
    ) -> tuple[Tensor, Tensor]:
        """Scores_BK = scale * <question, chunk> with today's weights, and their crowding_B in nats.

        The scores are the logits of p(z|x). The candidates may come from a stale index; their
        scores never do, else the chunk encoder would get no gradient. A chunk that several
        questions share is encoded once. `crowding_B` is -log p(one of the question's own K
        candidates | all U chunks of the batch) = LSE_u(scores_bu) - LSE_k(scores_bk), never below
        0: what a softmax over only the best K leaves out, estimated from the other questions'
        chunks (in-batch negatives, Karpukhin et al. 2020).
        """
        unique = {chunk.id: chunk for row in chunks_BK for chunk in row}
        place = {chunk_id: row for row, chunk_id in enumerate(unique)}
        rows_BK = torch.tensor([[place[chunk.id] for chunk in row] for row in chunks_BK])
        queries_BD = self.retriever.encode_questions(list(questions))
        chunks_UD = self.retriever.encode_chunks([chunk.passage for chunk in unique.values()])
        cosines_BU = einsum(queries_BD, chunks_UD, "b d, u d -> b u")
        wide = torch.promote_types(cosines_BU.dtype, torch.float32)
        scores_BU = self.retriever.scale * cosines_BU.to(wide)
        scores_BK = scores_BU.gather(1, rows_BK.to(scores_BU.device))
        return scores_BK, scores_BU.logsumexp(1) - scores_BK.logsumexp(1)

    def pairs(
        self,
        questions: Sequence[str],
        answers: Sequence[str],
        chunks_BK: Sequence[Sequence[Chunk]],
        subsets: Sequence[Subset] | None = None,
    ) -> list[Pair]:
        """Token ids (context, answer) of every prompt, in the order b s.

        `subsets` are the S prompts of a question by the places of their chunks, best first; None
        reads each of the K chunks alone. A chunk without text (the NULL chunk) adds nothing to a
        prompt. Raises UserError for chunks that the prompt's budget leaves no room for: without
        them, the pair would teach that they say nothing.
        """
        texts = []
        for question, answer, chunks in zip(questions, answers, chunks_BK, strict=True):
            for subset in subsets or [(place,) for place in range(len(chunks))]:
                read = [chunks[place] for place in subset if chunks[place].passage]
                passages = [chunk.passage for chunk in read]
                built = self.prompt.context(question, passages, self.tokenizer)
                if built.dropped:
                    raise UserError(
                        f"prompt.budget={self.prompt.budget}: chunk {read[-1].id} of document "
                        f"{read[-1].document!r} does not fit beside its question"
                        + (f" and {len(read) - 1} other chunks" if len(read) > 1 else "")
                        + "; raise the budget or build the knowledge base with shorter chunks"
                    )
                texts.append((built.text, " " + answer))
        return encode_pairs(self.tokenizer, texts)

    def logp(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Log-probabilities logp_RT in nats of the answer tokens, and their mask_RT."""
        return answer_logprob_rows(self.generator, pairs)

    def head_weight(self) -> Tensor | None:
        """The generator's output head [V, H] where it is a matrix and nothing else."""
        return plain_weight(self.generator)

    def head_rows(self, pairs: Sequence[Pair]) -> HeadRows:
        """What the answers' log-probabilities are made of, for a head that is a matrix."""
        weight_VH = self.head_weight()
        assert weight_VH is not None
        return answer_head_rows(self.generator, weight_VH, pairs)

    def forward(
        self,
        questions: Sequence[str],
        answers: Sequence[str],
        chunks_BK: Sequence[Sequence[Chunk]],
        subsets: Sequence[Subset] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores_BK, crowding_B, logp_BST and mask_BST: all that a loss needs, in one graph."""
        scores_BK, crowding_B = self.scores(questions, chunks_BK)
        logp_RT, mask_RT = self.logp(self.pairs(questions, answers, chunks_BK, subsets))
        shape = {"b": len(questions)}
        logp_BST = rearrange(logp_RT, "(b s) t -> b s t", **shape)
        mask_BST = rearrange(mask_RT, "(b s) t -> b s t", **shape)
        return scores_BK, crowding_B, logp_BST, mask_BST
