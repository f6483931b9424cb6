"""GGUF files as model directories: header, split files, configuration, vocabulary. No weights are read."""
