"""Parts of the interface that scripts import by DeepSpeed's longer paths."""
