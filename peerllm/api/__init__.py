"""The HTTP surfaces, over the small face of the daemon in `peerllm.daemon.facade`."""
