"""What the stages of an engine keep of each sequence, and who holds which slot."""
