"""`peerllm demo`: several devices on this machine."""
