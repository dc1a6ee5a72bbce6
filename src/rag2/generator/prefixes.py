"""contexts -> groups that begin with the same tokens, so that a model reads those tokens once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from rag2.generator.pairs import Ids


@dataclass(frozen=True, slots=True)
class Group:
    """Contexts, by index, whose first `shared` tokens are the same."""

    shared: int
    members: list[int]


@dataclass(slots=True)
class _Node:
    """A node of the trie of all contexts: those below it have `depth` tokens in common."""

    depth: int
    members: list[int] = field(default_factory=list)
    saved: int = 0
    groups: list[Group] = field(default_factory=list)

    def add(self, child: "_Node") -> None:
        self.members += child.members
        self.saved += child.saved
        self.groups += child.groups

    def close(self) -> "_Node":
        """One group for all below if that saves as many tokens as the groups of its children."""
        whole = (len(self.members) - 1) * self.depth
        if whole >= self.saved:
            self.saved, self.groups = whole, [Group(self.depth, self.members)]
        return self


def shared_prefixes(contexts: Sequence[Ids]) -> list[Group]:
    """The groups that save the most tokens when each prefix is read once.

    A group is whole: it has every context that begins with its prefix. A prefix ends before
    a context's last token: there must be something to read after it.
    """
    heads = [list(ids[:-1]) for ids in contexts]
    order = sorted(range(len(heads)), key=heads.__getitem__)
    # Contexts in sorted order are the leaves of the trie; `path` holds the nodes above the current
    # one. A loop, not a recursion: a trie can be as deep as a context is long.
    path = [_Node(0)]
    for i, following in zip_longest(order, order[1:]):
        depth = 0 if following is None else _common(heads[i], heads[following])
        child = _Node(len(heads[i]), [i], groups=[Group(0, [i])])
        while path[-1].depth > depth:
            path[-1].add(child)
            child = path.pop().close()
        if path[-1].depth < depth:
            path.append(_Node(depth))
        path[-1].add(child)
    return path[0].groups


def _common(a: Ids, b: Ids) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
