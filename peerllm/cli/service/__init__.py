"""peerllm as a service of systemd."""
