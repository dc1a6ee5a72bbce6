"""A trained system -> a directory that loads by itself, here and elsewhere."""
