"""Adverts that lie, and real mDNS between several devices of this machine over loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import zeroconf.asyncio
from hypothesis import given
from hypothesis import strategies as st

from peerllm.daemon.discovery import mdns as module
from peerllm.daemon.discovery.advert import MAX_NAME_CHARS, Advert, from_txt, printable_name, to_txt
from peerllm.daemon.discovery.mdns import Discovery, Gone, Seen

FOUND_S = 5.0  # seconds mDNS may take on a busy machine
LOOPBACK = ("127.0.0.1",)


def advert(number: int, **changes: object) -> Advert:
    base = Advert(f"{number:016x}", f"device {number}", 1, 8643 + number, 4 << 30, 12.3, 85.0, 940.0)
    return replace(base, **changes)  # type: ignore[arg-type]


def raw(txt: dict[str, str]) -> dict[bytes, bytes | None]:
    return {key.encode(): value.encode() for key, value in txt.items()}


def test_an_advert_survives_the_record() -> None:
    for sent in (advert(1), advert(2, door="K7", pairing_port=8645), advert(3, name="Küche ☕")):
        assert from_txt(raw(to_txt(sent))) == sent


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id", b"xyz"),
        ("id", b"0" * 64),
        ("id", b"ABCDEF0123456789"),
        ("name", b""),
        ("name", b"x" * 65),
        ("name", b"a\nb"),
        ("name", b"\x1b[31m"),
        ("name", b"\xff\xfe"),
        ("port", b"0"),
        ("port", b"65536"),
        ("port", b"-1"),
        ("port", b"8643 "),
        ("port", "８６４３".encode()),
        ("v", b"one"),
        ("mem", b"1e9"),
        ("mem", b"9" * 17),
        ("gbps", b"nan"),
        ("gflops", b"inf"),
        ("mbps", b"-1"),
        ("door", b"K"),
        ("door", b"K7"),
        ("pair", b"8645"),
        ("pair", b"99999"),
    ],
)
def test_a_wrong_value_spoils_the_advert(key: str, value: bytes) -> None:
    record = raw(to_txt(advert(1))) | {key.encode(): value}
    with pytest.raises(ValueError):
        from_txt(record)


@given(st.dictionaries(st.binary(max_size=20), st.none() | st.binary(max_size=255), max_size=40))
def test_no_record_does_worse_than_a_value_error(record: dict[bytes, bytes | None]) -> None:
    valid = raw(to_txt(advert(1)))
    for candidate in (record, valid | record):
        try:
            seen = from_txt(candidate)
        except ValueError:
            continue
        assert seen.name.isprintable() and len(seen.name) <= MAX_NAME_CHARS


@given(st.text())
def test_any_name_can_be_advertised(name: str) -> None:
    sent = advert(1, name=printable_name(name))
    assert from_txt(raw(to_txt(sent))) == sent


def says(wanted: Advert) -> Callable[[Seen | Gone], bool]:
    return lambda event: isinstance(event, Seen) and event.advert == wanted


class Watcher:
    """Collects what one Discovery reports, and waits for what is wanted."""

    def __init__(self) -> None:
        self.events: list[Seen | Gone] = []
        self._news = asyncio.Event()

    def __call__(self, event: Seen | Gone) -> None:
        self.events.append(event)
        self._news.set()

    async def until(self, wanted: Callable[[Seen | Gone], bool]) -> Seen | Gone:
        async with asyncio.timeout(FOUND_S):
            while True:
                for event in self.events:
                    if wanted(event):
                        return event
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def devices(count: int) -> AsyncIterator[list[tuple[Discovery, Watcher]]]:
    made: list[tuple[Discovery, Watcher]] = []
    try:
        for number in range(1, count + 1):
            watcher = Watcher()
            found = Discovery(advert(number), watcher, only=LOOPBACK)
            made.append((found, watcher))
            await found.start()
            assert found.problem == ""
        yield made
    finally:
        for found, _ in made:
            await found.close()


async def test_three_devices_find_each_other_see_changes_and_departures() -> None:
    async with devices(3) as three:
        for number, (_, watcher) in enumerate(three, 1):
            for other in {1, 2, 3} - {number}:
                seen = await watcher.until(says(advert(other)))
                assert isinstance(seen, Seen) and seen.addresses == LOOPBACK
            assert not any(isinstance(e, Seen) and e.advert.short_id == f"{number:016x}" for e in watcher.events)

        opened = advert(1, door="K7", pairing_port=8645)
        three[0][0].update(opened)
        for _, watcher in three[1:]:
            await watcher.until(says(opened))
        for _, watcher in three[1:]:
            watcher.events.clear()
        three[0][0].update(advert(1))
        for _, watcher in three[1:]:
            await watcher.until(says(advert(1)))

        await three[2][0].close()
        for _, watcher in three[:2]:
            await watcher.until(lambda e: e == Gone(f"{3:016x}"))
        await three[2][0].close()


async def test_a_liar_on_the_same_network_is_ignored() -> None:
    async with devices(1) as [(_, watcher)]:
        liar = Discovery(advert(2), lambda event: None, only=LOOPBACK)
        liar._advert = replace(advert(2))
        object.__setattr__(liar._advert, "name", "a\nb")
        honest = Discovery(advert(3), lambda event: None, only=LOOPBACK)
        await liar.start()
        await honest.start()
        try:
            await watcher.until(says(advert(3)))
            assert not any(isinstance(e, Seen) and e.advert.short_id == f"{2:016x}" for e in watcher.events)
        finally:
            await liar.close()
            await honest.close()


async def test_an_advert_that_comes_late_changes_nothing() -> None:
    """Announcements are repeated, answers delayed: what was said before the door opened may come after."""
    async with devices(2) as [(_, watcher), (second, _)]:
        opened = advert(2, door="K7", pairing_port=8645)
        await watcher.until(says(advert(2)))
        second.update(opened)
        await watcher.until(says(opened))
        again = Discovery(advert(2, name="again"), lambda event: None, only=LOOPBACK)
        again._serial = second._serial - 3
        marker = Discovery(advert(3), lambda event: None, only=LOOPBACK)
        await again.start()
        await marker.start()
        try:
            await watcher.until(says(advert(3)))
            assert not any(says(advert(2, name="again"))(event) for event in watcher.events)
        finally:
            await marker.close()
            await again.close()


def test_only_for_a_while_and_only_a_little_behind_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [100.0], Watcher()
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    listening = Discovery(advert(1), seen, only=LOOPBACK)

    def came(serial: int, name: str) -> bool:
        told = advert(2, name=name)
        txt = raw(to_txt(told) | {"n": str(serial)})
        info = SimpleNamespace(properties=txt, parsed_scoped_addresses=lambda: ["127.0.0.1"])
        listening._report(told.short_id, info)  # type: ignore[arg-type]
        return says(told)(seen.events[-1])

    assert came(5000, "first") and came(5002, "second")
    assert not came(5001, "late") and not came(5002 - module.LATE_SERIALS, "very late")
    assert came(5002 - module.LATE_SERIALS - 1, "restarted"), "its serial is drawn anew"
    assert came(9000, "forged") and not came(8500, "true")
    now[0] += module.LATE_S
    assert came(8501, "true"), "who forges a high one does not hide the device for long"


async def test_devices_and_questions_about_them_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many devices are remembered, and of so many at once it is asked where they are."""
    known, asked = [True], asyncio.Event()

    class Info:
        def __init__(self, service: str, name: str) -> None:
            told = replace(advert(0), short_id=name[:16])
            self.properties = raw(to_txt(told) | {"n": "1"})

        def load_from_cache(self, zeroconf: object) -> bool:
            return known[0]

        def parsed_scoped_addresses(self) -> list[str]:
            return ["127.0.0.1"]

        async def async_request(self, *_: object) -> bool:
            await asked.wait()
            return True

    monkeypatch.setattr(module, "AsyncServiceInfo", Info)
    monkeypatch.setattr(module, "MAX_SIGHTINGS", 3)
    monkeypatch.setattr(module, "MAX_RESOLVING", 2)
    seen = Watcher()
    listening = Discovery(advert(1), seen, only=LOOPBACK)
    names = [f"{number:016x}.{module.SERVICE}" for number in range(0x100, 0x10A)]

    def look(name: str) -> int:
        listening.add_service(None, module.SERVICE, name)  # type: ignore[arg-type]
        return len(listening._seen)

    assert [look(name) for name in names[:5]] == [1, 2, 3, 3, 3]
    listening.remove_service(None, module.SERVICE, names[0])  # type: ignore[arg-type]
    assert look(names[1]) == 2 and look(names[3]) == 3, "one that left makes room"
    listening.remove_service(None, module.SERVICE, names[3])  # type: ignore[arg-type]
    known[0] = False
    for name in (*names[4:8], names[4]):
        look(name)
    assert set(listening._resolving) == {names[4][:16], names[5][:16]}
    asked.set()
    await asyncio.gather(*listening._resolving.values())
    await asyncio.sleep(0)
    assert not listening._resolving


async def test_without_mdns_there_is_a_warning_and_later_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    working = zeroconf.asyncio.AsyncZeroconf

    def denied(**_: object) -> None:
        raise PermissionError("netlink is denied")

    monkeypatch.setattr(module, "AsyncZeroconf", denied)
    monkeypatch.setattr(module, "INTERFACE_CHECK_S", 0.02)
    watcher = Watcher()
    found = Discovery(advert(1), watcher, only=LOOPBACK)
    await found.start()
    try:
        assert "netlink is denied" in found.problem and "--peer" in found.problem
        monkeypatch.setattr(module, "AsyncZeroconf", working)
        async with devices(0), asyncio.timeout(FOUND_S):
            other = Discovery(advert(2), lambda event: None, only=LOOPBACK)
            await other.start()
            await watcher.until(says(advert(2)))
            await other.close()
        assert found.problem == ""
    finally:
        await found.close()
