"""Something that the engine is to do, and whom it tells."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rag2.answering.ask import Ask

Tell = Callable[[Any], None]


@dataclass(slots=True, eq=False)
class Work:
    """Something to do, and whom to tell: an Ask to answer, or a call to make.

    An answer is told as an `Answer`, before it in pieces of text where it is `streamed`; a call by
    its result. Either ends with an exception instead if it fails.
    """

    what: Ask | Callable[[], Any]
    tell: Tell
    until: float
    """time.monotonic() of the deadline"""
    streamed: bool = True
    """whether pieces are told: each of them wakes the event loop, which takes the core"""
    cancelled: bool = False
    """set by whoever does not want it any more"""
    began: float = field(default_factory=time.monotonic)
    searched: float = 0.0
    """seconds that the search took"""
    first: float | None = None
    """seconds until the first token"""
