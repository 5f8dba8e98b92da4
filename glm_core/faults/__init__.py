"""The catalogue of kernels that differ from a reference, wrong and benign ones, by op
family."""
