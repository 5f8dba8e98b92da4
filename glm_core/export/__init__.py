"""Exports the model as one ONNX file with a KV cache, for ONNX Runtime and everything else that
reads ONNX.

The model's own forward runs on symbolic values; each op that it calls becomes a few ONNX nodes."""
