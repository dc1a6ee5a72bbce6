"""The variation points of the recipes as types: unions that are built from the registry."""

from typing import TYPE_CHECKING, Any

from rag2 import config

if TYPE_CHECKING:  # a checker cannot see a union that is built from the registry
    World = Loss = Step = Tuning = RetrieverTuning = Index = Refresh = Objective = Pairs = Any
else:
    World = config.choice("world")
    Loss = config.choice("loss")
    Step = config.choice("step")
    Tuning = config.choice("tuning")
    RetrieverTuning = config.choice("retriever_tuning")
    Index = config.choice("index")
    Refresh = config.choice("refresh")
    Objective = config.choice("objective")
    Pairs = config.choice("pairs")
