"""Every variation point on one page: table -> name -> "module:Class", resolved when asked for."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A user's mistake: one line that names the key, the value, what is allowed and the nearest."""


TABLES: dict[str, dict[str, str]] = {
    "world": {
        "almanac": "rag2.worlds.almanac:Almanac",
        "factbook": "rag2.worlds.factbook:Factbook",
    },
    "reader": {
        "txt": "rag2.kb.plain:read_text",
        "md": "rag2.kb.plain:read_markdown",
        "jsonl": "rag2.kb.plain:read_jsonl",
        "csv": "rag2.kb.plain:read_csv",
    },
    # Readers that run in a child process with limits; hf is for names of data sets.
    "parser": {
        "html": "rag2.kb.parsers.html:read_html",
        "htm": "rag2.kb.parsers.html:read_html",
        "pdf": "rag2.kb.parsers.pdf:read_pdf",
        "docx": "rag2.kb.parsers.docx:read_docx",
        "parquet": "rag2.kb.parsers.arrow:read_parquet",
        "jsonl.gz": "rag2.kb.parsers.gz:read_jsonl_gz",
        "hf": "rag2.kb.parsers.arrow:read_dataset",
    },
    "task": {
        "mmlu": "rag2.evaluation.tasks.mmlu:read",
        "openstax": "rag2.evaluation.tasks.openstax:read",
        "xquad": "rag2.evaluation.tasks.xquad:read",
        "fairytale": "rag2.evaluation.tasks.fairytale:read",
        "pubmedqa": "rag2.evaluation.tasks.pubmedqa:read",
    },
    "chunker": {
        "tokens": "rag2.kb.chunk:TokenChunker",
    },
    "index": {
        "flat": "rag2.index.flat:Flat",
        "ivf": "rag2.index.ivf:IVF",
        "hnsw": "rag2.index.hnsw:HNSW",
        "torch": "rag2.index.exact:TorchExact",
        "shards": "rag2.index.shards:Shards",
        "milvus": "rag2.index.milvus:Milvus",
        "pgvector": "rag2.index.pgvector:PGVector",
    },
    "loss": {
        "marginal": "rag2.losses.marginal:Marginal",
        "emdr2": "rag2.losses.emdr2:EMDR2",
        "pdist": "rag2.losses.pdist:PDist",
        "loop": "rag2.losses.loop:LOOP",
        "hard_em": "rag2.losses.hard_em:HardEM",
        "distil_then_marginal": "rag2.losses.schedule:DistilThenMarginal",
    },
    "tuning": {
        "full": "rag2.tuning.full:Full",
        "lora": "rag2.tuning.lora:LoRA",
        "dora": "rag2.tuning.dora:DoRA",
        "rslora": "rag2.tuning.rslora:RsLoRA",
        "qlora": "rag2.tuning.qlora:QLoRA",
        "prefix": "rag2.tuning.prefix:Prefix",
        "prompt": "rag2.tuning.prompt:Prompt",
        "p_tuning": "rag2.tuning.p_tuning:PTuning",
        "houlsby": "rag2.tuning.houlsby:Houlsby",
        "pfeiffer": "rag2.tuning.pfeiffer:Pfeiffer",
        "ia3": "rag2.tuning.ia3:IA3",
    },
    # Those that leave a plain encoder behind.
    "retriever_tuning": {
        "full": "rag2.tuning.full:Full",
        "lora": "rag2.tuning.lora:LoRA",
        "dora": "rag2.tuning.dora:DoRA",
        "rslora": "rag2.tuning.rslora:RsLoRA",
        "ia3": "rag2.tuning.ia3:IA3",
    },
    "refresh": {
        "none": "rag2.reindex.policy:NoRefresh",
        "sync": "rag2.reindex.policy:SyncRefresh",
        "async": "rag2.reindex.policy:AsyncRefresh",
        "eager": "rag2.reindex.policy:EagerRefresh",
        "adaptive": "rag2.reindex.policy:AdaptiveRefresh",
    },
    "objective": {
        "unsupervised": "rag2.training.objectives:Unsupervised",
        "supervised": "rag2.training.objectives:Supervised",
        "raft": "rag2.training.raft:Raft",
        "instruction": "rag2.training.instruction:Instruction",
        "mixed": "rag2.training.mixed:Mixed",
    },
    "pairs": {
        "spans": "rag2.training.pairs:Spans",
        "questions": "rag2.training.pairs:Questions",
    },
    "step": {
        "one_pass": "rag2.training.step:OnePass",
        "two_pass": "rag2.training.step:TwoPass",
    },
}


def nearest(name: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest allowed name, or nothing."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def lookup(table: str, name: str) -> Any:
    """The class or function that `name` stands for; raises UserError for an unknown name."""
    names = TABLES[table]
    if name not in names:
        allowed = ", ".join(names)
        raise UserError(f"unknown {table} {name!r}; allowed: {allowed}.{nearest(name, names)}")
    module, _, attribute = names[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
