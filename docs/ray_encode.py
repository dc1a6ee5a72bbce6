"""Encode a knowledge base on a Ray cluster: pieces of the corpus, each by whichever actor is free.

    python docs/ray_encode.py KB RETRIEVER OUT [ACTORS] [DEVICE]
    rag2 train index kb=KB retriever=RETRIEVER out=OUT        builds the index of the pieces

KB, RETRIEVER and OUT lie where all machines see them. Ray is no dependency of rag2: it comes with
pip install 'ray[data]'. What was encoded before, by Ray or by `rag2 train index shard=i/n`, is not
encoded again.
"""

import sys
from pathlib import Path
from typing import Any

import ray

from rag2.reindex.pieces import Pieces
from rag2.retriever.encoder import DualEncoder


class Encoder:
    """An actor: it loads the encoder once and encodes the pieces that it is handed."""

    def __init__(self, kb: str, retriever: str, out: str, device: str) -> None:
        encoder = DualEncoder.load(retriever).to(device).eval()
        self.pieces = Pieces.of(kb, encoder, Path(out) / "pieces")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number in self.pieces.missing([int(n) for n in batch["item"]]):
            self.pieces.encode(number)
        return batch


def main(kb: str, retriever: str, out: str, actors: str = "2", device: str = "cpu") -> None:
    """Hand the pieces that are missing to so many actors."""
    pieces = Pieces.of(kb, DualEncoder.load(retriever), Path(out) / "pieces")
    todo = pieces.missing(range(len(pieces)))
    if todo:
        ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            Encoder,
            fn_constructor_args=(kb, retriever, out, device),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=int(actors)),
            num_gpus=1 if device == "cuda" else 0,
        ).materialize()
    print(f"{len(todo)} pieces encoded, {len(pieces) - len(todo)} were there")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
