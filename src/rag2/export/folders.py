"""The folders of an export: generator/, retriever/, kb.sqlite with tokenizer/, index/.

What libraries write of where a model came from, and the keys that an export does not have, are left
out: the same system gives the same bytes wherever it was made.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rag2 import hub
from rag2.answering import schemas
from rag2.generator.load import DTYPES, Generator
from rag2.index.generation import Generation
from rag2.kb.closed import TOKENIZER
from rag2.kb.store import KnowledgeBase
from rag2.registry import UserError, lookup
from rag2.retriever import sentence
from rag2.retriever.embed import embed_corpus
from rag2.retriever.encoder import DualEncoder

Adapters = Literal["merge", "keep"]
EXACT = ("float32", "float64")


def write_generator(source: Path, folder: Path, adapters: Adapters) -> str:
    """A plain Hugging Face folder, or with `keep` an adapter around one; returns its fingerprint.

    A merge is computed in float32 and rounded once, to the precision of the base. Raises UserError
    when the base is gone and when the adapter is of a method that cannot be merged.
    """
    if not any((source / name).is_file() for name in hub.ADAPTERS):
        generator = Generator.load(source, _dtype(source / "config.json"))
    else:
        base, dtype = _base(source)
        if adapters == "keep":
            return _write_adapter(source, folder, base, dtype)
        adapted = Generator.load(source, dtype if dtype in EXACT else "float32")
        try:
            plain: Any = adapted.model.tuning.merge(adapted.model)
        except UserError as error:
            raise UserError(f"{error}: --adapters keep") from None
        generator = Generator(plain.to(DTYPES[dtype]), adapted.tokenizer)
    generator.save(folder)
    _clean_model(folder, generator=True)
    return generator.fingerprint()


def _write_adapter(source: Path, folder: Path, base: str, dtype: str) -> str:
    """The adapter, and the base it stands on in a folder inside its own."""
    plain = Generator.load(base, dtype)
    plain.save(folder / schemas.BASE)
    _clean_model(folder / schemas.BASE, generator=True)
    adapted = Generator.load(source, dtype)
    if hasattr(adapted.model, "origin"):
        adapted.model.origin |= {"base": schemas.BASE}
    adapted.save(folder)
    _clean_tokenizer(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's, of blanks to fill in
    if (folder / hub.ADAPTERS[0]).is_file():
        named = {"base_model_name_or_path": schemas.BASE, "auto_mapping": None, "revision": None}

        def close(found: dict[str, Any]) -> dict[str, Any]:
            return _only(found | named, schemas.peft_keys(found["peft_type"]))

        rewrite(folder / hub.ADAPTERS[0], close)
    return adapted.fingerprint()


def _base(source: Path) -> tuple[str, str]:
    """The base of an adapter and the precision that it is used in."""
    ours, peft = source / hub.ADAPTERS[1], source / hub.ADAPTERS[0]
    if ours.is_file():
        record = json.loads(ours.read_text("utf-8"))
        path, dtype = record["base"], record["dtype"]
    else:
        path, dtype = json.loads(peft.read_text("utf-8"))["base_model_name_or_path"], None
    inside = source / path
    path = str(inside) if inside.is_dir() else path
    if not hub.is_local(path, f"the base of adapter {source}:"):
        return path, dtype or "float32"
    return path, dtype or _dtype(Path(path) / "config.json")


def _dtype(config: Path) -> str:
    """The precision that a folder's weights are stored in."""
    try:
        found = json.loads(config.read_text("utf-8"))
        dtype = found.get("dtype") or found.get("torch_dtype")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{config} cannot be read: {error}") from None
    return dtype if dtype in DTYPES else "float32"


def write_retriever(encoder: DualEncoder, folder: Path) -> str:
    """A folder that rag2 and sentence-transformers read alike; returns the fingerprint."""
    encoder = encoder.merged()
    encoder.config = encoder.config.model_copy(update={"model": None})  # a path of this machine
    encoder.save(folder)
    towers = [folder / side for side in ("question", "chunk") if (folder / side).is_dir()]
    for tower in towers or [folder]:
        _clean_model(tower, generator=False)
    for name, content in sentence.files(encoder.config, encoder.dimension).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_json(folder / name, content)
    return encoder.fingerprint()


def write_kb(source: Path, staging: Path) -> tuple[int, str]:
    """What is live of a knowledge base, with the tokenizer that cut it; returns version and hash.

    It is one consistent state whoever writes the source meanwhile; what was removed from it, and
    where its tokenizer lay, does not come along.
    """
    target = staging / "kb.sqlite"
    with KnowledgeBase(source) as kb:
        chunker = kb.chunker(source.parent / TOKENIZER)
        cut = kb.chunker_fingerprint is not None
        kb.copy(target)
    if cut and chunker is None:
        raise UserError(
            f"{source}: the tokenizer that cut it is gone; without it no document can be added. "
            f"Put it into {source.parent / TOKENIZER}"
        )
    with KnowledgeBase(target, trusted=True) as kb:
        if chunker is not None and (text := chunker.tokenizer_json()) is not None:
            (staging / TOKENIZER).mkdir()
            (staging / TOKENIZER / "tokenizer.json").write_text(text, encoding="utf-8")
            kb.name_tokenizer(TOKENIZER)
        kb.compact()
        kb.seal()
        return kb.version, kb.content_hash()


def write_index(
    encoder: DualEncoder,
    staging: Path,
    name: str,
    step: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Every live chunk encoded now, as a committed generation: that of the run may be stale."""
    with KnowledgeBase(staging / "kb.sqlite", trusted=True) as kb, kb.reading():
        chunks, version, content = kb.chunks(), kb.version, kb.content_hash()
    if not chunks:
        raise UserError("the knowledge base has no chunks: there is nothing to search")
    embeddings_ND = embed_corpus(encoder, [chunk.passage for chunk in chunks], progress=progress)
    index = lookup("index", name)().build(embeddings_ND, _ids(chunks))
    Generation.of(
        index,
        chunks,
        encoder_fingerprint=encoder.fingerprint(),
        kb_version=version,
        kb_hash=content,
        step=step,
    ).save(staging / "index")


def _ids(chunks: Any) -> Any:
    import numpy as np

    return np.array([chunk.id for chunk in chunks], dtype=np.int64)


def _clean_model(folder: Path, generator: bool) -> None:
    """Leave out of a Hugging Face folder the keys and files that an export does not have."""
    rewrite(folder / "config.json", lambda c: _only(c, _model_keys(c, generator)))
    if (folder / "generation_config.json").is_file():
        if generator:
            rewrite(folder / "generation_config.json", lambda c: _only(c, schemas.GENERATION_KEYS))
        else:
            (folder / "generation_config.json").unlink()
    _clean_tokenizer(folder)


def _model_keys(found: dict[str, Any], generator: bool) -> set[str]:
    try:
        return schemas.model_keys(found.get("model_type"), generator)
    except ValueError as error:
        raise UserError(f"{error}: it cannot be exported") from None


def _clean_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            "the tokenizer has no tokenizer.json, the one file that describes it without code"
        )
    for name in ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)  # all of it is in tokenizer.json
    rewrite(folder / "tokenizer_config.json", lambda c: _only(c, schemas.TOKENIZER_KEYS))


def _only(found: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: found[key] for key in sorted(found.keys() & keys)}


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the object in a JSON file."""
    write_json(path, change(json.loads(path.read_text("utf-8"))))


def write_json(path: Path, content: Any) -> None:
    """A JSON file that people can read, and that is the same for the same content."""
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
