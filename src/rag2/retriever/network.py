"""Checkpoint folder, hub id or shape -> the transformer network and the tokenizer of an encoder."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from rag2 import hub
from rag2.registry import UserError


def scratch(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden: int,
    layers: int,
    heads: int,
    intermediate: int,
    max_positions: int,
    dropout: float,
) -> PreTrainedModel:
    """A BERT with random weights for the vocabulary of `tokenizer`."""
    if hidden % heads:
        raise UserError(f"hidden={hidden} is not a multiple of heads={heads}")
    bert = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=max_positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        type_vocab_size=1,
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
    )
    return BertModel(bert, add_pooling_layer=False)


def load_tower(
    model: str, dropout: float | None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A checkpoint's network in `dtype`, in training mode, without the pooler it does not use."""
    local = hub.is_local(model, "encoder")
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=local, trust_remote_code=False)
        network: Any = MODEL_MAPPING[type(config)] if type(config) in MODEL_MAPPING else AutoModel
        extra: dict[str, Any] = {}
        # An unused pooler would be a weight without a gradient, which DDP refuses.
        if "add_pooling_layer" in inspect.signature(network).parameters:
            extra["add_pooling_layer"] = False
        if dropout is not None:
            for key, value in config.to_dict().items():
                if "dropout" in key and isinstance(value, float):
                    setattr(config, key, dropout)
        with _quiet():
            tower, report = AutoModel.from_pretrained(
                model,
                config=config,
                local_files_only=local,
                trust_remote_code=False,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **extra,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load encoder {model!r}: {reason}") from None
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise UserError(f"encoder {model!r} lacks {len(missing)} weights, such as {missing[0]!r}")
    return tower.train()


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a checkpoint."""
    try:
        local = hub.is_local(model, "encoder")
        return AutoTokenizer.from_pretrained(model, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load the tokenizer of encoder {model!r}: {reason}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loading report, which would call the pooler we leave out an anomaly."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
