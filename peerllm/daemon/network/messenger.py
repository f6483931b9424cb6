"""What this device tells the others of its household, one or all."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from peerllm.daemon.control_messages import Control, DeviceView, HeartbeatKey
from peerllm.daemon.network.control_links import ControlLinks
from peerllm.daemon.network.heartbeats.heartbeat_thread import HeartbeatThread
from peerllm.daemon.network.household_roster import HouseholdRoster
from peerllm.daemon.network.peer_store import whereabouts
from peerllm.errors import LinkError
from peerllm.types import DeviceId

log = logging.getLogger(__name__)


class Messenger:
    """Sends and forgets: a device that is away misses what is told."""

    def __init__(self, links: ControlLinks, roster: HouseholdRoster, heartbeats: HeartbeatThread) -> None:
        self._links, self._roster, self._heartbeats = links, roster, heartbeats
        self._view: DeviceView | None = None  # the last one

    def online(self) -> Iterable[DeviceId]:
        """The devices that are heard now."""
        return [device for device, one in self._links.membership.members.items() if one.state == "online"]

    def tell(self, device: DeviceId, message: Control) -> None:
        """Tell one device."""
        try:
            self._links.channel(device).send(message)
        except LinkError as error:
            log.debug("a %s was not told: %s", type(message).__name__, error)

    def broadcast(self, message: Control) -> None:
        """Tell every device that is here. The last DeviceView is also told to those that come later."""
        if isinstance(message, DeviceView):
            self._view = message
        for device in self.online():
            self.tell(device, message)

    def greet(self, device: DeviceId) -> None:
        """Tell a device that is here all that it may have missed, and the others where it is."""
        self.tell(device, HeartbeatKey(self._heartbeats.half_for(device)))
        self.tell(device, self._roster.gossip())
        if self._view is not None:
            self.tell(device, self._view)
        members = self._links.membership.members
        others = [members[other] for other in self.online() if other != device]
        self.tell(device, whereabouts(others))
        for other in others:
            self.tell(other.device, whereabouts([members[device]]))
