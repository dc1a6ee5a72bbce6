"""A retriever + questions -> recall@k and mean reciprocal rank against the gold chunks.

rag2 eval recall -c configs/demo/recall.yaml
rag2 eval recall retriever=runs/joint/final/retriever kb=kb.sqlite questions=q.jsonl
"""

import json
from pathlib import Path

import numpy as np
from pydantic import Field
from rich.console import Console

from rag2 import config, pipeline
from rag2.evaluation import place
from rag2.evaluation.questions import load_questions, split
from rag2.index.exact import TorchExact
from rag2.kb.lexical import BM25
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError
from rag2.retrieval import gold_chunks, recall
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training import distributed
from rag2.training.choices import Index


class RecallConfig(pipeline.Inputs):
    """Recall of a dense retriever, with BM25 beside it."""

    out: str = "runs/recall"
    kb: str | None = None
    """knowledge base file"""
    questions: str | None = None
    """JSONL of questions"""
    retriever: str | None = None
    encoder: EncoderConfig | None = None
    """pretrained encoder to measure where no `retriever` is given"""
    device: str = "cpu"
    """cpu, cuda or cuda:N"""
    split: str = "test"
    ks: list[int] = Field(default=[1, 5, 10], min_length=1)
    index: Index = TorchExact()


def main(cfg: RecallConfig) -> dict:
    """Measure both retrievers; returns {retriever: {recall@k, mrr}} and writes recall.json.

    Questions whose evidence the corpus does not hold are left out and counted.
    """
    cfg = pipeline.resolve(cfg)
    assert cfg.kb and cfg.questions
    place.check(cfg)
    with KnowledgeBase(Path(cfg.kb)) as kb:
        chunks = kb.chunks()
    depth = max(cfg.ks)
    if not 1 <= min(cfg.ks) <= depth <= len(chunks):
        raise UserError(f"ks={cfg.ks}: each k must be between 1 and the {len(chunks)} chunks")
    chosen = split(load_questions(cfg.questions), cfg.split)
    gold = gold_chunks(chosen, chunks)
    questions = [question for question in chosen if gold[question.id]]
    if not questions:
        raise UserError(f"{cfg.questions}: no {cfg.split} question names evidence in {cfg.kb}")
    asked, wanted = [q.question for q in questions], [gold[q.id] for q in questions]

    if cfg.retriever:
        encoder = DualEncoder.load(cfg.retriever)
    else:
        assert cfg.encoder
        encoder = DualEncoder.build(cfg.encoder)
    encoder.to(distributed.device(cfg.device))
    embeddings_ND = embed_corpus(encoder, [chunk.passage for chunk in chunks])
    index = cfg.index.build(embeddings_ND, np.array([chunk.id for chunk in chunks]))
    _, dense_QK = index.search(embed_corpus(encoder, asked, side="question"), depth)
    _, bm25_QK = BM25(chunks).search(asked, depth)
    results = {
        "n": len(questions),
        "without_evidence": len(chosen) - len(questions),
        "dense": figures(dense_QK, wanted, cfg.ks),
        "bm25": figures(bm25_QK, wanted, cfg.ks),
    }
    with place.claimed(cfg) as out:
        (out / "recall.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console().print_json(data=results)
    return results


def figures(ids_QK: np.ndarray, gold: list[list[int]], ks: list[int]) -> dict[str, float]:
    """Recall at each k, and the mean of 1 / rank of the first gold chunk (0 if not found)."""
    hit_QK = np.array([np.isin(row, wanted) for row, wanted in zip(ids_QK, gold, strict=True)])
    first_Q = np.where(hit_QK.any(1), 1.0 / (hit_QK.argmax(1) + 1), 0.0)
    found = {f"recall@{k}": float(recall(ids_QK, gold, k).mean()) for k in ks}
    return {**found, f"mrr@{ids_QK.shape[1]}": float(first_Q.mean())}


if __name__ == "__main__":
    config.run(main, RecallConfig)
