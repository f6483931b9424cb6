"""peerllm: one language model, run by the devices a household already owns."""

__version__ = "0.1.0"
PROTOCOL_VERSION = 7  # bytes on the wire; devices of another version are seen, named and not used
