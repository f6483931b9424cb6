"""A small household of engines for tests: real processes (or threads), real identities and TLS, on loopback."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peerllm.daemon.engine_link.engine_host import EngineHost
from peerllm.engine.messages import (
    Cancel,
    Configure,
    Configured,
    Connect,
    Constraint,
    EngineLoad,
    FromEngine,
    Hop,
    Inspect,
    Inspected,
    LinkLost,
    LoadProgress,
    LoadStage,
    QueryLoad,
    Submit,
    Switch,
    Tokens,
    Trust,
    Trusted,
    Unload,
)
from peerllm.transport.identity import load_or_create
from peerllm.types import Pooling, Sampling

WAIT_S = 60.0  # two cores are shared by all

GREEDY = Sampling()
_sequences = itertools.count(1)  # of all deployments, so that an engine's events can be told apart


class Device:
    """One device: an identity, an engine host, and all that its engine said."""

    def __init__(self, directory: Path, in_process: bool = False, hosts: tuple[str, ...] = ("127.0.0.1",)) -> None:
        self.identity = load_or_create(directory)
        self.id = self.identity.device
        self.hosts = hosts
        self.trusted: tuple[Trusted, ...] = ()
        self.port = 0
        self.events: list[FromEngine] = []
        self.lost: list[str] = []
        self.ready: list[Configured] = []
        self.changed = asyncio.Condition()
        self._waking: set[asyncio.Future[None]] = set()
        self.host = EngineHost(self.configure, self._event, self._lost, self._ready, in_process=in_process, threads=1)

    @property
    def trust(self) -> Trusted:
        return Trusted(self.id, self.identity.certificate_pem)

    def configure(self, request: int) -> Configure:
        paths = str(self.identity.certificate_path), str(self.identity.key_path)
        return Configure(request, self.id, *paths, self.hosts, self.port, 1, self.trusted)

    async def start(self, trusted: Sequence[Trusted] = ()) -> None:
        self.trusted = tuple(trusted)
        configured = await asyncio.wait_for(self.host.start(), WAIT_S)
        self.port = configured.port

    async def until(self, predicate, timeout_s: float = WAIT_S) -> None:
        async with asyncio.timeout(timeout_s), self.changed:
            await self.changed.wait_for(predicate)

    async def load(self) -> EngineLoad:
        return await self.host.ask(QueryLoad(self.host.next_request()), WAIT_S)

    def tokens(self, sequence: int) -> tuple[list[int], Tokens | None]:
        """(ids so far, the message that ended it); checks that positions neither repeat nor skip."""
        ids: list[int] = []
        for event in self.events:
            if isinstance(event, Tokens) and event.sequence == sequence:
                assert event.start == len(ids), event
                ids += event.ids
                if event.finish is not None:
                    return ids, event
        return ids, None

    def links_lost(self) -> list[LinkLost]:
        return [event for event in self.events if isinstance(event, LinkLost)]

    def progress(self) -> list[LoadProgress]:
        return [event for event in self.events if isinstance(event, LoadProgress)]

    def _event(self, event: FromEngine) -> None:
        self.events.append(event)
        self._notify()

    def _lost(self, why: str) -> None:
        self.lost.append(why)
        self._notify()

    def _ready(self, configured: Configured) -> None:
        self.ready.append(configured)
        self.port = configured.port
        self._notify()

    def _notify(self) -> None:
        async def wake() -> None:
            async with self.changed:
                self.changed.notify_all()

        self._waking.add(task := asyncio.ensure_future(wake()))
        task.add_done_callback(self._waking.discard)


@asynccontextmanager
async def devices(count: int, directory: Path, in_process: bool = False) -> AsyncIterator[list[Device]]:
    """Started devices that trust each other."""
    async with AsyncExitStack() as stack:
        made = [Device(directory / f"device{number}", in_process) for number in range(count)]
        for device in made:
            stack.push_async_callback(device.host.close)
        trusted = [device.trust for device in made]
        await asyncio.gather(*(device.start(trusted) for device in made))
        yield made


Cut = tuple[tuple[int, int, int], ...]  # (device, first layer, last layer)


@dataclass
class Deployed:
    """A deployment on some devices, whose source is the first."""

    devices: list[Device]
    inspected: Inspected
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    epoch: int = 1

    @property
    def source(self) -> Device:
        return self.devices[0]

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        stop_ids: Sequence[int] = (),
        client: str = "",
        answer: Sequence[int] = (),
        constraint: Constraint | None = None,
        pool: Pooling | None = None,
        logprobs: int | None = None,
    ) -> int:
        sequence, ids = next(_sequences), tuple(prompt)
        how = tuple(stop_ids), sampling, client, tuple(answer), constraint, pool, logprobs
        self.source.host.tell(Submit(self.id, sequence, ids, max_tokens, *how))
        return sequence

    def said(self, sequence: int) -> list[int]:
        """The ids that were told so far of an answer, whichever its first one was."""
        events = [one for one in self.source.events if isinstance(one, Tokens) and one.sequence == sequence]
        return [token for event in events for token in event.ids]

    async def ended(self, sequence: int) -> Tokens:
        """The message that ends an answer."""

        def end() -> Tokens | None:
            events = (one for one in self.source.events if isinstance(one, Tokens) and one.sequence == sequence)
            return next((one for one in events if one.finish is not None), None)

        await self.source.until(lambda: end() is not None)
        found = end()
        assert found is not None
        return found

    async def finished(self, sequence: int, timeout_s: float = WAIT_S) -> tuple[list[int], Tokens]:
        await self.source.until(lambda: self.source.tokens(sequence)[1] is not None, timeout_s)
        ids, end = self.source.tokens(sequence)
        assert end is not None
        return ids, end

    def reused(self, sequence: int) -> int:
        """Tokens of a prompt that were not computed anew; known once its first token is there."""
        told = (event for event in self.source.events if isinstance(event, Tokens) and event.sequence == sequence)
        return next(told).reused

    async def some(self, sequence: int, count: int) -> None:
        """Until that many tokens are there."""
        await self.source.until(lambda: len(self.source.tokens(sequence)[0]) >= count)

    async def generate(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
        ids, end = await self.finished(self.submit(prompt, max_tokens, sampling))
        assert end.finish == "length", end
        return ids

    def cancel(self, sequence: int) -> None:
        self.source.host.tell(Cancel(self.id, sequence))

    async def unload(self, epoch: int | None = None) -> None:
        await asyncio.gather(
            *(device.host.ask(Unload(device.host.next_request(), self.id, epoch), WAIT_S) for device in self.devices)
        )

    async def switch(self) -> None:
        """Sequences change to the last epoch that was loaded."""
        await self.source.host.ask(Switch(self.source.host.next_request(), self.id, self.epoch), WAIT_S)

    async def slots_used(self) -> dict[tuple[int, int], int]:
        """By (device, stage)."""
        return {
            (number, stage): used
            for number, device in enumerate(self.devices)
            for deployment, stage, used in (await device.load()).stages
            if deployment == self.id
        }

    async def until_free(self) -> None:
        """Until no stage holds a slot: RELEASE follows the last token, it does not wait for anybody."""
        async with asyncio.timeout(WAIT_S):
            while any((await self.slots_used()).values()):  # noqa: ASYNC110 (engines tell no such event)
                await asyncio.sleep(0.01)


async def inspect(device: Device, model: Path, dtype: str = "auto", quantize: str = "") -> Inspected:
    return await device.host.ask(Inspect(device.host.next_request(), str(model), dtype, quantize), WAIT_S)


def stage_specs(
    made: list[Device], inspected: Inspected, cut: Cut, deployed: Deployed, **options: Any
) -> list[tuple[Device, LoadStage]]:
    """The stages of a cut as their devices are asked to load them."""
    settings = {"slots": 4, "context": 64, "chunk": 8, "micro_batch": 4, "micro_batches": 2} | options
    forms = (*settings.get("activations", ["exact"] * (len(cut) - 1)), "exact")  # from each stage to the next
    specs = []
    head_device = made[cut[-1][0]]
    for stage, (number, first, last) in enumerate(cut):
        device = made[number]
        before = made[cut[stage - 1][0]] if stage else head_device
        after = made[cut[stage + 1][0]] if stage + 1 < len(cut) else made[0]
        tensors = {tensor.name: tensor for layer in inspected.tensors[first : last + 1] for tensor in layer}
        specs.append(
            (
                device,
                LoadStage(
                    device.host.next_request(),
                    deployed.id,
                    deployed.epoch,
                    stage,
                    len(cut),
                    first,
                    last,
                    inspected.config,
                    tuple(tensors.values()),
                    inspected.dtype,
                    settings["slots"],
                    settings["context"],
                    settings["chunk"],
                    settings["micro_batch"],
                    upstream=before.id if stage and before is not device else None,
                    downstream=Hop(after.id, after.hosts, after.port, stage + 1) if after is not device else None,
                    head_device=head_device.id,
                    micro_batches=settings["micro_batches"],
                    schedule=settings.get("schedule", "no-bubble"),
                    upstream_activations=forms[stage - 1] if stage else "exact",
                    downstream_activations=forms[stage],
                    quantize=inspected.quantize,
                ),
            )
        )
    return specs


async def deploy(made: list[Device], model: Path, cut: Cut, **options: Any) -> Deployed:
    """Load and connect a cut of a model; the first stage is on the first device."""
    inspected = await inspect(made[0], model, options.pop("dtype", "auto"))
    deployed = Deployed(made, inspected)
    await redeploy(deployed, cut, **options)
    return deployed


async def redeploy(deployed: Deployed, cut: Cut, **options: Any) -> None:
    specs = stage_specs(deployed.devices, deployed.inspected, cut, deployed, **options)
    await asyncio.gather(*(device.host.ask(spec, WAIT_S) for device, spec in specs))
    await asyncio.gather(
        *(
            device.host.ask(Connect(device.host.next_request(), deployed.id, deployed.epoch), WAIT_S)
            for device in {id(device): device for device, _ in specs}.values()
        )
    )


async def retrust(made: list[Device], trusted: Sequence[Device]) -> None:
    for device in made:
        device.host.tell(Trust(tuple(one.trust for one in trusted)))
