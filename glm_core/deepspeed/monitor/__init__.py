"""Reports a run's progress as printed lines, CSV files and TensorBoard events."""
