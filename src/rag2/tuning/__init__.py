"""Model -> model with some of its weights trainable, and back to plain weights."""
