"""peerllm: one language model, run by the devices a household already owns."""

import os

__version__ = "0.1.0"
PROTOCOL_VERSION = 10  # bytes on the wire; devices of another version are seen, named and not used

# What a household computes is its own business: onnxruntime would give the machine an id and report its sessions to
# Microsoft, huggingface_hub tells how it is used. Both read these when they are imported.
os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
