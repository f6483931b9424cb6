"""Measuring links sparingly: short probes whatever the link, none while a device is busy; and who is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from aiohttp import web

from peerllm.daemon.network import peer_http
from peerllm.daemon.network.speed import bandwidth_probe, link_monitor, probe_scheduler
from peerllm.daemon.network.speed.bandwidth_probe import FAST_PROBE_S, PROBE_AIR_S, BandwidthProbe
from peerllm.daemon.network.speed.link_monitor import LARGE_FRAME_S, SMALL_FRAME_S, frame_sizes
from peerllm.errors import LinkError, UnavailableError
from tests.daemon.networks import WAIT_S, Device, devices, pair

OF = "d" * 64


class Wire(BandwidthProbe):
    """A link of a known rate; the first `stalls` probes take as long as a busy processor makes them."""

    def __init__(self, mbps: float, stalls: int = 0) -> None:
        self.mbps, self.stalls = mbps, stalls
        self.probes: list[tuple[int, float]] = []

    async def _probe(self, device: str, nbytes: int, air_s: float) -> tuple[float, float]:
        seconds = nbytes * 8e-6 / self.mbps
        if len(self.probes) < self.stalls:
            seconds += 2 * FAST_PROBE_S
        carried = nbytes * min(1.0, air_s / seconds)
        seconds = min(seconds, air_s)
        self.probes.append((nbytes, seconds))
        return carried * 8e-6 / seconds, seconds


@pytest.mark.parametrize("mbps", [0.05, 1.0, 5.0, 30.0, 100.0, 1000.0, 40_000.0])
async def test_probes_are_as_short_as_the_link_is_slow(mbps: float) -> None:
    wire = Wire(mbps)
    assert await wire.measure_mbps(OF) == pytest.approx(mbps)
    assert sum(seconds for _, seconds in wire.probes) <= PROBE_AIR_S + 1e-9
    assert len(wire.probes) <= 5 and max(nbytes for nbytes, _ in wire.probes) <= bandwidth_probe.MAX_PROBE_BYTES


@pytest.mark.parametrize("mbps", [5.0, 100.0, 10_000.0])
async def test_one_stall_is_not_taken_for_a_slow_link(mbps: float) -> None:
    assert await Wire(mbps, stalls=1).measure_mbps(OF) == pytest.approx(mbps)


@pytest.mark.parametrize("mbps", [0.1, 1.0, 10.0, 1000.0])
def test_frames_to_time_a_link_with_are_never_long_under_way(mbps: float) -> None:
    sizes = frame_sizes(mbps)
    small, large = sizes[0], sizes[-1]
    assert sizes == sorted(sizes) and len(set(sizes)) <= 2
    assert small * 8e-6 / mbps <= max(SMALL_FRAME_S, link_monitor.LEAST_FRAME_BYTES * 8e-6 / mbps)
    assert large == small or large * 8e-6 / mbps <= LARGE_FRAME_S


async def test_a_probe_that_is_cut_short_frees_the_link_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crawl(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": request.match_info["nbytes"]})
        await response.prepare(request)
        await response.write(bytes(1000))
        await asyncio.Event().wait()
        return response

    monkeypatch.setattr(bandwidth_probe, "_serve_probe", crawl)
    monkeypatch.setattr(bandwidth_probe, "PROBE_AIR_S", 0.1)
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        aborted = asyncio.Event()
        monkeypatch.setattr(peer_http, "_abort", lambda response, was=peer_http._abort: (was(response), aborted.set()))
        await pair(anna, bert)
        async with asyncio.timeout(WAIT_S):
            await aborted.wait()
        await anna.until(lambda: anna.network.link_monitor._probing._not_before or anna.network.peers()[bert.id].mbps)


async def test_a_busy_device_is_not_probed_and_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_scheduler, "BUSY_S", 0.05)
    busy, refused = [True], asyncio.Event()
    measure = BandwidthProbe.measure_mbps

    async def noted(probe: BandwidthProbe, device: str) -> float:
        try:
            return await measure(probe, device)
        except UnavailableError:
            refused.set()
            raise

    monkeypatch.setattr(BandwidthProbe, "measure_mbps", noted)
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        monkeypatch.setattr(bert.network.link_monitor, "_idle", lambda: not busy[0])
        await pair(anna, bert)
        async with asyncio.timeout(WAIT_S):
            await refused.wait()
        assert anna.network.peers()[bert.id].mbps is None and bert.network.peers()[anna.id].mbps is None
        busy[0] = False
        await anna.until(lambda: anna.network.peers()[bert.id].mbps)


async def test_everybody_learns_of_every_link_and_forgets_who_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_scheduler, "BUSY_S", 0.05)
    monkeypatch.setattr(link_monitor, "LOOK_S", 0.05)
    echoed: list[tuple[str, int]] = []
    async with devices(tmp_path, "anna", "bert", "cleo") as everyone:
        for number, device in enumerate(everyone):

            async def echo(other: str, sizes: Sequence[int], ms: int = 10 * (number + 1)) -> list[tuple[int, float]]:
                echoed.extend((other, size) for size in sizes)
                return [(size, ms / 1e3 + size * 8e-9) for size in sizes]  # at 1 Gbps

            device.network.link_monitor.echo, device.network.link_monitor.may_echo = echo, lambda device: True
        anna, bert, cleo = everyone
        await pair(anna, bert)
        await pair(anna, cleo)
        pairs = {(a.id, b.id) for a in everyone for b in everyone if a is not b}

        def known(device: Device) -> dict[tuple[str, str], float]:
            figures = device.network.link_monitor.figures()
            return {pair: round(figure.hop_ms or 0.0) for pair, figure in figures.items()}

        ms = {anna.id: 10, bert.id: 20, cleo.id: 30}
        wanted = {pair: ms[pair[0]] for pair in pairs}  # as its sender has measured it
        for device in everyone:
            await device.until(lambda device=device: known(device) == wanted, 2 * WAIT_S)
        assert {other for other, _ in echoed} == {device.id for device in everyone}
        anna.network.link_monitor.framed(bert.id, 2048, 0.5)
        assert anna.network.link_monitor.figures()[anna.id, bert.id].source == "traffic"
        assert not anna.network.link_monitor.may_be_probed, "a request is being answered"
        await anna.network.remove(cleo.id)
        await anna.until(lambda: cleo.id not in {end for pair in anna.network.link_monitor.figures() for end in pair})


async def test_downloads_refine_what_is_known(tmp_path: Path) -> None:
    async with devices(tmp_path, "anna", "bert") as (anna, bert):
        await pair(anna, bert)
        known = anna.network.link_monitor
        clock, seen = [0.0], []

        async def blocks() -> AsyncIterator[bytes]:
            for _ in range(8):
                clock[0] += 1.0
                yield bytes(1_000_000)

        estimate = known._tables.incoming(bert.id)
        assert estimate is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(link_monitor.time, "monotonic", lambda: clock[0])
            async for block in known.metered(bert.id, blocks()):
                seen.append(len(block))
                assert not known.quiet, "a download is no time to measure"
        assert seen == [1_000_000] * 8 and not known._meters
        assert estimate.mbps == pytest.approx(8.0) and estimate.source == "traffic"

        async def broken() -> AsyncIterator[bytes]:
            yield b"x"
            raise LinkError("cut")

        with pytest.raises(LinkError):
            [block async for block in known.metered(bert.id, broken())]
        assert not known._meters
