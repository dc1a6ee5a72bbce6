"""Questions -> answers that cite: a trained system over a knowledge base that lives."""
