"""Encoder settings -> the JSON files by which sentence-transformers reads the same folder.

The old names of its modules: versions from 2 on know them. Two towers are routes (version 5 on).
"""

from typing import Any

from rag2.retriever.encoder import EncoderConfig

MODULES = "sentence_transformers.models"
POOLING, NORMALIZE = "1_Pooling", "2_Normalize"
MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")


def files(config: EncoderConfig, dimension: int) -> dict[str, Any]:
    """Relative name -> content of every file beside those of Hugging Face.

    One tower has one limit of length there, the larger one of rag2's two.
    """
    limits = (config.max_question_tokens, config.max_chunk_tokens)
    behind = [POOLING, NORMALIZE] if config.normalize else [POOLING]
    types = {POOLING: f"{MODULES}.Pooling", NORMALIZE: f"{MODULES}.Normalize"}
    found: dict[str, Any] = {
        "config_sentence_transformers.json": {
            "prompts": {"query": config.question_prefix, "document": config.chunk_prefix},
            "default_prompt_name": None,
            "similarity_fn_name": "dot",
        },
        f"{POOLING}/config.json": _pooling(config, dimension),
    }
    if config.normalize:
        found[f"{NORMALIZE}/config.json"] = {}
    if config.towers == "shared":
        found["sentence_bert_config.json"] = _limit(max(limits))
        found["modules.json"] = [
            _module(0, "", f"{MODULES}.Transformer"),
            *(_module(i, name, types[name]) for i, name in enumerate(behind, 1)),
        ]
        return found
    found["modules.json"] = [_module(0, "", f"{MODULES}.Router")]
    towers = dict.fromkeys(("question", "chunk"), f"{MODULES}.Transformer")
    found["router_config.json"] = {
        "types": towers | {name: types[name] for name in behind},
        "structure": {"query": ["question", *behind], "document": ["chunk", *behind]},
        "parameters": {"default_route": "document", "allow_empty_key": True},
    }
    for tower, limit in zip(towers, limits, strict=True):
        found[f"{tower}/sentence_bert_config.json"] = _limit(limit)
    return found


def _module(index: int, path: str, kind: str) -> dict[str, Any]:
    return {"idx": index, "name": str(index), "path": path, "type": kind}


def _limit(tokens: int) -> dict[str, Any]:
    return {"max_seq_length": tokens, "do_lower_case": False}


def _pooling(config: EncoderConfig, dimension: int) -> dict[str, Any]:
    mode = {"cls": "cls_token", "mean": "mean_tokens"}[config.pooling]
    flags = {f"pooling_mode_{name}": name == mode for name in MODES}
    return {"word_embedding_dimension": dimension, **flags, "include_prompt": True}
