"""The household as one device sees it: what was said of each device, and who therefore belongs. Sans-I/O.

Of each device stand: one introduction per introducer ("one of us"), one departure ("left", by itself), one removal (by
another), each the highest of its kind. A device is a member while an introduction is higher than departure and removal.
Statements count only from members, refined so that every order of gossip ends alike and no removed device
comes back:

- A removal voids all introductions by the removed device, whenever they were signed (it could have backdated them),
  unless the remover, or a member it vouches for, introduces the same device too: `remove` re-signs all it knows.
- A removal by a device that was itself removed counts if it was signed first.
- What a device said before it left of its own will still counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from peerllm import codec
from peerllm.errors import AuthenticationError, BadInputError, LinkError, NotFoundError, OverloadedError
from peerllm.transport.identity import Identity, certificate_device
from peerllm.transport.roster.entry import ForgedError, RosterEntry, check_entry, check_signature, sign_entry
from peerllm.types import DeviceId

MAX_MEMBERS = 64
MAX_TOMBSTONES = 256  # devices that are gone; the longest gone are forgotten first
MAX_INTRODUCERS = 16  # of one device; more than a household's inviting devices
MAX_ENTRIES = MAX_MEMBERS * MAX_INTRODUCERS + 3 * MAX_TOMBSTONES
MAX_REFUSALS = 16  # lines kept of why entries were not taken
FILE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Change:
    """What a merge did to the members, and why it left entries out (if it did)."""

    added: tuple[DeviceId, ...] = ()
    removed: tuple[DeviceId, ...] = ()
    refused: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)


@dataclass(frozen=True, slots=True)
class RosterFile:
    version: int
    device: DeviceId
    entries: tuple[RosterEntry, ...]


class Roster:
    """The household seen from `device`. All methods are quick enough for the loop; none does I/O."""

    def __init__(self, device: DeviceId) -> None:
        self.device = device
        self._added: dict[DeviceId, dict[DeviceId, RosterEntry]] = {}  # device: introducer: introduction
        self._left: dict[DeviceId, RosterEntry] = {}
        self._removed: dict[DeviceId, RosterEntry] = {}

    @classmethod
    def create(cls, identity: Identity, name: str) -> Roster:
        """A household of one."""
        roster = cls(identity.device)
        roster._put(sign_entry(identity, identity.certificate_pem, name, 1))
        return roster

    @classmethod
    def load(cls, data: bytes) -> Roster:
        """What `save` wrote; BadInputError if it is damaged."""
        try:
            file: RosterFile = codec.decode(data, RosterFile)
            for entry in file.entries:
                check_entry(entry)
        except (LinkError, AuthenticationError) as error:
            raise BadInputError(f"the household's list is damaged ({error}); restore it, or pair anew") from error
        if file.version != FILE_VERSION:
            raise BadInputError(f"the household's list is of version {file.version}; this peerllm reads {FILE_VERSION}")
        roster = cls(file.device)
        for entry in file.entries:
            roster._put(entry)
        return roster

    def save(self) -> bytes:
        """All of it, as JSON."""
        return codec.encode(RosterFile(FILE_VERSION, self.device, _sorted(self._entries())), RosterFile)

    def export(self) -> tuple[RosterEntry, ...]:
        """Every statement that stands and means something to others, for gossip; the same set gives the same tuple."""
        return _sorted(entry for entry in self._entries() if entry.removed or entry.introducer != entry.device)

    def members(self) -> dict[DeviceId, RosterEntry]:
        """The devices that belong now, this one included; none once this one has left or was removed."""
        if not self._alive(self.device):
            return {}
        return {device: self._top(device) for device in self._added if self._alive(device)}

    def is_member(self, device: DeviceId) -> bool:
        return self._alive(self.device) and self._alive(device)

    @property
    def counter(self) -> int:
        """The highest counter seen."""
        return max((entry.counter for entry in self._entries()), default=0)

    def introduce(self, identity: Identity, certificate_pem: str, name: str, above: int = 0) -> RosterEntry:
        """An entry for a newcomer, signed but not yet merged; `above` is the highest counter the newcomer knows of."""
        self._check_member(identity)
        members = self.members()
        if certificate_device(certificate_pem) not in members and len(members) >= MAX_MEMBERS:
            raise OverloadedError(f"the household has {MAX_MEMBERS} devices, the most there can be; remove one first")
        return sign_entry(identity, certificate_pem, name, max(self.counter, above) + 1)

    def remove(self, identity: Identity, device: DeviceId) -> RosterEntry:
        """Put a device out (itself: leave). Returns its tombstone; `export()` has all that must be told."""
        self._check_member(identity)
        known = self.members().get(device)
        if known is None:
            raise NotFoundError(f"no device {device[:8]} belongs to this household")
        counter = self.counter + 1
        tombstone = sign_entry(identity, known.certificate_pem, known.name, counter, removed=True)
        # At its old counter: vouching must not outdo a removal that this device has not heard of.
        vouched = [
            _resign(identity, entry)
            for entry in self.members().values()
            if device != self.device and entry.device not in (device, self.device)
        ]
        self.merge((tombstone, *vouched))
        return tombstone

    def vouch(self, identity: Identity) -> tuple[RosterEntry, ...]:
        """`export()` less this device itself, signed by it: for a newcomer, who knows nobody else yet."""
        tombstones = [entry for register in (self._left, self._removed) for entry in register.values()]
        return tuple(
            entry if entry.removed and entry.introducer in (self.device, entry.device) else _resign(identity, entry)
            for entry in (*map(self._top, self._added), *tombstones)
            if entry.device != self.device
        )

    def merge(self, entries: Iterable[RosterEntry]) -> Change:
        """Take in what others say. Order and repetition make no difference; what does not count is left out."""
        before = self.members()
        waiting = list(dict.fromkeys(entries))
        if len(waiting) > MAX_ENTRIES:
            raise BadInputError(f"{len(waiting)} roster entries at once; at most {MAX_ENTRIES} are taken")
        waiting.sort(key=lambda entry: (entry.removed, entry.counter, entry.signature))
        refusals: dict[RosterEntry, str] = {}
        forged: set[RosterEntry] = set()
        # An entry may rest on another of the same batch: go on while anything is still taken in.
        for _ in range(len(waiting) + 1):
            progress = False
            for entry in [entry for entry in waiting if entry not in forged]:
                try:
                    taken = self._take(entry)
                except AuthenticationError as error:
                    refusals[entry] = str(error)
                    if isinstance(error, ForgedError):  # checking a signature takes long: never twice
                        forged.add(entry)
                else:
                    refusals.pop(entry, None)
                    progress = progress or taken
            if not progress:
                break
        self._forget_oldest()
        after = self.members()
        return Change(
            tuple(device for device in after if device not in before),
            tuple(device for device in before if device not in after),
            tuple(refusals.values())[:MAX_REFUSALS],
        )

    # ---- one statement -------------------------------------------------------------------------------------------

    def _take(self, entry: RosterEntry) -> bool:
        """Let a statement stand; False if a higher one already does, AuthenticationError if it does not count."""
        standing = self._standing(entry)
        if standing is not None and standing.rank >= entry.rank:
            return False
        check_entry(entry)
        self._check_authority(entry)
        joins = not entry.removed and not self._alive(entry.device) and entry.counter > self._gone_at(entry.device)
        if joins and len(self.members()) >= MAX_MEMBERS:
            raise AuthenticationError(f"the household is full ({MAX_MEMBERS} devices); {entry.device[:8]} is left out")
        check_signature(entry, self._top(entry.introducer).certificate_pem)
        self._put(entry)
        if entry.removed and entry.introducer != entry.device:
            self._void(entry)
        return True

    def _check_authority(self, entry: RosterEntry) -> None:
        signer = entry.introducer
        if not self._added.get(signer):
            raise AuthenticationError(f"{signer[:8]} is not known here and says something of {entry.device[:8]}")
        if signer == entry.device and not entry.removed and signer != self.device:
            raise AuthenticationError(f"{signer[:8]} introduces itself")
        alive, removed, left = self._alive(signer), self._removed.get(signer), self._left.get(signer)
        if entry.removed:
            if signer == entry.device or alive:
                return
            # Both sides of a mutual removal count the one signed first; signed at once, both.
            ended = max(tombstone.counter for tombstone in (removed, left) if tombstone is not None)
            if entry.counter > ended:
                raise AuthenticationError(f"{signer[:8]} was already gone when it removed {entry.device[:8]}")
            return
        if not self._holds(entry):
            raise AuthenticationError(f"{signer[:8]} was removed; whom it introduced does not count")
        if signer != self.device and not alive and left is not None and entry.counter > left.counter:
            raise AuthenticationError(f"{signer[:8]} had left when it introduced {entry.device[:8]}")

    def _void(self, tombstone: RosterEntry) -> None:
        """Forget what the removed device said, and whoever is held by nothing else."""
        if not self._alive(tombstone.device):
            for device, said in list(self._removed.items()):
                if said.introducer == tombstone.device and said.counter > tombstone.counter:
                    del self._removed[device]
        remover = tombstone.introducer  # stands on its own feet, also where the removed device had brought it in
        others = [introductions for device, introductions in self._added.items() if device != remover]
        for introductions in others:
            for introducer in [one for one, entry in introductions.items() if not self._holds(entry)]:
                del introductions[introducer]
        held = self._reachable({self.device, remover})
        dropped = {device for device in self._added if device not in held and device not in self._removed}
        for device in dropped:
            del self._added[device]
        for introductions in others:
            for device in dropped & introductions.keys():
                del introductions[device]
        for device in [device for device, said in self._removed.items() if said.introducer in dropped]:
            del self._removed[device]

    def _reachable(self, roots: set[DeviceId]) -> set[DeviceId]:
        """Whom the roots introduced, and those in turn, and so on."""
        introduced: dict[DeviceId, list[DeviceId]] = {}
        for device, introductions in self._added.items():
            for introducer in introductions:
                introduced.setdefault(introducer, []).append(device)
        held, queue = set(roots), list(roots)
        while queue:
            for device in introduced.get(queue.pop(), ()):
                if device not in held:
                    held.add(device)
                    queue.append(device)
        return held

    def _holds(self, entry: RosterEntry) -> bool:
        """Whether an introduction outlives the removals of its introducer, who may have come back since.

        What this device said itself it goes on believing: removed or not, it must be able to come back.
        """
        removed = self._removed.get(introducer := entry.introducer)
        if removed is None or introducer == self.device:
            return True
        return bool(self._added.get(introducer)) and self._top(introducer).counter > removed.counter

    # ---- small questions -----------------------------------------------------------------------------------------

    def _entries(self) -> Iterator[RosterEntry]:
        for introductions in self._added.values():
            yield from introductions.values()
        yield from self._left.values()
        yield from self._removed.values()

    def _standing(self, entry: RosterEntry) -> RosterEntry | None:
        """What stands where `entry` would."""
        if not entry.removed:
            return self._added.get(entry.device, {}).get(entry.introducer)
        return (self._left if entry.introducer == entry.device else self._removed).get(entry.device)

    def _put(self, entry: RosterEntry) -> None:
        if entry.removed:
            (self._left if entry.introducer == entry.device else self._removed)[entry.device] = entry
            return
        introductions = self._added.setdefault(entry.device, {})
        introductions[entry.introducer] = entry
        if len(introductions) > MAX_INTRODUCERS:
            others = [one for one in introductions.values() if one.introducer != self.device]
            del introductions[min(others, key=lambda one: one.rank).introducer]

    def _top(self, device: DeviceId) -> RosterEntry:
        return max(self._added[device].values(), key=lambda entry: entry.rank)

    def _gone_at(self, device: DeviceId) -> int:
        tombstones = (self._left.get(device), self._removed.get(device))
        return max((entry.counter for entry in tombstones if entry is not None), default=0)

    def _alive(self, device: DeviceId) -> bool:
        return bool(self._added.get(device)) and self._top(device).counter > self._gone_at(device)

    def _check_member(self, identity: Identity) -> None:
        if identity.device != self.device:
            raise ValueError("a roster is changed by its own device only")
        if not self._alive(self.device):
            raise AuthenticationError("this device no longer belongs to the household; pair it again")

    def _forget_oldest(self) -> None:
        gone = {device for register in (self._left, self._removed) for device in register if not self._alive(device)}
        excess = max(len(gone) - MAX_TOMBSTONES, 0)
        for device in sorted(gone - {self.device}, key=lambda device: (self._gone_at(device), device))[:excess]:
            self._added.pop(device, None)
            self._left.pop(device, None)
            self._removed.pop(device, None)


def _sorted(entries: Iterable[RosterEntry]) -> tuple[RosterEntry, ...]:
    return tuple(sorted(entries, key=lambda entry: (entry.device, entry.removed, entry.rank)))


def _resign(identity: Identity, entry: RosterEntry) -> RosterEntry:
    blank = replace(entry, introducer=identity.device, signature="")
    return replace(blank, signature=identity.sign(blank.signed_bytes()))
