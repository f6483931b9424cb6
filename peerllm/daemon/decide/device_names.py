"""Which device of the household a person means. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from peerllm.errors import BadInputError, NotFoundError
from peerllm.types import DeviceId

LEAST_ID_DIGITS = 8  # of the start of an id


def device_called(text: str, names: Mapping[DeviceId, Collection[str]], me: DeviceId, my_name: str) -> DeviceId:
    """Of the other devices (`names`) the one with this name, id or start of an id.

    BadInputError for this device itself and for a name of several, NotFoundError for nobody's.
    """
    prefix = text if len(text) >= LEAST_ID_DIGITS else None
    found = [device for device, called in names.items() if text == device or text in called]
    found = found or [device for device in names if prefix and device.startswith(prefix)]
    if not found and (text == my_name or (prefix and me.startswith(prefix))):
        raise BadInputError(f"{text} is this device; to take it out of its household type: peerllm leave")
    if not found:
        raise NotFoundError(f"no device {text!r} belongs to this household; `peerllm devices` lists them")
    if len(found) > 1:
        raise BadInputError(f"{len(found)} devices are called {text!r}; give the id instead")
    return found[0]
