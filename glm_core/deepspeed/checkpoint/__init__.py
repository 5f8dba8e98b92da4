"""Reads and writes checkpoints: our layout, DeepSpeed's own, and the universal one."""
