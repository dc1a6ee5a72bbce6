"""Loads exports in this process while an audit hook writes down what no loading may do.

    python audited.py GOOD

GOOD is loaded first, so that what the libraries import once is there. Each line of stdin is then a
JSON list: a directory, the part of it to load (`all`, or a word that is none for the check alone)
and how the loader is to be spoiled (null: not at all). A line of stdout answers what came of it and
what was seen.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Packages whose modules a load may import late: those that rag2 itself stands on.
PACKAGES = sys.stdlib_module_names | {
    *("rag2", "rag2_kernels", "torch", "transformers", "tokenizers", "safetensors", "peft"),
    *(
        "numpy",
        "pyarrow",
        "pydantic",
        "pydantic_core",
        "faiss",
        "einops",
        "regex",
        "huggingface_hub",
    ),
    *("accelerate", "bitsandbytes", "triton", "jinja2", "scipy", "sklearn", "packaging", "tqdm"),
    *("google", "sentencepiece", "tiktoken"),  # by which transformers reads other tokenizers
}
FORBIDDEN = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
    *("socket.", "ctypes.dlopen", "pickle.find_class", "marshal.", "shutil.", "urllib.Request"),
    *("os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate"),
    *("os.chmod", "os.putenv", "code.__new__", "function.__new__", "webbrowser.open"),
)
SOURCES = ("exec", "compile")
seen: list[str] = []
armed = False


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    """Write down an event that loading has no business with."""
    if not armed:
        return
    if event.startswith("marshal.") and sys._getframe(1).f_code.co_filename.startswith("<frozen"):
        return  # the import of a module, which is an event of its own
    if event.startswith(FORBIDDEN):
        seen.append(f"{event} {str(arguments)[:200]}")
    elif event == "open":
        path, mode, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
            seen.append(f"open for writing {path} {mode}")
    elif event == "import":
        name = str(arguments[0])
        if name.split(".")[0] not in PACKAGES:
            seen.append(f"import {name}")
    elif event in SOURCES:
        told = foreign_code(event, arguments)
        if told:
            seen.append(f"{event} of {told}")


def foreign_code(event: str, arguments: tuple[Any, ...]) -> str | None:
    """Where code comes from that is not of an installed module; None for a library's own."""
    name = arguments[0].co_filename if event == "exec" else arguments[1]
    name = name.decode() if isinstance(name, bytes) else str(name)
    if name.startswith("<") or name == "None":  # dataclasses, enums and their like write methods
        caller = sys._getframe(2).f_code.co_filename
        return None if installed(caller) else f"{name} by {caller}"
    return None if installed(name) else name


def installed(path: str) -> bool:
    """Whether a file is of Python, of an installed package or of rag2."""
    roots = {str(Path(p).resolve()) for p in sys.path if p and "site-packages" in p}
    roots |= {os.path.dirname(os.__file__), sys.prefix, str(Path(__file__).resolve().parents[2])}
    return path.startswith(tuple(roots)) or path.startswith("<frozen")


def load(path: Path, part: str = "all") -> str:
    """`loaded`, or the one line with which it was refused; the class of any other error."""
    from rag2.answering.exported import Exported
    from rag2.registry import UserError

    try:
        system = Exported.open(path)
        stage = "parsed"
        if part in ("all", "retriever"):
            system.retriever()
        if part in ("all", "index", "kb.sqlite"):
            system.generation()
        if part in ("all", "generator"):
            system.generator()
    except UserError as error:
        lines = str(error).splitlines()
        stage = "parsed" if "system" in locals() else "refused"
        return f"{stage}: {lines[0]}" if len(lines) == 1 else f"{len(lines)} lines: {lines}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def spoiled(kind: str | None) -> Callable[[Path], None]:
    """The step between the manifest and the parsers, with what has to be seen in it."""
    from rag2.answering import contents

    def wrong(directory: Path) -> None:
        import numpy

        for path in sorted(directory.rglob("evil.*")):
            if path.suffix == ".npy":
                numpy.load(path, allow_pickle=True)
            elif path.suffix == ".py":
                exec(compile(path.read_text(), str(path), "exec"), {})
            else:
                Path("written").write_text("")
        contents_check(directory)

    def reached(directory: Path) -> None:
        raise AssertionError(f"{directory} was looked at, though its bytes are others")

    contents_check = HONEST.setdefault("check", contents.check)
    return {None: contents_check, "wrong": wrong, "reached": reached}[kind]


HONEST: dict[str, Callable[[Path], None]] = {}


def main() -> None:
    global armed
    warnings.simplefilter("ignore")
    logging.disable()
    answers = os.fdopen(os.dup(1), "w")  # what libraries print is not an answer
    os.dup2(2, 1)
    import peft  # noqa: F401 (what an adapter would import once)

    from rag2.answering import contents

    answers.write(json.dumps(load(Path(sys.argv[1]))) + "\n")
    answers.flush()
    sys.addaudithook(hook)
    for line in sys.stdin:
        name, part, kind = json.loads(line)
        contents.check = spoiled(kind)
        seen.clear()
        armed = True
        told = load(Path(name), part)
        armed = False
        answers.write(json.dumps({"told": told, "seen": seen}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
