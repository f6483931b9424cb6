"""Puts together what every device measured of its own links: one figure for each ordered pair. Sans-I/O.

A device tells of its own links and no others; what it says of them can only make plans take or avoid them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite

from peerllm.daemon.control_messages import LinkSeen, LinkTable
from peerllm.daemon.network.speed.link_estimates import LinkEstimate, Source
from peerllm.transport.roster.roster import MAX_MEMBERS
from peerllm.types import DeviceId, LinkProfile

STALE_S = 1800.0  # a figure older than this counts no more
SILENT_S = 900.0  # a table not said again for so long counts no more
LEAST_MS, MOST_MS = 1e-4, 60_000.0
LEAST_MBPS, MOST_MBPS = 1e-3, 1e6
HYSTERESIS = 0.2  # share by which a figure must differ from what was told to be told again
HYSTERESIS_MS = 0.05  # ... and by so much, for times
UNKNOWN_FRAME_MS = 0.3  # what a frame's handling costs beside the wire, where no frame was timed yet

Pair = tuple[DeviceId, DeviceId]  # bytes go from the first to the second


@dataclass(frozen=True, slots=True)
class LinkFigure:
    """What is known of an ordered pair."""

    rtt_ms: float | None
    mbps: float
    hop_ms: float | None  # a small frame, from one compute thread to the other
    source: Source
    age_s: float

    @property
    def profile(self) -> LinkProfile:
        """For the planner."""
        wire_ms = (self.rtt_ms or 0.0) / 2 + UNKNOWN_FRAME_MS
        return LinkProfile(wire_ms if self.hop_ms is None else self.hop_ms, self.mbps)


@dataclass(slots=True)
class _Ends:
    """This device's own estimates of its link with another."""

    incoming: LinkEstimate = field(default_factory=LinkEstimate)
    outgoing: LinkEstimate = field(default_factory=LinkEstimate)


@dataclass(frozen=True, slots=True)
class _Heard:
    at: float
    rows: Mapping[DeviceId, LinkSeen]
    handover_ms: float | None


