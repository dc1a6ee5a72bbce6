"""What surrounds a training loop and is not its algorithm: batches, optimizer, log, checkpoints."""
