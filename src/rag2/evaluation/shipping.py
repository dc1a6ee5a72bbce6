"""A generator's folder, a retriever -> the bytes to deliver, so that the base becomes the arm.

Counted are files and arrays that are there: weights, vectors, chunk ids, chunk texts. Tokenizers
and settings, some hundred KiB that the base has already, are not.
"""

import json
from pathlib import Path

import numpy as np

from rag2.retrieval import Dense, Lexical, Retriever
from rag2.types import Chunk

WEIGHTS = ("*.safetensors", "*.bin")


def generator_bytes(path: str, base: str) -> int | None:
    """Files of weights of a generator that is not the base: all of them, or its adapter's.

    An adapter on another model than the base needs that one's too. None for one that is no folder,
    as on the hub: its files are not counted from here.
    """
    folder = Path(path)
    if folder.resolve() == Path(base).resolve():
        return 0
    if not folder.is_dir():
        return None
    own = sum(file.stat().st_size for kind in WEIGHTS for file in folder.glob(kind))
    adapter = folder / "adapter_config.json"
    if not adapter.is_file():
        return own
    under = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    beneath = 0 if under == base else generator_bytes(under, base)
    return None if beneath is None else own + beneath


def retriever_bytes(retriever: Retriever, chunks: list[Chunk]) -> int | None:
    """Of a dense retriever its weights, vectors, ids and chunk table; of BM25 the texts.

    BM25's counts of words are made from the texts where it is served. None for the controls, which
    nobody serves.
    """
    if isinstance(retriever, Lexical):
        return sum(len(chunk.passage.encode()) for chunk in chunks)
    if not isinstance(retriever, Dense):
        return None
    made = retriever.generation
    weights = sum(tensor.nbytes for tensor in retriever.encoder.state_dict().values())
    vectors = len(made) * made.index.dimension * made.index.vectors(np.arange(1)).itemsize
    return weights + vectors + made.ids_N.nbytes + made.chunks.nbytes
