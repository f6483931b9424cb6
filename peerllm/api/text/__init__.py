"""Text to token ids and back, on the source only: chat template, tokenizer, detokeniser, stop strings."""
