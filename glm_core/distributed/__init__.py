"""Spreads one training step over processes: a plan is data, and torch.distributed's own parts apply
it."""
