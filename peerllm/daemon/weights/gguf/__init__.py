"""GGUF files as model directories: only their header and metadata are read here, never weights."""
