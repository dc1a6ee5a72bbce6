"""A knowledge base and a retriever -> a searchable generation; on several machines, if need be.

    rag2 train index -c configs/demo/index.yaml out=runs/index
    rag2 train index kb=kb.sqlite retriever=runs/joint/final/retriever out=runs/index index=hnsw
    rag2 train index kb=kb.sqlite retriever=R out=/shared/index shard=0/4      on the first of four
    rag2 train index kb=kb.sqlite retriever=R out=/shared/index index=milvus   when all are done

The corpus is encoded in pieces, each committed to OUT/pieces, so that the same command again goes
on where it was cut off. `shard=i/n` encodes its share of them and ends; without it, whatever is
missing is encoded, and all pieces become one index, the same to the bit however many machines
encoded them. Machines without a common disk can copy their OUT/pieces together. The result is
OUT/generations/000000.
"""

import re
from pathlib import Path

from pydantic import Field, field_validator
from rich.console import Console

from rag2 import artifact, config, pipeline
from rag2.index.flat import Flat
from rag2.registry import UserError
from rag2.reindex.pieces import Pieces
from rag2.retriever.embed import WINDOW
from rag2.retriever.encoder import DualEncoder, EncoderConfig
from rag2.training import distributed
from rag2.training.choices import Index
from rag2.training.log import progress

OWN = {"pieces", "generations", "config.yaml"}


class IndexConfig(pipeline.Inputs):
    """Encode a corpus, or a share of it, and build its index."""

    out: str = "runs/index"
    kb: str | None = None
    """knowledge base file"""
    retriever: str | None = None
    encoder: EncoderConfig | None = None
    """pretrained encoder to use where no `retriever` is given"""
    device: str = "cpu"
    """cpu, cuda or cuda:N"""
    index: Index = Flat()
    shard: str | None = None
    """i/n: encode the share i (from 0) of n and build nothing"""
    piece: int = Field(default=WINDOW, ge=1, le=WINDOW)
    """chunks that are encoded and committed at a time; the same on all machines"""

    @field_validator("shard")
    @classmethod
    def _is_a_share(cls, shard: str | None) -> str | None:
        found = re.fullmatch(r"(\d+)/(\d+)", shard) if shard is not None else None
        if shard is not None and not (found and int(found[1]) < int(found[2])):
            raise ValueError(f"{shard!r} is not i/n with i from 0 to n - 1, as in 0/4")
        return shard


def main(cfg: IndexConfig) -> Path | None:
    """Encode what is missing; the directory of the generation, None for a shard."""
    cfg = pipeline.resolve(cfg)
    assert cfg.kb
    out = Path(cfg.out)
    target = out / "generations" / "000000"
    if cfg.shard is None and artifact.is_complete(target):
        raise UserError(f"out={cfg.out!r} holds a generation already: choose another out=")
    foreign = sorted({path.name for path in out.iterdir()} - OWN) if out.is_dir() else []
    if foreign:
        raise UserError(f"out={cfg.out!r} holds {foreign[0]!r}, no index: choose another out=")
    if cfg.retriever:
        encoder = DualEncoder.load(cfg.retriever)
    else:
        assert cfg.encoder
        encoder = DualEncoder.build(cfg.encoder)
    encoder.to(distributed.device(cfg.device)).eval()
    pieces = Pieces.of(cfg.kb, encoder, out / "pieces", cfg.piece)
    shard, shards = map(int, cfg.shard.split("/")) if cfg.shard else (0, 1)
    todo = pieces.missing(pieces.share(shard, shards))
    artifact.sweep(pieces.directory)
    with progress("pieces", len(todo)) as advance:
        for number in todo:
            pieces.encode(number)
            advance()
    share = len(pieces.share(shard, shards))
    Console().print(f"{len(todo)} pieces encoded, {share - len(todo)} were there")
    if cfg.shard:
        return None
    made = pieces.generation(cfg.index)
    made.save(target, pointer=target.parent / "current")
    artifact.replace(out / "config.yaml", config.dump(cfg))
    Console().print(f"{len(made)} chunks of {made.index.dimension} dimensions: {target}")
    return target


if __name__ == "__main__":
    config.run(main, IndexConfig)
