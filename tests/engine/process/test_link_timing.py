"""What engines tell of their links: timed on purpose before a plan, and in passing while sequences run."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from peerllm.engine.messages import LinkTimed, LinkTraffic, TimeLink
from peerllm.engine.process.inbox import Inbox
from peerllm.errors import AuthenticationError, BadInputError, LinkError
from tests.engine.engines import WAIT_S, Cut, deploy, devices
from tests.engine.tiny import make_llama, prompt, reference

pytestmark = pytest.mark.timeout(240)
RING: Cut = ((0, 0, 1), (1, 2, 3), (0, 4, 5))


async def test_links_are_timed_before_and_while_sequences_run(tmp_path: Path) -> None:
    async with devices(2, tmp_path, in_process=True) as made:
        one, two = made

        def ask(sizes: tuple[int, ...], port: int = two.port, device: str = two.id) -> TimeLink:
            return TimeLink(one.host.next_request(), device, two.hosts, port, sizes)

        answer = await one.host.ask(ask((2048, 2048, 65536)), WAIT_S)
        assert isinstance(answer, LinkTimed) and [nbytes > 2000 for nbytes, _ in answer.frames] == [True] * 3
        assert all(seconds > 0 for _, seconds in answer.frames)
        for wrong, error in (
            (ask((65537,)), BadInputError),
            (ask((0,)), BadInputError),
            (ask((1,) * 65), BadInputError),
            (ask((1,), device="0" * 64), AuthenticationError),
            (ask((1,), port=1), LinkError),
        ):
            with pytest.raises(error):
                await one.host.ask(wrong, WAIT_S)
        await two.until(lambda: any(isinstance(event, LinkTraffic) for event in two.events))
        told = next(event for event in two.events if isinstance(event, LinkTraffic))
        assert told.frames == () and told.handover_s is not None and told.handover_s > 0

        model = make_llama(tmp_path / "model")
        deployed = await deploy(made, model, RING, context=4096)
        running = deployed.submit(prompt(5), 4000)
        for here, there in ((one, two), (two, one)):
            await here.until(lambda here=here: any(isinstance(e, LinkTraffic) and e.frames for e in here.events))
            frames = [frame for e in here.events if isinstance(e, LinkTraffic) for frame in e.frames]
            assert {device for device, _, _ in frames} == {there.id}
            assert all(nbytes > 0 and seconds >= 0 for _, nbytes, seconds in frames)
        deployed.cancel(running)
        await deployed.finished(running)
        assert await deployed.generate(prompt(7), 9) == reference(model, prompt(7), 9), "timed frames are frames"


def test_only_a_taker_that_waited_measures_the_hand_over() -> None:
    inbox: Inbox[int] = Inbox()
    inbox.put(1)
    assert inbox.take(wait=True) == [1] and inbox.handover_s is None, "it lay there while the taker was busy"
    got: list[list[int] | None] = []
    taker = threading.Thread(target=lambda: got.append(inbox.take(wait=True)))
    taker.start()
    while not inbox._idle:
        pass
    inbox.put(2)
    taker.join()
    assert got == [[2]] and inbox.handover_s is not None and inbox.handover_s > 0
