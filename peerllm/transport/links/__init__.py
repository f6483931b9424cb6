"""The engine's data plane: frames from device to device over pinned websockets, sent while the next is computed."""
