"""rag2: train a dual-encoder retriever and a causal-LM generator as one system."""

__version__ = "0.1.0"
