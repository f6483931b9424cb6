"""Stages move to other devices while answers are written: what they keep is carried there, the tokens are the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peerllm.engine.base import StatePart
from peerllm.engine.messages import CarryState, Connect, Done, Hop, Trust, Trusted, Unload
from peerllm.engine.process import carrying
from peerllm.engine.wire.state_frames import CarriedPart
from peerllm.errors import LinkError
from peerllm.transport.frames.frame import Frame, FrameKind, NamedTensor
from peerllm.transport.frames.limits import FrameLimits, TensorLimit
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.identity import Identity, load_or_create
from peerllm.transport.links.channels import KEY_VALUE
from peerllm.transport.links.data_plane import DataPlane
from peerllm.transport.links.link import Link
from peerllm.types import Sampling
from tests.engine.engines import WAIT_S, Cut, Deployed, Device, deploy, devices, stage_specs
from tests.engine.state.test_arriving_state import directory

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("calm")]

CONTEXT, ANSWER = 400, 150
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=1.0, seed=5),
    Sampling(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, seed=6),
)
PROMPTS = [[3 + (11 * n + 7 * place + place * place) % 85 for place in range(100 + 9 * n)] for n in (1, 2, 3)]


@dataclass(frozen=True)
class Move:
    """A plan and the next; (from, to, first layer, last layer, stage of the next plan) of what is carried."""

    before: Cut
    after: Cut
    carried: tuple[tuple[int, int, int, int, int], ...]


ANOTHER_DEVICE = Move(((0, 0, 2), (1, 3, 4), (0, 5, 5)), ((0, 0, 2), (2, 3, 4), (0, 5, 5)), ((1, 2, 3, 4, 1),))
# Layer 2 is loaded anew where it was; layer 3 and 4 come together, and the head's device changes.
CUT_ANEW = Move(
    ((0, 0, 1), (1, 2, 3), (2, 4, 5)),
    ((0, 0, 1), (1, 2, 2), (3, 3, 5)),
    ((1, 3, 3, 3, 2), (2, 3, 4, 5, 2)),
)


async def establish(deployed: Deployed, cut: Cut, state_from: Sequence[Device | Identity] = ()) -> None:
    """Load and connect another epoch beside the one that runs."""
    deployed.epoch += 1
    senders = tuple(one.id if isinstance(one, Device) else one.device for one in state_from)
    specs = [(device, replace(spec, state_from=senders)) for device, spec in
             stage_specs(deployed.devices, deployed.inspected, cut, deployed, context=CONTEXT)]  # fmt: skip
    await asyncio.gather(*(device.host.ask(spec, WAIT_S) for device, spec in specs))
    for device in {id(device): device for device, _ in specs}.values():
        await device.host.ask(Connect(device.host.next_request(), deployed.id, deployed.epoch), WAIT_S)


async def carry(deployed: Deployed, holder: Device, to: Device, first: int, last: int, stage: int) -> None:
    """To the epoch that was established last, from the one before."""
    hop = Hop(to.id, to.hosts, to.port, stage)
    request, epoch = holder.host.next_request(), deployed.epoch
    answer = await holder.host.ask(CarryState(request, deployed.id, epoch - 1, first, last, epoch, hop), WAIT_S)
    assert answer == Done(request)


async def started(deployed: Deployed) -> list[int]:
    """Three answers, past their tenth token."""
    running = [deployed.submit(ids, ANSWER, how) for ids, how in zip(PROMPTS, SAMPLINGS, strict=True)]
    for sequence in running:
        await deployed.some(sequence, 10)
    return running


async def replayed(deployed: Deployed) -> int:
    return sum([(await device.load()).replayed_tokens for device in deployed.devices])


async def moved(model: Path, tmp_path: Path, move: Move) -> tuple[int, int]:
    """(Tokens that stages computed again, with and without carrying); every answer is as it was without a move."""
    async with devices(1 + max(device for device, _, _ in (*move.before, *move.after)), tmp_path, True) as made:
        deployed = await deploy(made, model, move.before, context=CONTEXT)
        wanted = [await deployed.generate(ids, ANSWER, how) for ids, how in zip(PROMPTS, SAMPLINGS, strict=True)]
        counts = []
        for carried in (move.carried, ()):
            running, before = await started(deployed), await replayed(deployed)
            await establish(deployed, move.after, [made[one] for one, *_ in move.carried])
            for one, to, *layers, stage in carried:
                await carry(deployed, made[one], made[to], *layers, stage)
            await deployed.switch()
            for device in made:
                past = Unload(device.host.next_request(), deployed.id, deployed.epoch - 1)
                await device.host.ask(past, WAIT_S)
            assert [deployed.source.tokens(sequence)[1] for sequence in running] == [None] * 3, "they go on after it"
            for sequence, expected in zip(running, wanted, strict=True):
                ids, end = await deployed.finished(sequence)
                assert (ids, end.finish) == (expected, "length")
            counts.append(await replayed(deployed) - before)
            assert not any(device.links_lost() for device in made)
            await deployed.until_free()
            await deployed.unload()
            await establish(deployed, move.before)
        return counts[0], counts[1]


async def test_what_was_carried_is_not_computed_again(tmp_path: Path) -> None:
    """Windows and all tokens; from two devices to one, and a layer that is loaded anew where it was."""
    carried, without = await moved(directory("ministral"), tmp_path, CUT_ANEW)
    assert carried < without / 3, "stages that change compute what came since, not the prompts"


@pytest.mark.slow
@pytest.mark.parametrize("move", [ANOTHER_DEVICE, CUT_ANEW])
@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
async def test_so_it_is_with_other_models(model_type: str, move: Move, tmp_path: Path) -> None:
    carried, without = await moved(directory(model_type), tmp_path, move)
    assert carried < without / 3


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["lfm2", "qwen3_next"])
async def test_recurrent_layers_go_on_from_their_snapshot(model_type: str, tmp_path: Path) -> None:
    carried, without = await moved(directory(model_type), tmp_path, ANOTHER_DEVICE)
    assert carried < without / 2, "what came after the prompts' ends is computed again"


@pytest.mark.slow
async def test_recurrent_layers_that_cannot_are_computed_again(tmp_path: Path) -> None:
    """Those that are copied on the device have no snapshot: one place for all is the start only."""
    await moved(directory("lfm2"), tmp_path, CUT_ANEW)


async def test_who_takes_state_without_end_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it by then, and tasks and links would add up."""
    monkeypatch.setattr(carrying, "MOST_S", 0.05)
    about = CarryState(1, "ab" * 16, 1, 1, 2, 2, Hop("d" * 64, ("h",), 1, 1))
    part = CarriedPart(1, 0, StatePart(2, 0, {"keys": np.zeros((1, 4), np.float32)}))

    class Slow:
        device, aborted = "d" * 64, ""

        def put(self, turn: Any) -> None:
            turn.export.form = "graph"
            turn.reply([part], None)

        def send(self, frame: Frame) -> None: ...

        async def drained(self, channel: object) -> None:
            await asyncio.sleep(0)  # it takes what is sent, and there is always more

        def abort(self, reason: str) -> None:
            self.aborted = reason

    slow: Any = Slow()
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(LinkError, match="all state"):
            await carrying.carry(about, slow, slow)
    assert slow.aborted


