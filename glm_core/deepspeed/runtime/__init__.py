"""The engine and what it is built from, at DeepSpeed's own paths."""
