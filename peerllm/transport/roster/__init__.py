"""The household's signed list of devices (docs/wire.md §3)."""

from peerllm.transport.roster.entry import MAX_COUNTER, MAX_NAME_CHARACTERS, RosterEntry, sign_entry
from peerllm.transport.roster.roster import MAX_ENTRIES, MAX_MEMBERS, MAX_TOMBSTONES, Change, Roster

__all__ = [
    "MAX_COUNTER",
    "MAX_ENTRIES",
    "MAX_MEMBERS",
    "MAX_NAME_CHARACTERS",
    "MAX_TOMBSTONES",
    "Change",
    "Roster",
    "RosterEntry",
    "sign_entry",
]