# ---- who carries what nobody asked for ------------------------------------------------------------------------------


@dataclass
class Liar:
    """A device of the household that says it carries state to a stage."""

    plane: DataPlane
    victim: Device
    deployed: Deployed
    limits: FrameLimits

    async def link(self, stage: int = 1) -> Link:
        pem = self.victim.identity.certificate_pem
        at = self.victim.id, pem, self.victim.hosts, self.victim.port
        return await self.plane.connect(*at, self.deployed.id, self.deployed.epoch, stage, carries=True)

    def frame(self, sequence: int, slot: int, start: int = 0, tokens: int = 8, width: int = 0) -> Frame:
        """Rows of the first block, full of nonsense."""
        names = sorted(self.limits.tensors)[:2]
        numbers = width or self.limits.tensors[names[0]].last_dim or 0
        rows = b"\x3f" * (4 * tokens * numbers)
        tensors = tuple(NamedTensor.of(name, "F32", (tokens, numbers), rows) for name in names)
        run = TokenRun(sequence, slot, start, tokens)
        return Frame(FrameKind.KEY_VALUE, self.deployed.id, self.deployed.epoch, 1, (run,), tensors)


@asynccontextmanager
async def lying(tmp_path: Path, deployed: Deployed, victim: Device) -> AsyncIterator[Liar]:
    """Establishes the move to `victim`, with the liar as the one who may carry."""
    liar = load_or_create(tmp_path / "liar")
    plane = DataPlane(liar, ("127.0.0.1",), 0)
    await plane.start()
    try:
        await plane.set_trusted([victim.identity.certificate_pem])
        victim.host.tell(Trust((*(one.trust for one in deployed.devices), Trusted(liar.device, liar.certificate_pem))))
        await establish(deployed, ANOTHER_DEVICE.after, [liar])
        kept = {f"graph.2.{name}": TensorLimit(("F32",), 2, 16, per_token=True) for name in ("keys", "values")}
        kinds = (FrameKind.KEY_VALUE,)
        limits = FrameLimits(deployed.id, deployed.epoch, 1, kinds, 1, 4, CONTEXT, CONTEXT, kept)
        yield Liar(plane, victim, deployed, limits)
    finally:
        await plane.close()


