"""The shape of the repository, enforced: import directions, packaging traps, registry, configs."""

import ast
import importlib
import importlib.machinery
import importlib.metadata
import inspect
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from rag2 import config
from rag2.cli import recipes
from rag2.registry import TABLES, lookup

ROOT = Path(__file__).resolve().parents[1]
# Top to bottom; a module may import only from lines below its own, and from its own folder.
LAYERS = [
    {"train", "eval"},
    {"__main__"},
    {"cli"},
    {"trials"},
    {"sweep"},
    {"lineup"},
    {"pipeline", "systems", "lmeval"},
    {"plan"},
    {"stages"},
    {"serve"},
    {"export"},
    {"answering"},
    {"training", "evaluation"},
    {"rag", "live"},
    {"retrieval", "reindex"},
    {"kb", "retriever", "index", "generator", "losses", "tuning", "worlds"},
    {"config", "artifact", "hub", "modes"},
    {"explain"},
    {"registry", "types", "yaml12"},
    {"__init__"},
    {"rag2_kernels"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
YAMLS = sorted((ROOT / "configs").rglob("*.yaml"))
RECIPES = sorted(p for folder in ("train", "eval") for p in (ROOT / folder).glob("*.py"))


def part_of(path: Path, root: Path) -> str:
    """The layer name of a source file: `kb` for src/rag2/kb/store.py, `train` for train/x.py."""
    parts = path.relative_to(root).with_suffix("").parts
    return {"src": lambda: parts[2], "kernels": lambda: parts[1]}.get(parts[0], lambda: parts[0])()


def sources(root: Path) -> Iterator[Path]:
    """Every source file that the layers speak about."""
    for folder in ("src/rag2", "kernels/rag2_kernels", "train", "eval"):
        yield from sorted((root / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names a file imports anywhere in it, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_arrows(root: Path) -> list[str]:
    """Every import that goes up, sideways to a sibling, or to an unknown part of the package."""
    wrong = []
    for path in sources(root):
        here = part_of(path, root)
        if here not in RANK:
            wrong.append(f"{path.relative_to(root)}: {here!r} has no layer")
            continue
        for name in imported(path):
            top, _, rest = name.partition(".")
            if top not in ("rag2", "rag2_kernels", "train", "eval"):
                continue
            there = rest.split(".")[0] if top == "rag2" else top
            there = "__init__" if there.startswith("__") or not there else there
            if there != here and not RANK.get(there, -1) > RANK[here]:
                wrong.append(f"{path.relative_to(root)}: {here} imports {there} ({name})")
            if there == here and top in ("train", "eval"):
                wrong.append(f"{path.relative_to(root)}: recipes are imported by nobody ({name})")
    return wrong


def test_imports_only_go_down():
    assert not wrong_arrows(ROOT)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("src/rag2/losses/x.py", "from rag2.generator.load import Generator"),  # sideways
        ("src/rag2/kb/x.py", "def f():\n    import rag2.rag"),  # up, deferred
        ("src/rag2/types.py", "from rag2 import registry"),  # sideways, written the other way
        ("src/rag2/registry.py", "from rag2.config import Config"),  # up
        ("kernels/rag2_kernels/x.py", "import rag2.types"),  # the leaf imports nothing of ours
        ("src/rag2/cli.py", "import train.joint"),  # a recipe is a root
        ("train/x.py", "from train.joint import main"),
        ("src/rag2/utils.py", ""),  # a part without a layer
    ],
)
def test_a_planted_wrong_arrow_is_caught(tmp_path: Path, path: str, line: str):
    good = tmp_path / "src/rag2/rag.py"
    good.parent.mkdir(parents=True)
    good.write_text("import torch\nfrom rag2.kb import store\nfrom rag2 import __version__\n")
    assert not wrong_arrows(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(line)
    assert len(wrong_arrows(tmp_path)) == 1


def test_the_kernels_depend_on_torch_triton_and_einops_only():
    allowed = {"torch", "triton", "einops", "rag2_kernels"} | sys.stdlib_module_names
    for path in (ROOT / "kernels/rag2_kernels").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} - allowed, path


def test_every_third_party_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    declared = {re.split(r"[^\w-]", line)[0].lower().replace("_", "-") for line in declared}
    owners = importlib.metadata.packages_distributions()
    missing = {}
    for path in sources(ROOT):
        for top in {name.split(".")[0] for name in imported(path)}:
            names = {name.lower().replace("_", "-") for name in owners.get(top, [top])}
            if top not in sys.stdlib_module_names and top not in ("rag2", "rag2_kernels"):
                if not names & declared:
                    missing[top] = path
    assert not missing


@pytest.mark.parametrize("folder", ["kernels", "train", "eval", "configs", "tests"])
def test_top_folders_are_not_packages(folder: str):
    # kernels/__init__.py would hide the Hugging Face package `kernels` from transformers.
    assert (ROOT / folder).is_dir() and not (ROOT / folder / "__init__.py").exists()


def test_recipe_names_shadow_nothing():
    # `python train/x.py` puts train/ first on sys.path: train/datasets.py would hide `datasets`.
    elsewhere = [p for p in sys.path if Path(p).resolve() not in (ROOT / "train", ROOT / "eval")]
    for stem in {path.stem for path in RECIPES}:
        assert stem not in sys.stdlib_module_names
        assert importlib.machinery.PathFinder.find_spec(stem, elsewhere) is None, stem


@pytest.mark.parametrize(("table", "name"), [(t, n) for t in TABLES for n in TABLES[t]])
def test_every_registered_name_resolves_and_says_what_it_is(table: str, name: str):
    thing = lookup(table, name)
    assert inspect.getdoc(thing) and thing.__doc__
    if isinstance(thing, type):
        assert issubclass(thing, config.Config)
        assert get_args(thing.model_fields["name"].annotation) == (name,)
        assert thing.model_fields["name"].default == name


def config_class(recipe: Path) -> type[config.Config]:
    """The class in a recipe's `run(main, X)`, without running the recipe."""
    calls = [
        node
        for node in ast.walk(ast.parse(recipe.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "run"
    ]
    names = [ast.unparse(c.args[1]) for c in calls if c.args and ast.unparse(c.args[0]) == "main"]
    assert len(names) == 1, f"{recipe} does not call run(main, X) once"
    return runpy.run_path(str(recipe), run_name="recipe")[names[0]]


def test_the_command_line_offers_exactly_the_recipes_there_are():
    commands = recipes.RECIPES
    offered = {f"{group}/{name}.py" for group in commands for name in commands[group]}
    assert offered == {path.relative_to(ROOT).as_posix() for path in RECIPES}
    for path in RECIPES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        assert config_class(path)


def test_the_demo_has_its_configs():
    names = {"pretrain", "retriever", "finetune", "joint", "compare"}
    assert names <= {path.stem for path in (ROOT / "configs/demo").glob("*.yaml")}


@pytest.mark.parametrize("path", YAMLS, ids=[path.relative_to(ROOT).as_posix() for path in YAMLS])
def test_every_shipped_config_is_short_and_loads_by_the_command_in_its_first_line(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 25
    words = shlex.split(lines[0].removeprefix("#"), comments=True)
    assert lines[0].startswith("# ") and words[0] == "rag2", lines[0]
    _, group, name, flag, file, *overrides = words
    assert (flag, file) == ("-c", path.relative_to(ROOT).as_posix())
    cls = config_class(ROOT / group / f"{name}.py")
    loaded = config.load(cls, str(path), overrides)
    assert cls.model_validate(loaded.model_dump(mode="json")) == loaded


def python(code: str) -> str:
    """Standard output of code in a fresh interpreter, which must write nothing to stderr."""
    paths = f"import sys; sys.path[:0] = [{str(ROOT / 'src')!r}, {str(ROOT / 'kernels')!r}]\n"
    done = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_the_command_line_imports_nothing_heavy():
    heavy = {"torch", "numpy", "transformers", "pydantic", "yaml", "rich", "faiss"}
    code = f"import rag2.cli\nprint(sorted({heavy} & set(sys.modules)))"
    assert python(code) == "[]\n"


def test_importing_the_library_changes_nothing_and_needs_no_gpu():
    modules = [
        ".".join(p.relative_to(ROOT / "src").with_suffix("").parts)
        for p in sources(ROOT)
        # lmeval is a plugin: importing it registers a model with lm-eval, an optional dependency.
        if p.is_relative_to(ROOT / "src") and p.stem not in ("__init__", "__main__", "lmeval")
    ]
    code = f"""
import os, importlib, logging, warnings
warnings.simplefilter("ignore")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it where it is installed
import rag2_kernels, torch, transformers, peft  # what these do at import is their own affair
before, seed, level = dict(os.environ), torch.initial_seed(), logging.getLogger().level
threads = torch.get_num_threads()
for name in {modules}:
    importlib.import_module(name)
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert torch.initial_seed() == seed and torch.get_num_threads() == threads
assert logging.getLogger().level == level and not torch.cuda.is_initialized()
"""
    assert python(code) == ""
