"""One training run: the trainer and its step, the loop over steps, optimizer, policy, checkpoints,
metrics."""
