"""Who belongs to this device's household: what others tell is merged, what people change here is signed."""

from __future__ import annotations

import logging
from typing import Literal

from peerllm.daemon.control_messages import Gossip
from peerllm.errors import BadInputError
from peerllm.transport.identity import Identity
from peerllm.transport.roster.entry import RosterEntry
from peerllm.transport.roster.roster import Roster
from peerllm.types import DeviceId

log = logging.getLogger(__name__)


class HouseholdRoster:
    """The roster that stands now; a device that leaves its household begins another one."""

    def __init__(self, identity: Identity, name: str, roster: Roster) -> None:
        self._identity, self._name = identity, name
        self.roster = roster

    def members(self) -> dict[DeviceId, RosterEntry]:
        """The live members, this device among them."""
        return self.roster.members()

    def others(self) -> dict[DeviceId, RosterEntry]:
        """The live members but this device."""
        return {device: e for device, e in self.members().items() if device != self._identity.device}

    def gossip(self) -> Gossip:
        """All of it, as other devices are told."""
        return Gossip(self.roster.export())

    def hear(self, device: DeviceId, gossip: Gossip) -> Literal["removed", "changed", "same"]:
        """Another device tells its roster. "removed": this device is no longer of the household."""
        before = self.roster.export()
        try:
            change = self.roster.merge(gossip.entries)
        except BadInputError as error:
            log.warning("the roster of %s is not taken: %s", device[:8], error)
            return "same"
        for reason in change.refused:
            log.info("of the roster of %s: %s", device[:8], reason)
        if not self.roster.is_member(self._identity.device):
            log.warning("this device was removed from the household")
            return "removed"
        return "changed" if self.roster.export() != before else "same"

    def remove(self, device: DeviceId) -> None:
        """Put a device out of the household, this one too."""
        self.roster.remove(self._identity, device)

    def start_anew(self) -> None:
        """This device is in a household of its own."""
        self.roster = Roster.create(self._identity, self._name)
