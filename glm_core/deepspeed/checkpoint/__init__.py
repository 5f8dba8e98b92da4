"""Reading and writing checkpoints: our layout, DeepSpeed's, and the universal one."""
