"""A knowledge base that is searched while it changes: generation, delta and tombstones."""
