"""YAML file + key=value overrides -> frozen pydantic models, and back to YAML.

The config is the object: `tuning: {name: lora, rank: 8}` is validated into `LoRA(rank=8)`, whose
methods do the work. A block states differences only: the keys it leaves out keep the defaults of
the field it stands in, and a new `name` replaces the block instead of merging into it.
"""

import errno
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rag2 import yaml12
from rag2.explain import default, defaults, mistake
from rag2.registry import TABLES, UserError, lookup, nearest

PACKAGE = Path(__file__).resolve().parent
# A checkout holds configs/ and train/ beside src/; a wheel carries them as rag2/recipes/.
SHIPPED = (PACKAGE.parents[1], PACKAGE / "recipes")


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, partial blocks completed."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        """Lay the given keys over the defaults, so that `optim.lr=1` leaves `optim.steps` alone."""
        if not isinstance(data, dict):
            return data
        return {key: _over(default(cls, key), value) for key, value in data.items()}


ConfigT = TypeVar("ConfigT", bound=Config)


def choice(table: str) -> Any:
    """The discriminated union, on `name`, of every config class in a registry table.

    Pyright cannot see a union built at run time: name a Protocol (or Any) for it under
    `if TYPE_CHECKING`. Raises UserError for an unknown table.
    """
    if table not in TABLES:
        raise UserError(f"unknown registry table {table!r}.{nearest(table, TABLES)}")
    models = tuple(lookup(table, name) for name in TABLES[table])
    if len(models) == 1:  # pydantic has no discriminated union of one
        return Annotated[models[0], BeforeValidator(_named)]
    union = Annotated[Union[models], Field(discriminator="name")]  # noqa: UP007 (built at run time)
    return Annotated[union, BeforeValidator(_named)]


def load(
    cls: type[ConfigT],
    path: str | None = None,
    overrides: list[str] | None = None,
    without: Iterable[str] = (),
) -> ConfigT:
    """The configuration in YAML file `path` (None: the defaults) with `key=value` overrides.

    `without`: dotted keys that the file is read without. Raises UserError, one line, for a missing
    or malformed file, a malformed override, an unknown key or name and a value of the wrong type.
    """
    given = read(find(path)) if path else {}
    for key in without:
        _drop(given, key)
    changes: dict[str, Any] = {}
    for override in overrides or []:
        _assign(changes, override)
    data = dict(given)
    for key, value in changes.items():
        data[key] = _merge(given[key], value, default(cls, key)) if key in given else value
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise UserError(mistake(cls, error)) from None


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises UserError with the line of a syntax error."""
    try:
        data = yaml12.parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"{path} does not hold `key: value` lines at its top level")
    return data


def overrides(given: dict[str, Any], changes: dict[str, Any]) -> list[str]:
    """The `key=value` words that lay a tree of changes over a file's settings.

    A block that the file holds as it is needs none. Any other goes whole: what it says of a `name`
    decides what the keys beside it mean.
    """
    return [
        f"{path}={yaml12.render(value, flow=True)}"
        for key, block in sorted(changes.items())
        if not (key in given and _says(given[key], block))
        for path, value in leaves(key, block)
    ]