async def test_lies_about_state_are_refused_or_never_used(tmp_path: Path) -> None:
    """For sequences that nobody knows, in others' slots, of wrong sizes, unfinished, and after the switch."""
    async with devices(3, tmp_path, True) as made:
        deployed = await deploy(made, directory("llama"), ANOTHER_DEVICE.before, context=CONTEXT)
        wanted = [await deployed.generate(ids, ANSWER, how) for ids, how in zip(PROMPTS, SAMPLINGS, strict=True)]
        running = await started(deployed)
        async with lying(tmp_path, deployed, made[2]) as liar:
            for frame, reason in (
                (liar.frame(1, 0, width=12), "of a shape not allowed"),
                (liar.frame(1, 9), "a slot the plan does not have"),
                (replace(liar.frame(1, 0), epoch=7), "of another epoch"),
                (replace(liar.frame(1, 0), tensors=liar.frame(1, 0).tensors * 2), "a tensor twice"),
                (replace(liar.frame(1, 0), tensors=()), "rows of one block"),
            ):
                link = await liar.link()
                link.send(frame)
                await asyncio.wait_for(link.wait_closed(), WAIT_S)
                assert reason in link.lost
            with pytest.raises(LinkError, match="404"):
                await liar.link(stage=0)
            dropped = (await made[2].load()).dropped_frames
            link = await liar.link()
            for frame in (
                liar.frame(2**63, 3),  # a sequence that nobody knows, in a free slot
                *(liar.frame(sequence, slot) for slot, sequence in enumerate(running)),  # never finished
                liar.frame(running[1], 0),  # another's slot
                liar.frame(running[0], 0, start=300),  # does not follow: dropped
            ):
                link.send(frame)
            await asyncio.wait_for(link.drained(KEY_VALUE), WAIT_S)
            async with asyncio.timeout(WAIT_S):
                while (await made[2].load()).dropped_frames == dropped:  # noqa: ASYNC110 (engines tell no such event)
                    await asyncio.sleep(0.01)
            await deployed.switch()
            for _ in range(20):  # slots in use
                for slot, sequence in enumerate(running):
                    link.send(liar.frame(sequence, slot))
            for sequence, expected in zip(running, wanted, strict=True):
                ids, end = await deployed.finished(sequence)
                assert (ids, end.finish) == (expected, "length")
            link.send(liar.frame(running[0], 0))  # a slot that keeps what an ended answer left
            again = [await deployed.generate(ids, ANSWER, how) for ids, how in zip(PROMPTS, SAMPLINGS, strict=True)]
            assert again == wanted
            assert not link.closed and not any(device.links_lost() for device in made)
