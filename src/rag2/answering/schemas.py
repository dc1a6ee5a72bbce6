"""The JSON files of a Hugging Face folder or an adapter -> refused, or closed.

Each has a list of the keys that it may have; a value is a number or a plain word unless it is a
token or a template. What transformers would take for the name of code, of a file or of a model on
the hub is in none of them. Errors are ValueError.
"""

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

from rag2.answering import reading
from rag2.generator.load import DTYPES
from rag2.generator.load import FORMAT as ADAPTER
from rag2.registry import UserError, lookup

BASE = "base"  # the folder inside the one of an adapter
COMMON = {"model_type", "architectures", "transformers_version", "dtype"}
LABELS = {"id2label", "label2id", "problem_type"}
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
SIZES = ("hidden_size", "vocab_size", "intermediate_size", "embedding_size", "n_embd", "n_inner")
TOKENS = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
TOKENIZER_KEYS = {f"{name}_token" for name in TOKENS} | {
    "tokenizer_class",
    "chat_template",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
    "additional_special_tokens",
    "extra_special_tokens",
    "added_tokens_decoder",
    "model_input_names",
    "model_specific_special_tokens",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
    "trim_offsets",
    "errors",
    "legacy",
}
GENERIC = {"TokenizersBackend", "PreTrainedTokenizerFast"}
TOKENIZER_JSON = {
    *("version", "truncation", "padding", "added_tokens", "normalizer"),
    *("pre_tokenizer", "post_processor", "decoder", "model"),
}
GENERATION_KEYS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"),
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "temperature"),
    *("top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("num_beams", "length_penalty", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    *("output_attentions", "output_hidden_states", "output_scores", "num_return_sequences"),
    *("return_dict_in_generate", "_from_model_config", "cache_implementation"),
}
PEFT_TYPES = {"LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
# Of PEFT's settings those that name other models, files or modules: only empty.
PEFT_EMPTY = re.compile(r"auto_mapping|revision|megatron_config|tokenizer_|_config$")


def model_keys(kind: Any, generator: bool) -> set[str]:
    """The keys of a config.json of this `model_type`; ValueError for one that needs code."""
    if not isinstance(kind, str) or kind not in _kinds(generator):
        what = "causal language model" if generator else "model"
        raise ValueError(f"model_type {str(kind)[:60]!r} is no {what} of transformers itself")
    from transformers import CONFIG_MAPPING

    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    return {key for key in fields if not reading.CODE.search(key)} - LABELS | COMMON


@cache
def _kinds(generator: bool) -> frozenset[str]:
    from transformers.models.auto import modeling_auto

    names = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES" if generator else "MODEL_MAPPING_NAMES"
    return frozenset(getattr(modeling_auto, names))


def model(found: Any, generator: bool, tensors: list[int]) -> None:
    """config.json: the fields that transformers' own class of that model has.

    `tensors` are the sizes of the weights: a network that is larger than they are is not built.
    """
    if not isinstance(found, dict):
        raise ValueError("is not an object")
    for key in found:
        reading.check_key(key)
    reading.closed(found, model_keys(found.get("model_type"), generator))
    for key, value in found.items():
        reading.check_plain(value, key)
        if type(value) is int and key in LAYERS and value > len(tensors):
            raise ValueError(f"{key} is {value}, but the weights are of {len(tensors)} tensors")
        if type(value) is int and key.endswith(SIZES) and value > max(tensors, default=0):
            raise ValueError(f"{key} is {value}, more than the largest of the weights' tensors")
    if found.get("dtype", "float32") not in DTYPES:
        raise ValueError(f"dtype is {str(found['dtype'])[:60]!r}; allowed: {', '.join(DTYPES)}")


def tokenizer_config(found: Any) -> None:
    """tokenizer_config.json; tokens and templates are any text, a class is transformers' own."""
    reading.closed(found, TOKENIZER_KEYS)
    name = found.get("tokenizer_class")
    if name is not None and name not in _tokenizer_classes():
        raise ValueError(f"tokenizer_class {str(name)[:60]!r} is none of transformers' own")
    template = found.get("chat_template")
    if template is not None:
        if not isinstance(template, str) or len(template) > reading.TEMPLATE_LIMIT:
            raise ValueError(f"chat_template is no text of {reading.TEMPLATE_LIMIT:,} characters")


@cache
def _tokenizer_classes() -> frozenset[str]:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    own = {n for names in TOKENIZER_MAPPING_NAMES.values() for n in _names(names)}
    return frozenset(own | {f"{name}Fast" for name in own} | GENERIC)


def _names(names: Any) -> list[str]:
    return [n for n in ([names] if isinstance(names, str) else names or []) if n]


def tokenizer(found: Any) -> None:
    """tokenizer.json: the parts that the tokenizers library has, whose parser is Rust."""
    reading.closed(found, TOKENIZER_JSON, {"model"})


def generation(found: Any) -> None:
    """generation_config.json: numbers and token ids."""
    for key, value in reading.closed(found, GENERATION_KEYS).items():
        reading.check_plain(value, key)


def shards(found: Any, folder: Path) -> None:
    """model.safetensors.index.json: every tensor lies in a file beside it."""
    reading.closed(found, {"metadata", "weight_map"}, {"weight_map"})
    if not isinstance(found["weight_map"], dict):
        raise ValueError("weight_map is no object")
    for name in set(map(str, found["weight_map"].values())):
        if not re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name):
            raise ValueError(f"weight_map names {name[:60]!r}, which is no file beside it")
        if not (folder / name).is_file():
            raise ValueError(f"weight_map names {name!r}, which is not there")


def peft_keys(kind: Any) -> set[str]:
    """The keys of an adapter_config.json of this `peft_type`."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    if kind not in PEFT_TYPES:
        allowed = ", ".join(sorted(PEFT_TYPES))
        raise ValueError(f"peft_type {str(kind)[:60]!r} is none of {allowed}")
    return {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}


def peft(found: Any) -> None:
    """adapter_config.json: PEFT's own fields, on the base inside the same folder."""
    if not isinstance(found, dict):
        raise ValueError("is not an object")
    reading.closed(found, peft_keys(found.get("peft_type")))
    if found.get("base_model_name_or_path") != BASE:
        named = str(found.get("base_model_name_or_path"))
        raise ValueError(f"its base is {named[:60]!r}, not the folder {BASE!r} inside the export")
    if found.get("megatron_core", "megatron.core") != "megatron.core":
        raise ValueError(f"megatron_core is {str(found['megatron_core'])[:60]!r}, a foreign module")
    for key, value in found.items():
        if PEFT_EMPTY.search(key) and value:
            raise ValueError(f"key {key!r} names code or files outside the export")
        if key != "base_model_name_or_path":
            reading.check_plain(value, key)


def adapter(found: Any) -> None:
    """rag2_adapter.json: a tuning method of ours on the base inside the same folder."""
    keys = {"format", "tuning", "base", "dtype", "fingerprint"}
    reading.closed(found, keys, keys)
    if found["format"] != ADAPTER or found["dtype"] not in DTYPES or found["base"] != BASE:
        raise ValueError(f"is no adapter of format {ADAPTER} on the folder {BASE!r} inside it")
    if not re.fullmatch("[0-9a-f]{64}", str(found["fingerprint"])):
        raise ValueError("fingerprint is no SHA-256")
    try:
        lookup("tuning", str(found["tuning"]["name"])).model_validate(found["tuning"])
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"names no tuning method: {str(error).splitlines()[0]}") from None
