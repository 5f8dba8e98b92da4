"""The model as one ONNX file with a KV cache, for ONNX Runtime and whatever else reads ONNX.

The model's own forward runs on symbolic values; each op it calls becomes a few ONNX nodes."""
