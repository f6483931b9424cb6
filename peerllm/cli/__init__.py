"""The `peerllm` command: each command a module, imported only when it is asked for."""
