"""No source file reads or writes pickle, runs text as code or lets a library fetch code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src/rag2", "kernels/rag2_kernels", "train", "eval")
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Calls by their full name, whatever the module was imported as.
CALLS = {
    *("torch.load", "torch.save", "torch.hub.load", "torch.package.PackageImporter"),
    *("torch.jit.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "os.system"),
    *("code.interact", "importlib.util.spec_from_file_location"),
}
# yaml.load with a loader of ours that knows no tags but those of YAML 1.2.
ALLOWED = {("src/rag2/yaml12.py", "yaml.load")}
ARGUMENTS = {"trust_remote_code", "allow_pickle", "allow_dangerous_deserialization", "shell"}


def forbidden(source: str, name: str = "") -> Iterator[str]:
    """`line: what` of every forbidden import, call and argument in a source text."""
    tree = ast.parse(source)
    names = imports(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            whole = [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom):
                whole = [f"{node.module}.{n}" for n in whole]
            for each in whole:
                if each.split(".")[0] in MODULES or "pickle" in each:
                    yield f"{line}: import {each}"
        elif isinstance(node, (ast.Name, ast.Attribute)):
            # Also a mere mention, as in `load = torch.load`.
            called = dotted(node, names)
            if called in CALLS and (name, called) not in ALLOWED:
                yield f"{line}: {called}"
        elif isinstance(node, ast.keyword):
            off = isinstance(node.value, ast.Constant) and not node.value.value
            if node.arg in ARGUMENTS and not off:
                yield f"{line}: {node.arg} is not False"
            if node.arg == "weights_only" and off:
                yield f"{line}: weights_only=False"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                on = not (isinstance(value, ast.Constant) and not value.value)
                if isinstance(key, ast.Constant) and key.value in ARGUMENTS and on:
                    yield f"{line}: {key.value} is not False"


def imports(tree: ast.AST) -> dict[str, str]:
    """Local name -> full name of all that a file imports, or gives a second name to."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                found[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """`torch.load` of `torch.load`, and of `t.load` after `import torch as t`."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, names)
        return f"{before}.{node.attr}" if before else None
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else None


def test_no_source_file_runs_what_it_reads():
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            found += [f"{name}:{what}" for what in forbidden(path.read_text("utf-8"), name)]
    assert not found


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch.utils.pickle_stuff",
        "import torch\ntorch.load(p)",
        "import torch as t\nt.load(p, weights_only=True)",
        "from torch import load as read\nread(p)",
        "import torch\nread = torch.load",
        "from numpy import load\nload(p, allow_pickle=True)",
        "import numpy as np\nnp.load(p, allow_pickle=flag)",
        "import yaml\nyaml.load(f, Loader=yaml.Loader)",
        "from yaml import unsafe_load\nunsafe_load(f)",
        "eval(text)",
        "exec(text)",
        "code = compile(text, 'x', 'exec')",
        "__import__(name)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=trusted)",
        "AutoModel.from_pretrained(p, **{'trust_remote_code': True})",
        "load(p, weights_only=False)",
        "subprocess.run(text, shell=True)",
        "import joblib",
        "import os\nos.system(text)",
    ],
)
def test_a_planted_violation_is_seen(planted: str):
    assert list(forbidden(planted)), planted


@pytest.mark.parametrize(
    "harmless",
    [
        "# torch.load(p), trust_remote_code=True",
        "'''pickle.loads'''\nimport re\nre.compile('eval')",
        "AutoModel.from_pretrained(p, trust_remote_code=False)",
        "model.eval()\nself.load(p)\nencoder.compile()",
        "import yaml\nyaml.safe_load(f)",
        "numpy.load(p, allow_pickle=False)",
        "{'trust_remote_code': False}",
    ],
)
def test_what_is_harmless_is_not_taken_for_a_violation(harmless: str):
    assert not list(forbidden(harmless)), harmless