def leaves(path: str, block: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value below a block of settings."""
    if isinstance(block, dict) and block:
        for key, value in block.items():
            yield from leaves(f"{path}.{key}", value)
    else:
        yield path, block


def dump(cfg: Config) -> str:
    """The configuration as YAML; `load` of it gives an equal object."""
    return yaml12.render(cfg.model_dump(mode="json"))


def find(path: str) -> Path:
    """A config file: as given, else in the checkout, else in the installed wheel.

    Raises UserError that names the nearest file there is.
    """
    roots = (Path(), *SHIPPED)
    for root in roots:
        if (root / path).is_file():
            return root / path
    folder = Path(path).parent
    near = {str(folder / p.name) for root in roots for p in (root / folder).glob("*.yaml")}
    shipped = {str(p.relative_to(r)) for r in SHIPPED for p in (r / "configs").rglob("*.yaml")}
    names = sorted(near | shipped)
    kind = "is a directory, not a config file" if Path(path).is_dir() else "not found"
    raise UserError(f"config file {path!r} {kind}.{nearest(path, names)}")


def recipe(path: str) -> Path:
    """The file of a shipped recipe such as `train/joint.py`; raises UserError if there is none."""
    for root in SHIPPED:
        if (root / path).is_file():
            return root / path
    names = [
        str(p.relative_to(r))
        for r in SHIPPED
        for d in ("train", "eval")
        for p in r.glob(f"{d}/*.py")
    ]
    raise UserError(f"recipe {path!r} not found.{nearest(path, names)}")


def run(main: Callable[[ConfigT], Any], cls: type[ConfigT]) -> Any:
    """Run a recipe: `main(cfg)` with cfg from `sys.argv` (`-c FILE key=value ...`, `--help`).

    A user's mistake ends the process with one `error: ...` line on stderr and exit status 2.
    """
    try:
        path, overrides, wants_help = _arguments(sys.argv[1:])
        if wants_help:
            sys.stdout.write(_usage(main, cls))
            raise SystemExit(0)
        cfg = load(cls, path, overrides)
        _refuse_file(getattr(cfg, "out", None))
        _refuse_kernels()
        hf_logging = sys.modules.get("transformers.utils.logging")
        if hf_logging:  # its bars for loading and saving weights would break up ours
            hf_logging.disable_progress_bar()
        return main(cfg)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {blame(error)}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        raise SystemExit(130) from None


def _refuse_file(out: str | None) -> None:
    """UserError now for an `out` that no folder can be made of, not after minutes of work."""
    for path in (Path(out), *Path(out).parents) if out else ():
        if path.exists():
            if not (path.is_dir() and os.access(path, os.W_OK)):
                what = "cannot be written" if path.is_dir() else "is a file"
                raise UserError(f"out={out!r}: {path} {what}; choose another out=")
            return


def _refuse_kernels() -> None:
    """UserError for a RAG2_KERNELS that names nothing, or something that is not installed."""
    from rag2_kernels import switch  # here: it imports torch, which reading a file does not need

    try:
        switch.check()
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None


def blame(error: UserError | OSError) -> str:
    """The one line to show for a user's mistake; raises `error` again if it is not one."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and not error.filename and error.errno not in full:
        raise error  # no file to point at: a fault of ours or of the machine, keep the traceback
    return " ".join(str(error).splitlines())


def _arguments(argv: list[str]) -> tuple[str | None, list[str], bool]:
    """(config file, overrides, help wanted) of a recipe's command line."""
    path, overrides, words = None, [], iter(argv)
    for word in words:
        if word in ("-h", "--help"):
            return None, [], True
        if word in ("-c", "--config"):
            path = next(words, None)
            if path is None:
                raise UserError(f"{word} needs a YAML file; see --help")
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
        elif word.startswith("-"):
            raise UserError(
                f"unknown option {word!r}; settings are written key=value, files -c FILE."
                f"{nearest(word, ['--help', '--config'])}"
            )
        else:
            overrides.append(word)
    return path, overrides, False


def _usage(main: Callable[..., Any], cls: type[Config]) -> str:
    """The text of `--help`: what the recipe does and its defaults as YAML."""
    story = inspect.cleandoc(main.__globals__.get("__doc__") or main.__doc__ or cls.__doc__ or "")
    file = Path(sys.argv[0]).absolute()
    usage = f"usage: rag2 {file.parent.name} {file.stem} [-c FILE.yaml] [key=value ...]"
    return f"{usage}\n\n{story}\n\nkeys and their defaults:\n\n{defaults(cls)}"


def _assign(tree: dict[str, Any], override: str) -> None:
    """Put one `a.b=value` into the tree of changes."""
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
        raise UserError(
            f"malformed override {override!r}: write key=value, as in seed=3 or optim.lr=1e-4"
        )
    try:
        value = yaml12.parse(text, f"malformed value in override {override!r}")
    except ValueError as error:
        raise UserError(str(error)) from None
    *blocks, leaf = key.split(".")
    for depth, block in enumerate(blocks):
        inner = tree.setdefault(block, {})
        if isinstance(inner, str):  # tuning=lora tuning.rank=8
            inner = tree[block] = {"name": inner}
        if not isinstance(inner, dict):
            outer = ".".join(blocks[: depth + 1])
            raise UserError(f"override {override!r} goes into {outer!r}, set to {inner!r} before")
        tree = inner
    if isinstance(value, str) and isinstance(tree.get(leaf), dict):  # tuning.rank=8 tuning=lora
        tree[leaf]["name"] = value
    else:
        tree[leaf] = value


def _drop(tree: dict[str, Any], key: str) -> None:
    """Take a dotted key out of nested settings, if it is there."""
    *blocks, last = key.split(".")
    for block in blocks:
        tree = tree.get(block) or {}
        if not isinstance(tree, dict):
            return
    tree.pop(last, None)


def _merge(old: Any, new: Any, standard: Any) -> Any:
    """File value and override of one key, `standard` its default; a new `name` replaces a block."""
    if isinstance(old, str) and isinstance(new, dict):
        old = {"name": old}
    if isinstance(old, dict) and isinstance(new, str) and hasattr(standard, "name"):
        new = {"name": new}
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    name = old.get("name", getattr(standard, "name", None))
    if new.get("name", name) != name:
        return new
    if name != getattr(standard, "name", None):
        standard = None  # the file left the class of the default
    merged = {
        key: _merge(old[key], value, getattr(standard, key, None)) if key in old else value
        for key, value in new.items()
    }
    return old | merged


def _says(given: Any, block: Any) -> bool:
    """Whether settings hold everything that a block of them says."""
    if isinstance(given, dict) and isinstance(block, dict):
        return all(key in given and _says(given[key], value) for key, value in block.items())
    return json.dumps(given, sort_keys=True) == json.dumps(block, sort_keys=True)


def _over(standard: Any, given: Any) -> Any:
    """`given` completed by what the default `standard` says for the keys it leaves out."""
    if not isinstance(standard, Config):
        return given
    name = getattr(standard, "name", None)
    given = _named(given) if name is not None else given
    if not isinstance(given, dict) or given.get("name", name) != name:
        return given
    below = {key: _over(getattr(standard, key, None), value) for key, value in given.items()}
    return dict(standard) | below


def _named(given: Any) -> Any:
    """The short form `tuning: lora` stands for `tuning: {name: lora}`."""
    return {"name": given} if isinstance(given, str) else given
