"""Mistakes that `living.py` plants, and must find."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from rag2.live.live import Live
from rag2.live.part import Part


@contextlib.contextmanager
def _all_alive() -> Iterator[None]:
    """A swap takes the generation as it is."""
    of = Part.of.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def every(cls: Any, index: Any, namespaces: Any) -> Part:
        return of(cls, index, {id: namespaces.get(id, "") for id in index.ids_N.tolist()})

    with mock.patch.object(Part, "of", classmethod(every)):
        yield


@contextlib.contextmanager
def _nothing_newer() -> Iterator[None]:
    """A swap forgets what came after the snapshot."""
    with mock.patch("rag2.live.live.delta_of", lambda *_: None):
        yield


def _trimmed(dead: bool) -> Callable[[], Any]:
    """The top k is taken first, and what may not be found is dropped from it afterwards."""
    search = Part.search

    def careless(self: Part, queries_BD: Any, k: int, namespaces: Any) -> Any:
        if dead and self.alive_N.all() or not dead and namespaces is None:
            return search(self, queries_BD, k, namespaces)
        k = min(k, len(self.index))
        scores_BK, ids_BK = self.index.search(queries_BD, k)
        may = set(search(self, queries_BD[:1], len(self.index), namespaces)[1][0].tolist())
        keep = min(sum(id in may for id in row) for row in ids_BK.tolist())
        order = np.argsort([[id not in may for id in row] for row in ids_BK.tolist()], 1, "stable")
        order = order[:, :keep]
        return np.take_along_axis(scores_BK, order, 1), np.take_along_axis(ids_BK, order, 1)

    return lambda: mock.patch.object(Part, "search", careless)


def _no_namespaces() -> Any:
    """Everybody finds everything."""
    search = Part.search

    def open_to_all(self: Part, queries_BD: Any, k: int, namespaces: Any) -> Any:
        return search(self, queries_BD, k, None)

    return mock.patch.object(Part, "search", open_to_all)


FAULTS: dict[str, Callable[[], Any]] = {
    "tombstones not replayed at swap": _all_alive,
    "news not replayed at swap": _nothing_newer,
    "removed from lists of k": _trimmed(dead=True),
    "namespaces after lists of k": _trimmed(dead=False),
    "namespaces ignored": _no_namespaces,
    "removal not seen": lambda: mock.patch.object(Part, "without", lambda self, ids: self),
    "never caught up": lambda: mock.patch.object(Live, "view", lambda self: self._view),
    "log lost": contextlib.nullcontext,
    "words not forgotten": lambda: mock.patch("rag2.kb.words.Words.forget", lambda *_: None),
}
