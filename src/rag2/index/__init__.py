"""Embeddings -> nearest chunks: index backends and immutable generations."""
