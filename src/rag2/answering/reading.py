"""Bytes of a JSON or safetensors file from elsewhere -> plain values, before any library sees them.

Errors are ValueError: the one line of `contents.check` says which file.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

JSON_LIMIT, TOKENIZER_LIMIT, TEXT_LIMIT = 16 << 20, 256 << 20, 1 << 20  # bytes of a file
TEMPLATE_LIMIT = 64 << 10  # characters of a chat template
HEADER_LIMIT = 100_000_000  # bytes, as safetensors itself bounds it
DEPTH = 64
BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
PICKLE = (b"\x80", b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"(dp", b"cos\n", b"\x93NUMPY")
# Keys by which a library would run or fetch something that is not in the file.
CODE = re.compile(
    r"auto_map|auto_mapping|custom_|implementation|quantization|kernels|backbone|pretrained"
    r"|trust_remote|name_or_path|(^|_)(path|file|url|code|repo|revision|module_class)$|__\w+__"
)
# Words and numbers: no path, no address, no `repository--module.Class`, no file name.
PLAIN = re.compile(r"[\w +,:()-]*(\.[\w +,:()-]+)*")
SUFFIXES = re.compile(r"\.(py|pyc|so|bin|pt|pth|pkl|pickle|joblib|npy|npz|zip|gguf|h5|onnx)$")


def read_json(path: Path, limit: int = JSON_LIMIT) -> Any:
    """The value of a JSON file: no key twice, no NaN, not deeper than DEPTH."""
    try:
        text = read_text(path, limit)
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if _depth(found) > DEPTH:
        raise ValueError(f"is nested deeper than {DEPTH}")
    return found


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """The text of a file in UTF-8 that is not larger than `limit` bytes."""
    if path.stat().st_size > limit:
        raise ValueError(f"is larger than {limit:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError("is not text in UTF-8") from None


def check_safetensors(path: Path) -> list[int]:
    """How many numbers each tensor of a file holds.

    Refuses what is not safetensors to the last byte: tensors side by side, and nothing else.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
            other = " but a pickle, NumPy or packed file" if head.startswith(PICKLE) else ""
            raise ValueError(f"is not safetensors{other}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ValueError("is not safetensors: its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("is not safetensors: its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("is not safetensors: odd metadata")
    end = 0
    for begin, stop in sorted(_span(name, entry) for name, entry in header.items()):
        if begin != end:
            raise ValueError("is not safetensors: its tensors overlap or leave a gap")
        end = stop
    if end != size - 8 - length:
        raise ValueError("is not safetensors: there is something behind its tensors")
    return [math.prod(entry["shape"]) for entry in header.values()]


def check_plain(value: Any, where: str) -> None:
    """Refuse strings that name files, code or addresses, and keys that name code, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_key(key)
            check_plain(key, where)
            check_plain(item, f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            check_plain(item, where)
    elif isinstance(value, str):
        if len(value) > 200 or not PLAIN.fullmatch(value) or "--" in value:
            raise ValueError(f"{where} is {value[:60]!r}: a path, an address or code")
        if SUFFIXES.search(value.lower()):
            raise ValueError(f"{where} is {value[:60]!r}, the name of a file")


def check_key(key: str) -> None:
    """Refuse a key by which a library would run or fetch something."""
    if CODE.search(key):
        raise ValueError(f"key {key[:60]!r} names code or files outside the export")


def closed(found: Any, allowed: Any, required: Any = ()) -> dict[str, Any]:
    """The object itself; refuses anything else, unknown keys and missing ones."""
    if not isinstance(found, dict):
        raise ValueError("is not an object")
    for key in sorted(found.keys() - set(allowed)):
        check_key(key)
        raise ValueError(f"unknown key {key[:60]!r}")
    for key in sorted(set(required) - found.keys()):
        raise ValueError(f"key {key!r} is missing")
    return found


def _span(name: str, entry: Any) -> tuple[int, int]:
    """First byte and end of a tensor, whose type and shape must account for them."""
    try:
        begin, stop = entry["data_offsets"]
        size = BYTES[entry["dtype"]] * math.prod(entry["shape"])
        numbers = [begin, stop, *entry["shape"]]
        sound = all(type(n) is int and n >= 0 for n in numbers) and len(entry) == 3
    except (KeyError, TypeError, ValueError):
        sound, begin, stop, size = False, 0, 0, 0
    if not sound or stop - begin != size:
        raise ValueError(f"is not safetensors: tensor {name[:60]!r} has no sound description")
    return begin, stop


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("has a key twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"holds {name}, which JSON does not have")


def _depth(value: Any) -> int:
    """How deep objects and lists lie in each other; iterative, as the value may be hostile."""
    deepest, todo = 0, [(value, 1)]
    while todo:
        item, depth = todo.pop()
        deepest = max(deepest, depth)
        inner = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        todo += [(each, depth + 1) for each in inner]
    return deepest
