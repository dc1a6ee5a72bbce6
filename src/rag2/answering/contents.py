"""The files of an export -> refused, or such that parsing them runs no code of theirs.

Which names there may be is a closed list, so that a pickle has none; what a file says it is, its
first bytes must be; JSON is closed (see `schemas`). It looks at bytes with code of our own alone:
transformers, FAISS, Arrow and SQLite come after it, the last for a look at its list of tables.
"""

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rag2 import artifact
from rag2.answering import reading, schemas
from rag2.answering.settings import Settings
from rag2.index import base
from rag2.index.generation import KIND as GENERATION
from rag2.kb.closed import flaw
from rag2.registry import UserError, lookup
from rag2.retriever import sentence
from rag2.retriever.encoder import DTYPES, FILE, FORMAT, EncoderConfig

TOKENIZER = r"tokenizer\.json|tokenizer_config\.json|chat_template\.jinja"
WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|config\.json"
MODEL = rf"{TOKENIZER}|{WEIGHTS}|generation_config\.json"
ADAPTER = r"(adapter_config|rag2_adapter)\.json|adapter(_model)?\.safetensors"
TOWER = rf"{TOKENIZER}|{WEIGHTS}|sentence_bert_config\.json"
SENTENCE = r"(modules|router_config|config_sentence_transformers|rag2_encoder)\.json"
NAMES = re.compile(
    rf"README\.md|prompt\.json|kb\.sqlite|tokenizer/tokenizer\.json"
    rf"|generator/({MODEL}|{ADAPTER})|generator/base/({MODEL})"
    rf"|retriever/({TOWER}|{SENTENCE})|retriever/(question|chunk)/({TOWER})"
    r"|retriever/(1_Pooling|2_Normalize)/config\.json"
    r"|index/(manifest\.json|index\.json|(ids|vectors)\.safetensors|chunks\.arrow|index\.faiss)"
)
NEEDED = {
    *("README.md", "prompt.json", "kb.sqlite", "generator/tokenizer.json", f"retriever/{FILE}"),
    *("index/manifest.json", "index/index.json", "index/ids.safetensors", "index/chunks.arrow"),
}
# Kinds of index that lie in the folder itself, and how a file of FAISS begins.
LOCAL = {"flat": b"IxFI", "ivf": b"IwFl", "hnsw": b"IHNf", "torch": b""}
FLAT = struct.Struct("<4siqqq?iQ")  # IndexFlatIP: d, n, two unused, trained, metric, floats
INDEX_KEYS = {"format", "backend", "count", "dimension", "max_norm"}


def check(directory: Path) -> None:
    """Raise ArtifactError, one line, for the first file that an export may not hold as it is."""
    files = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
    files.pop(artifact.MANIFEST, None)
    check_names(directory, files)
    artifact.verify(directory / "index", kind=GENERATION)
    for name, path in sorted(files.items()):
        with _blaming(directory, name):
            _check_file(name, path)
    with _blaming(directory, f"retriever/{FILE}"):
        _check_sentence(directory / "retriever", files)


@contextmanager
def _blaming(directory: Path, name: str) -> Iterator[None]:
    """Whatever is wrong with a file, in one line that names it.

    A value of the wrong type may fail anywhere: what was not looked at to its end is refused.
    """
    try:
        yield
    except artifact.ArtifactError:
        raise
    except Exception as error:
        raise artifact.ArtifactError(f"{directory}: file {name!r} {_worded(error)}") from None


def check_names(directory: Path, names: Iterable[str]) -> None:
    """Refuse names that an export does not have, two that differ in case alone, and a missing one.

    Hidden files, pickles, code, paths that lead out of the folder: all are names it does not have.
    """
    folded: dict[str, str] = {}
    for name in sorted(names):
        if other := folded.get(name.casefold()):
            line = f"files {other!r} and {name!r} are one on some machines"
            raise artifact.ArtifactError(f"{directory}: {line}")
        folded[name.casefold()] = name
    for name in sorted(folded.values()):
        if not NAMES.fullmatch(name):
            raise artifact.ArtifactError(f"{directory}: an export has no file {name[:120]!r}")
    for name in sorted(NEEDED - set(folded.values())):
        raise artifact.ArtifactError(f"{directory} is no whole export: it has no {name!r}")


def _check_file(name: str, path: Path) -> None:
    """Refuse a file that is not what its name says; ValueError."""
    if path.suffix == ".safetensors":
        reading.check_safetensors(path)
    elif path.suffix in (".md", ".jinja"):
        limit = reading.TEMPLATE_LIMIT if path.suffix == ".jinja" else reading.TEXT_LIMIT
        reading.read_text(path, limit)
    elif path.suffix == ".faiss":
        _check_faiss(path)
    elif path.suffix == ".arrow":
        _check_magic(path, b"ARROW1\0\0", "an Arrow file")
    elif path.suffix == ".sqlite":
        _check_magic(path, b"SQLite format 3\0", "a file of SQLite")
        if found := flaw(path):
            raise ValueError(found)
    elif name != f"index/{artifact.MANIFEST}":  # which was verified
        _check_json(name, path)


