"""Text -> embeddings: the dual encoder and the embedding of a whole corpus."""
