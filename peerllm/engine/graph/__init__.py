"""A shard as a few onnxruntime graphs, without torch (ADR 16)."""
