"""Holds one catalogue of kernels that differ from a reference, wrong and benign, by op family."""
