"""Files a run writes beside training: CSV and TensorBoard events."""
