"""Generated worlds: corpora with questions whose truth is known by construction."""