class LinkTables:
    """Of the devices that `keep_only` named; nothing is kept of others."""

    def __init__(self, me: DeviceId) -> None:
        self._me = me
        self._own: dict[DeviceId, _Ends] = {}
        self._heard: dict[DeviceId, _Heard] = {}
        self.handover_ms: float | None = None  # this device's own

    def keep_only(self, devices: Collection[DeviceId]) -> None:
        """Exactly these other devices are of the household."""
        self._own = {device: self._own.get(device) or _Ends() for device in devices}
        self._heard = {device: heard for device, heard in self._heard.items() if device in self._own}

    def incoming(self, device: DeviceId) -> LinkEstimate | None:
        """From that device to this one; None if it is not of the household."""
        ends = self._own.get(device)
        return None if ends is None else ends.incoming

    def outgoing(self, device: DeviceId) -> LinkEstimate | None:
        """From this device to that one."""
        ends = self._own.get(device)
        return None if ends is None else ends.outgoing

    def mine(self, rtts_ms: Mapping[DeviceId, float], now: float) -> LinkTable:
        """What this device has to say of its links; `rtts_ms` of those that stand."""
        rows = (self._row(device, ends, rtts_ms.get(device), now) for device, ends in self._own.items())
        told = tuple(row for row in rows if not row.rtt_ms is row.mbps is row.hop_ms is row.frame_mbps is None)
        return LinkTable(told, self.handover_ms)

    @staticmethod
    def _row(device: DeviceId, ends: _Ends, rtt_ms: float | None, now: float) -> LinkSeen:
        incoming, outgoing = ends.incoming, ends.outgoing
        row = LinkSeen(device, rtt_ms=rtt_ms)
        if incoming.at is not None and now - incoming.at < STALE_S:
            traffic = incoming.source == "traffic"
            row = replace(row, mbps=incoming.mbps, mbps_age_s=now - incoming.at, mbps_from_traffic=traffic)
        if outgoing.at is not None and now - outgoing.at < STALE_S:
            row = replace(
                row,
                hop_ms=outgoing.latency_ms,
                frame_mbps=outgoing.mbps,
                hop_age_s=now - outgoing.at,
                hop_from_traffic=outgoing.source == "traffic",
            )
        return row

    def hear(self, sender: DeviceId, table: LinkTable, now: float) -> bool:
        """Take another device's table in the place of its last one; whether anything of it can be used."""
        if sender not in self._own:
            return False
        known = self._own.keys() | {self._me}
        rows: dict[DeviceId, LinkSeen] = {}
        for row in table.links[:MAX_MEMBERS]:
            if row.device in known and row.device != sender and _credible(row):
                rows.setdefault(row.device, row)
        handover = table.handover_ms if _within(table.handover_ms, LEAST_MS, MOST_MS) else None
        self._heard[sender] = _Heard(now, rows, handover)
        return bool(rows)

    def forget(self, device: DeviceId) -> None:
        """The device is away: what it said was of links that are gone."""
        self._heard.pop(device, None)

    def figures(self, rtts_ms: Mapping[DeviceId, float], now: float) -> dict[Pair, LinkFigure]:
        """Every ordered pair of which enough is known."""
        mine = self.mine(rtts_ms, now)
        tables = {device: heard for device, heard in self._heard.items() if now - heard.at < SILENT_S}
        tables[self._me] = _Heard(now, {row.device: row for row in mine.links}, mine.handover_ms)
        pairs = {pair for device, heard in tables.items() for other in heard.rows for pair in _both(device, other)}
        found = {pair: self._figure(tables, pair, now) for pair in sorted(pairs)}
        return {pair: figure for pair, figure in found.items() if figure is not None}

    @staticmethod
    def _figure(tables: Mapping[DeviceId, _Heard], pair: Pair, now: float) -> LinkFigure | None:
        """The slower of the two ends' rates; the sender's time of a frame, else the other's (a way back is as long)."""
        sender, receiver = (tables.get(device) for device in pair)
        out = None if sender is None else sender.rows.get(pair[1])
        back = None if receiver is None else receiver.rows.get(pair[0])
        rates: list[tuple[float, float, bool]] = []  # Mbps, age, from traffic
        hops: list[tuple[float, float, bool]] = []
        handover = 0.0 if receiver is None else receiver.handover_ms or 0.0
        if out is not None and sender is not None:
            age = out.hop_age_s + now - sender.at
            rates += [(out.frame_mbps, age, out.hop_from_traffic)] if out.frame_mbps is not None else []
            hops += [(out.hop_ms + handover, age, out.hop_from_traffic)] if out.hop_ms is not None else []
        if back is not None and receiver is not None:
            age, hop_age = back.mbps_age_s + now - receiver.at, back.hop_age_s + now - receiver.at
            rates += [(back.mbps, age, back.mbps_from_traffic)] if back.mbps is not None else []
            hops += [(back.hop_ms + handover, hop_age, back.hop_from_traffic)] if back.hop_ms is not None else []
        rates, hops = ([one for one in some if one[1] < STALE_S] for some in (rates, hops))
        rtt_ms = next((row.rtt_ms for row in (out, back) if row is not None and row.rtt_ms is not None), None)
        if not rates or (rtt_ms is None and not hops):
            return None
        used = [min(rates), *hops[:1]]
        source: Source = "traffic" if any(traffic for _, _, traffic in used) else "measured"
        return LinkFigure(rtt_ms, used[0][0], hops[0][0] if hops else None, source, max(age for _, age, _ in used))


def news(table: LinkTable, told: LinkTable | None) -> bool:
    """Whether a table differs enough from the one that was sent last to be sent again."""
    if told is None:
        return bool(table.links)
    before = {row.device: row for row in told.links}
    if before.keys() != {row.device for row in table.links} or _moved(table.handover_ms, told.handover_ms, True):
        return True
    return any(
        _moved(row.rtt_ms, before[row.device].rtt_ms, True)
        or _moved(row.hop_ms, before[row.device].hop_ms, True)
        or _moved(row.mbps, before[row.device].mbps)
        or _moved(row.frame_mbps, before[row.device].frame_mbps)
        for row in table.links
    )


def _moved(value: float | None, before: float | None, time: bool = False) -> bool:
    if value is None or before is None:
        return value is not before
    change = abs(value - before)
    return change > HYSTERESIS * before and (not time or change > HYSTERESIS_MS)


def _credible(row: LinkSeen) -> bool:
    times = all(_within(ms, LEAST_MS, MOST_MS) for ms in (row.rtt_ms, row.hop_ms) if ms is not None)
    rates = all(_within(mbps, LEAST_MBPS, MOST_MBPS) for mbps in (row.mbps, row.frame_mbps) if mbps is not None)
    return times and rates and all(_within(age, 0.0, STALE_S) for age in (row.mbps_age_s, row.hop_age_s))


def _within(value: float | None, least: float, most: float) -> bool:
    return value is not None and isfinite(value) and least <= value <= most


def _both(a: DeviceId, b: DeviceId) -> tuple[Pair, Pair]:
    return (a, b), (b, a)
