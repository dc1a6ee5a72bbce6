"""What a power loss may leave of a sequence of file operations, by POSIX's promises alone.

Until its fsync, of a file's bytes none, some or all are on disk. Until its folder's, each
entry that was made, renamed or removed there is so on disk or not, in any combination; two changes
of one name keep their order, and a rename happens whole. What was synced is there for good. File
systems promise more (ext4 keeps the order of a folder's changes); no state of theirs is missing.
"""

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

Tree = frozenset[tuple[str, bytes | None]]  # of a state: every path, a file's bytes or None
WATCHED = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync")


@dataclass(frozen=True)
class Entry:
    """A change of names: in `folder`, `name` now names the node, or nothing; `old` does no more."""

    folder: int
    name: str
    node: int | None
    old: tuple[int, str] | None = None

    @property
    def names(self) -> set[tuple[int, str]]:
        """The names it changes."""
        return {(self.folder, self.name)} | ({self.old} if self.old else set())


@dataclass(frozen=True)
class Bytes:
    """All that a file holds from now on."""

    node: int
    data: bytes


@dataclass(frozen=True)
class Sync:
    """The fsync of a file or folder."""

    node: int


@dataclass(frozen=True)
class Told:
    """The program was told that something is done: a power loss may not take it back."""

    what: Any


class Recorder:
    """The operations below `root`, found by looking around every call that orders anything."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trace: list[Entry | Bytes | Sync | Told] = []
        self.nodes: dict[int, int] = {}  # inode -> node; a freed inode comes back as another node
        self.fresh = 1
        self.names: dict[tuple[int, str], int] = {}
        self.data: dict[int, bytes] = {}
        self.nodes[root.stat().st_ino] = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is done inside."""
        with mock.patch.multiple(os, **{name: self._watched(name) for name in WATCHED}):
            yield
        self._look()

    def told(self, what: Any) -> None:
        """Record that `what` was acknowledged here."""
        self._look()
        self.trace.append(Told(what))

    def _watched(self, name: str) -> Any:
        call = getattr(os, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._look()
            inode = os.fstat(args[0]).st_ino if name == "fsync" else None
            result = call(*args, **kwargs)
            self._look()
            if inode in self.nodes:
                self.trace.append(Sync(self.nodes[inode]))
            return result

        return watched

    def _look(self) -> None:
        """Add what has changed since the last look."""
        names: dict[tuple[int, str], int] = {}
        files: dict[int, bytes] = {}
        self._walk(self.root, 0, names, files)
        for node, data in files.items():  # before its name, which may be on disk without it
            if self.data.get(node) != data:
                self.trace.append(Bytes(node, data))
        gone = {node: name for name, node in self.names.items() if names.get(name) != node}
        for name, node in names.items():
            if self.names.get(name) != node:
                self.trace.append(Entry(*name, node, gone.pop(node, None)))
        replaced = set(names)
        for folder, name in gone.values():
            if (folder, name) not in replaced:
                self.trace.append(Entry(folder, name, None))
        self.names, self.data = names, files
        alive = {0, *names.values()}
        self.nodes = {inode: node for inode, node in self.nodes.items() if node in alive}

    def _walk(
        self, path: Path, folder: int, names: dict[tuple[int, str], int], files: dict[int, bytes]
    ) -> None:
        for item in os.scandir(path):
            inode = item.stat(follow_symlinks=False).st_ino
            if inode not in self.nodes:
                self.nodes[inode], self.fresh = self.fresh, self.fresh + 1
            node = names[folder, item.name] = self.nodes[inode]
            if item.is_dir():
                self._walk(Path(item.path), node, names, files)
            else:
                files[node] = Path(item.path).read_bytes()


def states(
    trace: list[Any], limit: int, rng: random.Random
) -> Iterator[tuple[int, list[Any], Tree]]:
    """(crash point, what was acknowledged before it, a tree that may be found after it).

    Of every crash point, all trees if their combinations are no more than `limit`, else that many
    of them at random; the same tree may come up again.
    """
    for point in range(len(trace) + 1):
        past = trace[:point]
        told = [item.what for item in past if isinstance(item, Told)]
        for tree in _trees(past, limit, rng):
            yield point, told, tree


def _trees(past: list[Any], limit: int, rng: random.Random) -> Iterator[Tree]:
    entries = [(i, item) for i, item in enumerate(past) if isinstance(item, Entry)]
    synced = {item.node: i for i, item in enumerate(past) if isinstance(item, Sync)}
    certain = {i for i, e in entries if all(synced.get(f, -1) > i for f, _ in e.names)}
    pending = [(i, e) for i, e in entries if i not in certain]
    needs = {
        i: [j for j, before in pending if j < i and before.names & e.names] for i, e in pending
    }
    contents = _contents(past, synced)
    unsure = [node for node, options in contents.items() if len(options) > 1]
    choices: list[Any] = [(False, True)] * len(pending) + [contents[n] for n in unsure]
    combinations = product(*choices)
    if prod(map(len, choices)) > limit:
        combinations = (tuple(rng.choice(options) for options in choices) for _ in range(limit))
    for chosen in combinations:
        kept = {i for (i, _), yes in zip(pending, chosen, strict=False) if yes}
        if any(j not in kept for i in kept for j in needs[i]):
            continue  # the later change of a name, without the earlier one
        names: dict[tuple[int, str], int] = {}
        for i, entry in entries:
            if i in certain or i in kept:
                for name in entry.names:
                    names.pop(name, None)
                if entry.node is not None:
                    names[entry.folder, entry.name] = entry.node
        picked = dict(zip(unsure, chosen[len(pending) :], strict=True))
        files = {node: picked.get(node, options[-1]) for node, options in contents.items()}
        yield frozenset(_paths(names, files))


def _contents(past: list[Any], synced: Mapping[int, int]) -> dict[int, list[bytes]]:
    """What each file may hold: what was synced; of what was written since none, half, zeros, all.

    What was appended to bytes that are safe leaves them safe.
    """
    contents: dict[int, list[bytes]] = {}
    for i, item in enumerate(past):
        if not isinstance(item, Bytes):
            continue
        if synced.get(item.node, -1) > i:
            contents[item.node] = [item.data]
            continue
        options = contents.get(item.node, [])
        safe = options[0] if options and item.data.startswith(options[0]) else b""
        new = item.data[len(safe) :]
        torn = [safe, safe + new[: len(new) // 2], safe + bytes(len(new)), item.data]
        contents[item.node] = list(dict.fromkeys([*options, *torn]))
    return contents


def _paths(
    names: Mapping[tuple[int, str], int], files: Mapping[int, bytes], folder: int = 0, at: str = ""
) -> Iterator[tuple[str, bytes | None]]:
    """Every path that can be reached from the root."""
    inside: dict[int, list[tuple[str, int]]] = {}
    for (parent, name), node in names.items():
        inside.setdefault(parent, []).append((name, node))
    stack = [(folder, at)]
    while stack:
        parent, path = stack.pop()
        for name, node in inside.get(parent, ()):
            if node in files:
                yield path + name, files[node]
            else:
                yield path + name, None
                stack.append((node, f"{path}{name}/"))


def write(tree: Tree, root: Path) -> None:
    """Make the tree below `root`, an empty folder."""
    for path, data in sorted(tree, key=lambda item: item[0]):
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)
