"""A trained system over HTTP: OpenAI's endpoints, retrieval, scores, documents, and a page."""
