"""prompt -> log-probabilities: the causal LM, its tokenizer, its prompt and its scorer."""
