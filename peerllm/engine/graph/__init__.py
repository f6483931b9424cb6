"""A shard as onnxruntime graphs: one call a step, without torch (ADR 16)."""
