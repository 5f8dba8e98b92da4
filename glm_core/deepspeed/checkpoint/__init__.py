"""Reads and writes checkpoints: our layout, DeepSpeed's own, and the universal one."""

UNIVERSAL_CHECKPOINT_INFO = "universal_checkpoint_info"
"""a key of the client state in which scripts describe their parameters; it is saved as given"""
