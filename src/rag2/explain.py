"""pydantic's view of a model -> sentences for users: one-line errors and the text of --help."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from rag2 import yaml12
from rag2.registry import nearest

Model = type[BaseModel]


def mistake(cls: Model, error: ValidationError) -> str:
    """The first mistake pydantic found, as one line with key, value, allowed and nearest."""
    first, *rest = error.errors(include_url=False)
    path, owners, family = _locate(cls, first["loc"])
    same = [e for e in rest if _locate(cls, e["loc"])[0] == path]  # members of one plain union
    expected = " or ".join(re.sub(r"^Input (should be )?", "", e["msg"]) for e in (first, *same))
    line = _reason(path, owners, first, expected)
    if first["type"] == "extra_forbidden":
        line += _elsewhere(path, owners[0], family) or _suggest(path, owners[0])
    others = len(rest) - len(same)
    return f"{line} (and {others} more)" if others else line


def defaults(cls: Model) -> str:
    """The keys of a configuration with their defaults and meaning, as YAML with comments."""
    return "".join(_lines(cls, {}, ""))


def default(cls: Model, key: str) -> Any:
    """The default of a field, or None where there is no such field or default."""
    field = cls.model_fields.get(key)
    if field is None or field.is_required():
        return None
    return field.get_default(call_default_factory=True)


def _locate(cls: Model, loc: tuple[int | str, ...]) -> tuple[str, list[Model], list[Model]]:
    """The dotted key of a pydantic location, and the classes its last key may belong to.

    The third are those it might belong to if the `name` of its block were another.
    """
    path, owners, inside = "", [cls], [cls]
    family: list[Model] = []
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif tagged := [model for model in inside if _tag(model) == part and len(inside) > 1]:
            family, inside = (
                inside,
                tagged,
            )  # pydantic puts the tag of a union into the location; it is no key
        elif inside:
            field = next((m.model_fields[part] for m in inside if part in m.model_fields), None)
            path += f".{part}" if path else part
            owners, inside = inside, _models(field.annotation) if field else []
    return path, owners, family if owners[0] in family else []


def _reason(path: str, owners: list[Model], error: Any, expected: str) -> str:
    """The sentence for one pydantic error type."""
    owner = owners[0].__name__
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {path!r} for {owner}."
        case "missing":
            return f"missing key {path!r} for {owner}; give {path}=VALUE"
        case "union_tag_invalid":
            allowed = re.findall(r"'([^']*)'", context["expected_tags"])
            return _unknown(f"{path}.name", context["tag"], allowed)
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"]) or [context["expected"]]
            return _unknown(path, error["input"], allowed)
        case "union_tag_not_found":
            return f"missing key '{path}.name'"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{path!r} is a block of keys, not {_short(error['input'])}"
        case "value_error" | "assertion_error":
            reason = re.sub(r"^(Value error|Assertion failed), ", "", error["msg"])
            return f"{path}: {reason}" if path else reason
        case kind:
            hint = "; put it in quotes" if kind == "string_type" else ""
            expected = re.sub(r", unable to parse.*", "", expected)
            return f"wrong value for {path!r}: {_short(error['input'])}; expected {expected}{hint}"


def _unknown(key: str, value: Any, allowed: list[str]) -> str:
    """The sentence for a value outside a closed set."""
    names = ", ".join(allowed)
    close = nearest(str(value), allowed)
    return f"unknown value {_short(value)} for {key!r}; allowed: {names}.{close}"


def _elsewhere(path: str, owner: Model, family: list[Model]) -> str:
    """The key of another kind of block that an unknown one is nearer to than to any of its own."""
    parent, _, leaf = path.rpartition(".")
    others = {key: model for model in reversed(family) for key in model.model_fields}
    close = get_close_matches(leaf, [*others, *owner.model_fields], n=1, cutoff=0.5)
    if not close or close[0] in owner.model_fields:
        return ""
    tag = _tag(others[close[0]])
    return f" Did you mean '{parent}.{close[0]}', a key of {parent}.name={tag}?"


def _suggest(path: str, owner: Model) -> str:
    """The key that an unknown one may stand for: of the same name deeper down, or a near one."""
    parent, dot, leaf = path.rpartition(".")
    keys = list(_keys(owner))
    deeper = [key for key in keys if key.rpartition(".")[2] == leaf]
    if deeper:
        return f" Did you mean {parent + dot + deeper[0]!r}?"
    beside = [key for key in keys if "." not in key]
    return nearest(leaf, beside).replace("'", f"'{parent}{dot}", 1) or nearest(
        path, [f"{parent}{dot}{key}" for key in keys]
    )


def _keys(cls: Model, prefix: str = "") -> Iterator[str]:
    """Every dotted key below a class, those of all classes of a union included."""
    for key, field in cls.model_fields.items():
        yield prefix + key
        for model in _models(field.annotation):
            yield from _keys(model, f"{prefix}{key}.")


def _models(annotation: Any) -> list[Model]:
    """The model classes named in a type annotation."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    if get_origin(annotation) is Literal:
        return []
    return [model for part in get_args(annotation) for model in _models(part)]


def _tag(model: Model) -> str | None:
    """The value of `name` that selects this class in a union."""
    field = model.model_fields.get("name")
    if field is None or get_origin(field.annotation) is not Literal:
        return None
    return get_args(field.annotation)[0]


def _short(value: Any) -> str:
    """A value, cut to fit a line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lines(cls: Model, values: dict[str, Any], indent: str) -> Iterator[str]:
    """One line per key; `values` are what an enclosing default says for this class."""
    for key, field in cls.model_fields.items():
        value = values.get(key, default(cls, key))
        tags = [tag for model in _models(field.annotation) if (tag := _tag(model))]
        notes = [" ".join((field.description or "").split())]
        notes += [f"(name: {' | '.join(tags)})"] if len(tags) > 1 else []
        comment = "".join(f"  # {text}" for text in [" ".join(notes).strip()] if text)
        if isinstance(value, BaseModel):
            yield f"{indent}{key}:{comment}\n"
            yield from _lines(type(value), dict(value), indent + "  ")
        elif key not in values and field.is_required():
            yield f"{indent}{key}: REQUIRED{comment}\n"
        else:
            yield f"{indent}{key}: {yaml12.render(_plain(value), flow=True)}{comment}\n"


def _plain(value: Any) -> Any:
    """A default in the types YAML has."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
