"""How one training step is spread over processes: a plan is data, and everything that follows from
it is applied by torch.distributed's own parts."""
