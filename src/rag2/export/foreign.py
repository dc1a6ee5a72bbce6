"""Two halves that were not trained here -> a source, and how to read the retriever.

A folder of sentence-transformers says itself how it pools, normalises and prefixes; a plain Hugging
Face folder says nothing of it, and is read with mean pooling and unit length.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import AutoConfig

from rag2 import artifact, hub
from rag2.answering.settings import Settings
from rag2.export.source import Source
from rag2.registry import UserError
from rag2.retriever.encoder import FILE, EncoderConfig
from rag2.retriever.network import load_tokenizer

MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
LONGEST = 512  # tokens, where neither the tokenizer nor the network has a limit


def of_parts(retriever: Path, generator: Path, kb: Path) -> tuple[Source, EncoderConfig | None]:
    """The system of three parts; None for the encoder where rag2's own file says how to read it."""
    for path, what in ((retriever, "retriever"), (generator, "generator")):
        if not path.is_dir():
            raise UserError(f"{what} {str(path)!r} is not a folder")
    if not kb.is_file():
        raise UserError(f"knowledge base {str(kb)!r} does not exist")
    hub.is_local(str(generator), "generator")
    parents = {}
    for name, half in (("retriever", retriever), ("generator", generator)):
        if artifact.is_complete(half.parent):  # of a run of ours
            parents[name] = artifact.seal(artifact.verify(half.parent))
    settings = Settings()
    encoder = None if (retriever / FILE).is_file() else read_encoder(retriever)
    return Source(generator, retriever, kb, settings, parents=parents), encoder


def read_encoder(folder: Path) -> EncoderConfig:
    """How to read a folder of sentence-transformers, or a plain one; UserError for any other."""
    if not (folder / "modules.json").is_file():
        hub.is_local(str(folder), "encoder")
        settings = {"model": str(folder), **_lengths(folder, None)}
        return EncoderConfig.model_validate(settings)
    modules = {_kind(row, folder): folder / str(row.get("path", "")) for row in _modules(folder)}
    transformer, pooling = modules["Transformer"], _json(modules["Pooling"] / "config.json")
    if transformer.resolve() != folder.resolve():
        raise UserError(f"{folder}: its network lies in {transformer.name}/, not in the folder")
    told = _json(folder / "sentence_bert_config.json")
    said = _json(folder / "config_sentence_transformers.json")
    prompts = said.get("prompts") or {}
    prefixes = {
        "question_prefix": prompts.get("query") or "",
        "chunk_prefix": prompts.get("document") or prompts.get("passage") or "",
    }
    if pooling.get("include_prompt") is False and any(prefixes.values()):
        raise UserError(f"{folder}: it leaves its prompts out of the mean, which rag2 does not")
    if told.get("do_lower_case"):
        raise UserError(f"{folder}: it lower-cases texts itself (do_lower_case)")
    cosine = (said.get("similarity_fn_name") or "cosine") == "cosine"
    try:
        return EncoderConfig.model_validate(
            {
                "model": str(folder),
                "pooling": _pooling(pooling, folder),
                "normalize": "Normalize" in modules or cosine,
                **prefixes,
                **_lengths(folder, told.get("max_seq_length")),
            }
        )
    except ValidationError as error:
        line = error.errors()[0]
        raise UserError(f"{folder}: {'.'.join(map(str, line['loc']))}: {line['msg']}") from None


def _modules(folder: Path) -> list[dict[str, Any]]:
    rows = _json(folder / "modules.json")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{folder / 'modules.json'} is no list of modules")
    kinds = [_kind(row, folder) for row in rows]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{folder}: it is {', '.join(kinds)}; rag2 reads Transformer, Pooling and Normalize"
        )
    return rows


def _kind(row: dict[str, Any], folder: Path) -> str:
    """The class of a module, which must be one of the library's own."""
    name = str(row.get("type"))
    if not name.startswith("sentence_transformers."):
        raise UserError(
            f"{folder}: module {name[:80]!r} is code that is not sentence-transformers'"
        )
    return name.rpartition(".")[2]


def _pooling(found: dict[str, Any], folder: Path) -> str:
    """cls or mean; UserError for any other way to make one vector of many."""
    mode = found.get("pooling_mode")
    if mode is None:
        on = [k for k, v in found.items() if k.startswith("pooling_mode_") and v is True]
        mode = MODES.get(on[0], on[0]) if len(on) == 1 else on
    if mode not in ("cls", "mean"):
        raise UserError(f"{folder}: it pools by {mode}; rag2's encoder by cls or mean")
    return mode


def _lengths(folder: Path, limit: Any) -> dict[str, int]:
    """The limits of both sides: what the folder says, within what its network takes."""
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    tokenizer = load_tokenizer(str(folder))
    most = min(getattr(config, "max_position_embeddings", LONGEST), tokenizer.model_max_length)
    tokens = min(limit if isinstance(limit, int) else LONGEST, most)
    return {"max_question_tokens": tokens, "max_chunk_tokens": tokens}


def _json(path: Path) -> Any:
    """The content of a JSON file; empty where there is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
