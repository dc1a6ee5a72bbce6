"""Ways to make an export hostile whose manifests vouch for every byte, and what refuses each."""

import io
import json
import pickle
import random
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from exports import edit, put

Change = Callable[[Path], object]


class Evil:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch unpickled",)


PICKLE = pickle.dumps(Evil())
NPY = io.BytesIO()
np.save(NPY, np.array([Evil()], dtype=object), allow_pickle=True)
ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as _zip:
    _zip.writestr("archive/data.pkl", PICKLE)
CODE = "import os\nos.system('touch executed')\n"
HEADER = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'


def tensors(header: bytes, body: bytes = b"\0" * 16) -> bytes:
    """A safetensors file of this header."""
    return len(header).to_bytes(8, "little") + header + body


def sql(*statements: str) -> Change:
    """Change kb.sqlite by hand."""

    def apply(directory: Path) -> None:
        with closing(sqlite3.connect(directory / "kb.sqlite")) as db:
            db.execute("PRAGMA writable_schema = ON")
            for statement in statements:
                db.execute(statement)
            db.commit()

    return apply


def poke(name: str, at: int, data: bytes) -> Change:
    """Put other bytes into a file."""

    def apply(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[at : at + len(data)] = data
        (directory / name).write_bytes(content)

    return apply


def key(name: str, **values: Any) -> Change:
    """Set keys of a JSON file."""
    return edit(name, lambda found: found.update(values))


def link(name: str, to: str) -> Change:
    """Put a symbolic link in the place of a file."""

    def apply(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(to)

    return apply


def listed(name: str) -> Change:
    """Name a file in the manifest that lies elsewhere, its seal true."""
    from rag2 import artifact

    def apply(directory: Path) -> None:
        path = directory / "manifest.json"
        body = json.loads(path.read_text())
        body.pop("seal")
        body["files"][name] = body["files"]["prompt.json"]
        path.write_bytes(artifact._sealed(body))

    return apply


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


GEN, RET = "generator/config.json", "retriever/config.json"
# name -> (change, part of the line that refuses it)
HOSTILE: dict[str, tuple[Change, str]] = {
    "auto_map": (key(GEN, auto_map={"AutoModelForCausalLM": "evil.Model"}), "names code"),
    "auto_map of the retriever": (key(RET, auto_map={"AutoModel": "x--evil.M"}), "names code"),
    "auto_map of a tokenizer": (
        key("generator/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        "names code",
    ),
    "pipelines": (key(GEN, custom_pipelines={"x": {"impl": "evil.P"}}), "names code"),
    "attention from the hub": (key(GEN, _attn_implementation="evil/kernel"), "names code"),
    "attention, without _": (key(GEN, attn_implementation="evil/kernel"), "names code"),
    "quantization": (key(GEN, quantization_config={"quant_method": "gptq"}), "names code"),
    "nested code": (key(GEN, rope_parameters={"auto_map": "x"}), "names code"),
    "unknown key": (key(GEN, surprise=1), "unknown key 'surprise'"),
    "unknown model": (key(GEN, model_type="evil"), "is no causal language model"),
    "model from elsewhere": (key(GEN, model_type="../evil"), "is no causal language model"),
    "no causal LM": (key(GEN, model_type="vit"), "is no causal language model"),
    "absolute path": (key(GEN, hidden_act="/etc/passwd"), "a path, an address or code"),
    "path upwards": (key(GEN, hidden_act="..evil"), "a path, an address or code"),
    "file name": (key(GEN, hidden_act="evil.py"), "the name of a file"),
    "address": (key(GEN, hidden_act="http://evil"), "a path, an address or code"),
    "hub code": (key(GEN, hidden_act="owner--evil.Act"), "a path, an address or code"),
    "dtype": (key(GEN, dtype="load"), "dtype is 'load'"),
    "layers without end": (key(GEN, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "a huge vocabulary": (key(GEN, vocab_size=10**12), "more than the largest"),
    "name_or_path": (key(RET, _name_or_path="/home/me"), "names code or files"),
    "tokenizer class": (
        key("generator/tokenizer_config.json", tokenizer_class="EvilTokenizer"),
        "none of transformers' own",
    ),
    "tokenizer file": (
        key("generator/tokenizer_config.json", tokenizer_file="/etc/passwd"),
        "names code or files",
    ),
    "long template": (
        key("generator/tokenizer_config.json", chat_template="x" * 100_000),
        "chat_template is no text of 65,536",
    ),
    "long template file": (put("generator/chat_template.jinja", "x" * 100_000), "larger than"),
    "tokenizer.json of another kind": (key("generator/tokenizer.json", evil="x"), "unknown key"),
    "generation by code": (
        key("generator/generation_config.json", custom_generate="evil"),
        "names code",
    ),
    "key twice": (put("generator/generation_config.json", '{"top_k": 1, "top_k": 2}'), "key twice"),
    "NaN": (put("generator/generation_config.json", '{"top_p": NaN}'), "holds NaN"),
    "deep": (put("generator/generation_config.json", nested(100_000)), "nested too deep"),
    "less deep": (put("generator/generation_config.json", nested(100)), "nested deeper"),
    "no JSON": (put("prompt.json", "import os"), "is not JSON"),
    "no object": (put(GEN, "[]"), "is not an object"),
    "no text": (put("README.md", b"\xff\xfe\x00"), "is not text in UTF-8"),
    "shard elsewhere": (
        put("generator/model.safetensors.index.json", '{"weight_map": {"w": "../evil"}}'),
        "no file beside it",
    ),
    "encoder from elsewhere": (
        edit("retriever/rag2_encoder.json", lambda f: f["config"].update(model="/evil")),
        "outside the export",
    ),
    "module of code": (
        edit("retriever/modules.json", lambda f: f[0].update(type="evil.Module")),
        "says something else than",
    ),
    "other pooling": (
        put("retriever/1_Pooling/config.json", '{"pooling_mode": "cls"}'),
        "says something else than",
    ),
    "routes": (put("retriever/router_config.json", "{}"), "says something else than"),
    "index on a server": (
        edit("index/index.json", lambda f: f.update(backend={"name": "milvus", "uri": "http://x"})),
        "is no index of flat",
    ),
    "index of another kind": (poke("index/index.faiss", 0, b"IHNf"), "is no index of kind 'flat'"),
    "index that lies about its dimension": (
        poke("index/index.faiss", 4, (2**31 - 1).to_bytes(4, "little")),
        "its lengths are not those of its bytes",
    ),
    "index that lies about its vectors": (
        poke("index/index.faiss", 8, (2**40).to_bytes(8, "little")),
        "its lengths are not those of its bytes",
    ),
    "index that lies about its floats": (
        poke("index/index.faiss", 37, (2**62).to_bytes(8, "little")),
        "its lengths are not those of its bytes",
    ),
    "graph in the place of a flat index": (
        edit("index/index.json", lambda f: f.update(backend={"name": "hnsw"})),
        "is no index of kind 'hnsw'",
    ),
    "prompt": (key("prompt.json", code="x"), "code: Extra inputs"),
    "prompt with many chunks": (key("prompt.json", k=10**9), "k: "),
    "adapter elsewhere": (
        put(
            "generator/adapter_config.json",
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil/base"}),
        ),
        "not the folder 'base' inside",
    ),
    "adapter by code": (
        put(
            "generator/adapter_config.json",
            json.dumps(
                {
                    "peft_type": "LORA",
                    "base_model_name_or_path": "base",
                    "auto_mapping": {"parent_library": "evil"},
                }
            ),
        ),
        "names code",
    ),
    "adapter of megatron": (
        put(
            "generator/adapter_config.json",
            '{"peft_type": "LORA", "base_model_name_or_path": "base", "megatron_core": "evil"}',
        ),
        "a foreign module",
    ),
    "pickle as weights": (put("generator/model.safetensors", PICKLE), "but a pickle"),
    "zip as weights": (put("retriever/model.safetensors", ZIP.getvalue()), "but a pickle"),
    "numpy as weights": (put("index/ids.safetensors", NPY.getvalue()), "but a pickle"),
    "tensors that overlap": (
        put(
            "generator/model.safetensors",
            tensors(
                b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]},'
                b'"b":{"dtype":"U8","shape":[9],"data_offsets":[7,16]}}'
            ),
        ),
        "overlap or leave a gap",
    ),
    "bytes behind tensors": (
        put("generator/model.safetensors", tensors(HEADER, b"\0" * 99)),
        "something behind",
    ),
    "a tensor of another size": (
        put("generator/model.safetensors", tensors(HEADER.replace(b"[4]", b"[5]"))),
        "no sound description",
    ),
    "pickle as JSON": (put(GEN, PICKLE), "is not"),
    "pickle as a knowledge base": (put("kb.sqlite", PICKLE), "is not a file of SQLite"),
    "pickle as chunks": (put("index/chunks.arrow", PICKLE), "is not an Arrow file"),
    "pytorch_model.bin": (put("generator/pytorch_model.bin", ZIP.getvalue()), "has no file"),
    "training_args.bin": (put("retriever/training_args.bin", PICKLE), "has no file"),
    "a pickle": (put("index/ids.pkl", PICKLE), "has no file"),
    "a checkpoint": (put("generator/base/model.pt", ZIP.getvalue()), "has no file"),
    "numpy": (put("index/vectors.npy", NPY.getvalue()), "has no file"),
    "a module": (put("generator/modeling_evil.py", CODE), "has no file"),
    "a module of the retriever": (put("retriever/__init__.py", CODE), "has no file"),
    "a library": (put("generator/kernel.so", b"\x7fELF"), "has no file"),
    "another case": (put("generator/CONFIG.json", "{}"), "are one on some machines"),
    "hidden": (put(".gitattributes", ""), "has no file"),
    "a log of SQLite": (put("kb.sqlite-wal", b""), "has no file"),
    "a journal of SQLite": (put("kb.sqlite-journal", b""), "has no file"),
    "name upwards": (listed("../evil"), "is missing"),
    "absolute name": (listed("/etc/passwd"), "is missing"),
    "name with a backslash": (listed("generator\\evil.py"), "is missing"),
    "link": (link("prompt.json", "/etc/hostname"), "no regular file"),
    "link inside": (link("generator/tokenizer.json", "../tokenizer/tokenizer.json"), "no regular"),
    "linked knowledge base": (link("kb.sqlite", "/dev/null"), "no regular file"),
    "trigger": (
        sql("CREATE TRIGGER t AFTER INSERT ON documents BEGIN DELETE FROM chunks; END"),
        "holds the trigger 't'",
    ),
    "view": (sql("CREATE VIEW v AS SELECT load_extension('evil')"), "holds the view 'v'"),
    "view for a table": (
        sql("DROP TABLE changes", "CREATE VIEW changes AS SELECT 1 AS version"),
        "holds the view 'changes'",
    ),
    "another default": (
        sql(
            "UPDATE sqlite_master SET sql = replace(sql, 'DEFAULT ''''', 'DEFAULT (randomblob(9))')"
            " WHERE name = 'documents'"
        ),
        "has another table 'documents'",
    ),
    "another table": (sql("CREATE TABLE evil (x)"), "holds the table 'evil'"),
    "index with an expression": (
        sql("CREATE INDEX evil ON chunks (abs(start))"),
        "holds the index 'evil'",
    ),
    "full text of another kind": (
        sql(
            "INSERT INTO sqlite_master VALUES ('table', 'words_9', 'words_9', 0,"
            " 'CREATE VIRTUAL TABLE words_9 USING fts5 (title, text, tokenize = evil)')"
        ),
        "lacks the table 'words_9_config'",
    ),
    "another format": (sql("UPDATE meta SET value = 'x' WHERE key = 'format'"), "not of format"),
    "unknown entry": (sql("INSERT INTO meta VALUES ('evil', '1')"), "unknown entry 'evil'"),
    "tokenizer elsewhere": (
        sql("UPDATE meta SET value = replace(value, '\"tokenizer\"}', '\"evil/tokenizer\"}')"),
        "cut by a tokenizer outside it",
    ),
    "no kb": (lambda d: (d / "kb.sqlite").unlink(), "it has no 'kb.sqlite'"),
    "no prompt": (lambda d: (d / "prompt.json").unlink(), "it has no 'prompt.json'"),
    "no pooling": (
        lambda d: (d / "retriever/1_Pooling/config.json").unlink(),
        "no 'retriever/1_Pooling/config.json'",
    ),
    "another kind": (edit("manifest.json", lambda m: m.update(kind="system")), "not a 'export'"),
    "another format of manifest": (
        edit("manifest.json", lambda m: m["meta"].update(format="rag2.export/9")),
        "meta.format",
    ),
    "meta with more": (edit("manifest.json", lambda m: m["meta"].update(code="x")), "meta.code"),
}


def mutated(dice: random.Random, directory: Path) -> tuple[str, str]:
    """Change a small thing anywhere in an export; returns the part that it is in, and what."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != "manifest.json")
    path = dice.choice(files)
    data = bytearray(path.read_bytes())
    kinds = ["flip", "cut", "insert", "copy", "swap", "splice", "json"]
    kind = dice.choice(kinds if path.suffix == ".json" else kinds[:-1])
    at = dice.randrange(len(data)) if dice.random() < 0.5 else dice.randrange(min(len(data), 512))
    if kind == "flip":
        data[at] ^= 1 << dice.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "insert":
        data[at:at] = dice.choice([PICKLE, b"\0" * 64, b"\xff" * 8, CODE.encode(), b"../../evil"])
    elif kind == "copy":
        data[at:at] = data[at : at + dice.randrange(1, 256)]
    elif kind == "swap":
        data[:] = dice.choice(files).read_bytes()
    elif kind == "splice":
        value = dice.choice([2**63 - 1, 2**31, 2**16, 0, 1]).to_bytes(8, "little")
        data[at : at + 8] = value[: len(data[at : at + 8])]
    else:
        data = bytearray(json.dumps(_twisted(dice, json.loads(data))).encode())
    path.write_bytes(data)
    name = path.relative_to(directory).as_posix()
    return name.split("/")[0], f"{kind} of {name} at {at}"


def _twisted(dice: random.Random, value: Any) -> Any:
    """The value with one thing in it replaced, however deep it lies."""
    odd = [None, True, -1, 10**18, 1.5e308, "", "../../evil", "evil.py", "x--evil.M", [], {}]
    odd += [{"auto_map": {"AutoModel": "evil.M"}}, "/etc/passwd", [[]] * 3]
    if isinstance(value, dict) and value and dice.random() < 0.9:
        name = dice.choice(sorted(value))
        if dice.random() < 0.2:
            return value | {dice.choice(["auto_map", "evil", name.upper(), "_x"]): value[name]}
        return value | {name: _twisted(dice, value[name])}
    if isinstance(value, list) and value and dice.random() < 0.8:
        at = dice.randrange(len(value))
        return [*value[:at], _twisted(dice, value[at]), *value[at + 1 :]]
    return dice.choice(odd)
