"""Text <-> plain data as YAML 1.2: `no`, 2021-01-01 and 1:30 are strings, 1e-5 is a number."""

import re
from typing import Any

import yaml


def parse(text: str, place: str) -> Any:
    """The data in a YAML text; raises ValueError `place, line 3: what is wrong`, one line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{place}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{place}: {' '.join(str(error).split())}") from None


def render(data: Any, flow: bool = False) -> str:
    """Plain data as YAML text, on one line if `flow`; `parse` gives equal data back."""
    text = yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=flow,
        width=10_000 if flow else 100,
    )
    return text.removesuffix("...\n").rstrip("\n") if flow else text


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, and keys that are no scalars."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node; raises MarkedYAMLError for a repeated or a compound key."""
        seen: set[Any] = set()
        for key, _ in node.value:
            problem = ""
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be a plain word, not a list or a mapping"
            elif key.value in seen:
                problem = f"key {key.value!r} is given twice"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the strings that `_Loader` would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """A default shared by two keys is written twice, not as an anchor."""
        return True


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """YAML 1.2 integers are decimal; 1.1 reads 010 as eight."""
    return int(loader.construct_scalar(node))


def _exact(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Line breaks and control characters escaped: PyYAML's other styles do not give them back."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_SCALARS = {  # tag -> pattern, possible first characters ("" for the empty scalar)
    "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": ("[-+]?[0-9]+", list("-+0123456789")),
    "float": (rf"{_NUMBER}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
}
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _name, (_pattern, _first) in _SCALARS.items():
        _tag, _whole = f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z")
        _class.add_implicit_resolver(_tag, _whole, _first)
_Dumper.add_representer(str, _exact)
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
