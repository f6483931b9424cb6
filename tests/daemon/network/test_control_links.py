"""The timer behind membership: set to the next thing that is due, whatever was due before."""

from __future__ import annotations

from pathlib import Path

import pytest

from peerllm.daemon.decide import membership_events as m
from peerllm.daemon.network.control_links import ControlLinks
from peerllm.transport.identity import load_or_create

B, C = "b" * 64, "c" * 64


class Owner:
    """Knows nobody's certificate, so that every dial fails by itself."""

    def certificates(self) -> dict[str, str]:
        return {}

    def on_member(self, change: m.Changed) -> None: ...


@pytest.mark.parametrize("nearer_first", [True, False])
async def test_the_timer_is_always_that_of_the_nearest_deadline(tmp_path: Path, nearer_first: bool) -> None:
    links = ControlLinks(load_or_create(tmp_path), (), Owner())  # type: ignore[arg-type]
    await links.start()
    try:
        links.feed(m.Members(frozenset({B, C})))
        assert links._timer is None and links.membership.deadline() is None
        for device in (B, C):
            links.feed(m.Sighted(device[:16], ("192.0.2.1",), 1))
        members = links.membership.members
        far, near = (members[device].attempt for device in ((C, B) if nearer_first else (B, C)))
        now = links.membership.deadline()
        assert now is None or links._timer is not None
        far.due, near.due, far.dialling, near.dialling = (now or 0.0) + 1e9, (now or 0.0) + 2e9, False, False
        links.feed(m.Sighted("e" * 16, ("192.0.2.9",), 1))  # a stranger: nothing but a look at what is due
        assert links._timer is not None and links._timer[0] == far.due
        near.due = far.due - 5e8
        links.feed(m.Sighted("e" * 16, ("192.0.2.9",), 1))
        assert links._timer[0] == near.due == links.membership.deadline()
        handle = links._timer[1]
        links.feed(m.Sighted("e" * 16, ("192.0.2.9",), 1))
        assert links._timer[1] is handle, "set already"
        links.feed(m.Members(frozenset()))
        assert links._timer is None and handle.cancelled()  # type: ignore[attr-defined]
    finally:
        await links.close("over")
