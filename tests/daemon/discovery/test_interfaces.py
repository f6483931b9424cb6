"""Where mDNS is spoken and others reach this device."""

from __future__ import annotations

from types import SimpleNamespace

import ifaddr
import psutil
import pytest

from peerllm.daemon.discovery import interfaces as module
from peerllm.daemon.discovery.interfaces import interfaces, local_address


def adapter(name: str, index: int, *ips: object) -> SimpleNamespace:
    return SimpleNamespace(name=name, index=index, ips=[SimpleNamespace(ip=ip) for ip in ips])


def test_interfaces_that_are_up_and_loopback_only_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lo = adapter("lo", 1, "127.0.0.1", ("::1", 0, 0))
    lan = adapter("eth0", 2, "10.0.0.5", ("fe80::5", 0, 2), ("fd00::5", 0, 0))
    down = adapter("wlan0", 3, "10.9.9.9")
    up = SimpleNamespace(isup=True)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {"lo": up, "eth0": up, "wlan0": SimpleNamespace(isup=False)})
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: [lo, lan, down])
    assert interfaces().addresses == ("10.0.0.5", "fd00::5", "fe80::5")
    assert interfaces().bind == ("10.0.0.5", 2)
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: [adapter("eth0", 4, "10.0.0.1", "192.168.1.7"), lan])
    with monkeypatch.context() as way_out:
        way_out.setattr(module, "local_address", lambda: "192.168.1.7")
        assert interfaces().addresses == ("192.168.1.7", "10.0.0.1", "10.0.0.5", "fd00::5", "fe80::5")
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: [lo, down])
    assert interfaces().addresses == ("127.0.0.1", "::1")
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: [down])
    with pytest.raises(OSError):
        interfaces()


def test_where_interfaces_are_secret_a_socket_tells_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied() -> None:
        raise PermissionError("netlink")

    monkeypatch.setattr(ifaddr, "get_adapters", denied)
    monkeypatch.setattr(module, "LOCAL_PROBE", ("127.0.0.1", 9))
    assert local_address() == "127.0.0.1"
    assert interfaces().bind == ("127.0.0.1",)
