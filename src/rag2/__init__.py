"""rag2: train a dual-encoder retriever and a causal-LM generator as one system."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`rag2.Rag`, found when it is asked for: importing rag2 alone takes no time."""
    if name == "Rag":
        return importlib.import_module("rag2.answering.rag").Rag
    raise AttributeError(f"module 'rag2' has no attribute {name!r}")
