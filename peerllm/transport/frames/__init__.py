"""The binary frames of the data plane (docs/wire.md §4): what they hold, what a plan allows, bytes both ways."""

from peerllm.transport.frames.decoder import decode
from peerllm.transport.frames.encoder import encode, encode_buffers
from peerllm.transport.frames.limits import FrameLimits, FrameRefused, Rule, TensorLimit
from peerllm.transport.frames.model import (
    DType,
    Frame,
    FrameKind,
    FrameSegment,
    NamedTensor,
    SegmentFlag,
)
from peerllm.transport.frames.repeated import Decoder, Template, template_of

__all__ = [
    "DType",
    "Decoder",
    "Frame",
    "FrameKind",
    "FrameLimits",
    "FrameRefused",
    "FrameSegment",
    "NamedTensor",
    "Rule",
    "SegmentFlag",
    "Template",
    "TensorLimit",
    "decode",
    "encode",
    "encode_buffers",
    "template_of",
]
