"""The binary frames of the data plane (docs/wire.md §4): what they hold, what a plan allows, bytes both ways."""

from peerllm.transport.frames.decoder import decode, kind_of
from peerllm.transport.frames.encoder import encode, encode_buffers
from peerllm.transport.frames.frame import (
    Frame,
    FrameKind,
    NamedTensor,
)
from peerllm.transport.frames.limits import FrameLimits, FrameRefused, Rule, TensorLimit
from peerllm.transport.frames.token_run import TokenRun

__all__ = [
    "Frame",
    "FrameKind",
    "FrameLimits",
    "FrameRefused",
    "NamedTensor",
    "Rule",
    "TensorLimit",
    "TokenRun",
    "decode",
    "encode",
    "encode_buffers",
    "kind_of",
]