def _check_json(name: str, path: Path) -> None:
    limit = reading.TOKENIZER_LIMIT if path.name == "tokenizer.json" else reading.JSON_LIMIT
    found = reading.read_json(path, limit)
    checks: dict[str, Callable[[Any], object]] = {
        "config.json": lambda value: schemas.model(
            value, name.startswith("generator/"), _tensors(path.parent)
        ),
        "tokenizer.json": schemas.tokenizer,
        "tokenizer_config.json": schemas.tokenizer_config,
        "generation_config.json": schemas.generation,
        "model.safetensors.index.json": lambda value: schemas.shards(value, path.parent),
        "adapter_config.json": schemas.peft,
        "rag2_adapter.json": schemas.adapter,
        "prompt.json": Settings.model_validate,
        "index.json": _check_index,
        FILE: encoder,
    }
    if path.name in checks and path.parent.name not in (sentence.POOLING, sentence.NORMALIZE):
        checks[path.name](found)


def _tensors(folder: Path) -> list[int]:
    """The numbers in each tensor of a model's weights."""
    return [
        n
        for path in sorted(folder.glob("model*"))
        if path.suffix == ".safetensors"
        for n in reading.check_safetensors(path)
    ]


def encoder(found: Any) -> EncoderConfig:
    """rag2_encoder.json: the settings of an encoder that lies in the same folder."""
    keys = {"format", "dimension", "log_scale", "dtype", "config"}
    reading.closed(found, keys, keys)
    if found["format"] != FORMAT or found["dtype"] not in DTYPES:
        raise ValueError(f"is no encoder of format {FORMAT}")
    if type(found["dimension"]) is not int or type(found["log_scale"]) is not float:
        raise ValueError("has a dimension or a scale that is no number")
    reading.closed(found["config"], EncoderConfig.model_fields, EncoderConfig.model_fields)
    if found["config"]["model"] is not None:
        raise ValueError("key 'model' names files outside the export")
    return EncoderConfig.model_validate(found["config"])


def _check_index(found: Any) -> str:
    """index.json: an index that lies in the folder itself; returns its kind."""
    reading.closed(found, INDEX_KEYS, INDEX_KEYS)
    name = found["backend"].get("name") if isinstance(found["backend"], dict) else None
    if found["format"] != base.FORMAT or name not in LOCAL:
        raise ValueError(f"is no index of {', '.join(LOCAL)} in format {base.FORMAT}")
    lookup("index", name).model_validate(found["backend"])
    return name


def _check_faiss(path: Path) -> None:
    """A flat one, whose every byte is accounted for; of others how they begin.

    FAISS believes the lengths that a file states.
    """
    name = _check_index(reading.read_json(path.with_name("index.json")))
    with path.open("rb") as file:
        head = file.read(FLAT.size)
    if not LOCAL[name] or head[:4] != LOCAL[name]:
        raise ValueError(f"is no index of kind {name!r}")
    if name == "flat":
        if len(head) < FLAT.size:
            raise ValueError("is cut off")
        _, dimension, count, _, _, _, metric, floats = FLAT.unpack(head)
        sound = dimension > 0 and count >= 0 and metric == 0 and floats == dimension * count
        if not sound or path.stat().st_size != FLAT.size + 4 * floats:
            raise ValueError("is no flat index: its lengths are not those of its bytes")


def _check_magic(path: Path, magic: bytes, what: str) -> None:
    with path.open("rb") as file:
        if file.read(len(magic)) != magic:
            raise ValueError(f"is not {what}")


def _check_sentence(folder: Path, names: Iterable[str]) -> None:
    """What sentence-transformers reads must be what the encoder's own settings say, and no more."""
    inside = folder.name + "/"
    found = reading.read_json(folder / FILE)
    expected = sentence.files(encoder(found), found["dimension"])
    there = {name.removeprefix(inside) for name in names if name.startswith(inside)}
    own = re.compile(rf"((question|chunk)/)?({TOKENIZER}|{WEIGHTS})|{re.escape(FILE)}")
    for name in sorted(there):
        if name in expected:
            same = reading.read_json(folder / name) == expected[name]
        else:
            same = own.fullmatch(name) is not None
        if not same:
            line = f"file {inside + name!r} says something else than {inside + FILE!r}"
            raise artifact.ArtifactError(f"{folder.parent}: {line}")
    for name in sorted(expected.keys() - there):
        raise artifact.ArtifactError(f"{folder.parent} is no whole export: no {inside + name!r}")


def _worded(error: Exception) -> str:
    """The first complaint, in one line."""
    if not isinstance(error, ValueError):
        return f"is malformed ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" if place else first["msg"]
    if isinstance(error, UserError):
        return f"is refused: {error}"
    return " ".join(str(error).split())
