"""Holds the engine and its parts at DeepSpeed's own paths."""
