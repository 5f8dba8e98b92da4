"""The one GLM: its modules, published sizes, adapters, quantization, and text generation."""
