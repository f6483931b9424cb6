"""The links of the stages here: who feeds one is expected, who is fed by one is dialled.

On the loop only, but for frames that come in: the compute thread takes those itself while it waits for them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from peerllm.engine.base import Shard, StateForms
from peerllm.engine.messages import (
    CarryState,
    Configure,
    Connect,
    FromEngine,
    Hop,
    LinkTimed,
    LinkTraffic,
    LoadStage,
    TimeLink,
    Trusted,
)
from peerllm.engine.process.carrying import carry
from peerllm.engine.process.compute import Arrived, Echoed, Event, HeadLinked, Linked, Lost, StateCame
from peerllm.engine.process.inbox import Inbox
from peerllm.engine.schedule.source_sequences import window_tokens
from peerllm.engine.wire.parcels import from_frame, head_limits, source_limits, stage_limits
from peerllm.engine.wire.state_frames import from_state_frame, state_limits
from peerllm.errors import AuthenticationError, BadInputError, LinkError, RefusedError
from peerllm.transport.identity import load
from peerllm.transport.links.channels import FRAME_COST_BYTES, KEY_VALUE, STEP, Delivery, Inlet
from peerllm.transport.links.data_plane import DataPlane
from peerllm.transport.links.echo import MAX_ECHO_BYTES
from peerllm.transport.links.link import Link
from peerllm.transport.links.observer import LinkObserver
from peerllm.types import DeploymentId, DeviceId

CONNECT_TIMEOUT_S = 5.0  # the next engine may not expect us yet
CONNECT_PAUSE_S = 0.1  # between two tries
REPORT_S = 1.0  # between two reports of how long frames take
MAX_REPORTED = 256  # timings in one; each link gives a few a second, the oldest give way
SMALL_FRAME_BYTES = 1024  # no frame without hidden states has more
MAX_SIZES = 64  # frames of one TimeLink


def most_under_way(spec: LoadStage, hidden_size: int) -> int:
    """Bytes of all frames that a plan lets wait on the link from `spec`'s stage, as its queue counts them.

    They are the prompts' window, a step of each sequence, and as many OPENs and RELEASEs.
    """
    tokens = window_tokens(spec.stages, spec.chunk) + spec.slots
    frames = tokens + 2 * spec.slots
    exact = stage_limits(replace(spec, upstream_activations="exact"), hidden_size)
    all_in_one = replace(exact, max_tokens=tokens, max_runs=frames, max_bytes=0)
    return all_in_one.largest() + frames * (FRAME_COST_BYTES + SMALL_FRAME_BYTES)


@dataclass(slots=True)
class _Known:
    """The stages here of one epoch of a deployment."""

    hidden_size: int = 0  # numbers in the longest row of a token that may come or go
    specs: dict[int, LoadStage] = field(default_factory=dict)
    links: dict[int, Link] = field(default_factory=dict)  # by the stage that sends


class DataLinks:
    """The data plane of one engine."""

    def __init__(
        self, configure: Configure, inbox: Inbox[Event], tell: Callable[[FromEngine], None], observer: LinkObserver
    ) -> None:
        self._device, self._inbox, self._tell = configure.device, inbox, tell
        identity = load(configure.certificate_path, configure.key_path)
        self._plane = DataPlane(identity, configure.hosts, configure.port, self._lost, self._echoed, observer)
        self._certificates: dict[DeviceId, str] = {}
        self._known: dict[DeploymentId, dict[int, _Known]] = {}  # by epoch
        self._loop = asyncio.get_running_loop()
        inbox.poller = self._plane.poller
        self._timings: deque[tuple[DeviceId, int, float]] = deque(maxlen=MAX_REPORTED)
        self._reporting: asyncio.TimerHandle | None = None

    @property
    def port(self) -> int:
        return self._plane.port

    async def start(self, trusted: Iterable[Trusted]) -> None:
        """BadInputError if the port is in use."""
        await self._plane.start()
        await self.trust(trusted)

    async def trust(self, trusted: Iterable[Trusted]) -> None:
        self._certificates = {one.device: one.certificate_pem for one in trusted}
        await self._plane.set_trusted(self._certificates.values())

    def expect(self, spec: LoadStage, hidden_size: int, fresh: Sequence[Shard] = ()) -> None:
        """A stage is loaded: whoever feeds it may dial. Links of other epochs stand.

        So may those who have what sequences keep in the stage's layers that were not here before: in `fresh`.
        """
        epochs = self._known.setdefault(spec.deployment, {})
        if any(epoch > spec.epoch for epoch in epochs):
            raise RefusedError(f"epoch {max(epochs)} is loaded here; {spec.epoch} is past")
        known = epochs.setdefault(spec.epoch, _Known())
        known.hidden_size = max(known.hidden_size, hidden_size)
        known.specs[spec.stage] = spec
        if spec.upstream not in (None, self._device):
            self._plane.expect(spec.upstream, Inlet(STEP, stage_limits(spec, hidden_size), self._deliver))
        if spec.stage == 0 and spec.head_device != self._device:
            inlet = Inlet(STEP, source_limits(spec, hidden_size), self._deliver)
            self._plane.expect(spec.head_device, inlet, accepted=self._head_linked)

        kept = [shard.state_forms(spec.first_layer, spec.last_layer) for shard in fresh if spec.state_from]
        forms = StateForms(*({block: arrays for one in some for block, arrays in one.items()}
                             for some in ([one.tokens for one in kept], [one.fixed for one in kept])))  # fmt: skip
        if forms.tokens or forms.fixed:
            inlet = Inlet(KEY_VALUE, state_limits(spec, fresh[0].form, forms), self._deliver_state)
            for device in set(spec.state_from) - {self._device}:
                self._plane.expect(device, inlet, carries=True)

    async def carry(self, message: CarryState) -> None:
        """Until another device's stage has what CarryState asks for. LinkError, AuthenticationError or RefusedError.

        On this device sequences take along what they need when they enter the epoch.
        """
        if message.to.device != self._device:
            link = await self._dial(message.to, message.deployment, message.to_epoch, carries=True)
            await carry(message, self._inbox, link)

    async def connect(self, message: Connect) -> Linked:
        """Links to all next stages on other devices; those that stand are kept. LinkError if one does not come up."""
        known = self._find(message.deployment, message.epoch)
        if known is None:
            raise RefusedError(f"epoch {message.epoch} of this deployment is not loaded here")
        wanted = {
            stage: (spec, spec.downstream, most_under_way(spec, known.hidden_size))
            for stage, spec in known.specs.items()
            if spec.downstream is not None and (stage not in known.links or known.links[stage].closed)
        }
        dials = [
            asyncio.create_task(
                self._dial(
                    hop,
                    message.deployment,
                    message.epoch,
                    partial(self._timed, hop.device),
                    {STEP: bound},
                    [Inlet(STEP, head_limits(spec), self._deliver)] if spec.stage == spec.stages - 1 else (),
                ),
                name=f"dial stage {hop.stage} {message.deployment[:8]}",
            )
            for spec, hop, bound in wanted.values()
        ]
        try:
            links = await asyncio.gather(*dials)
        except (LinkError, AuthenticationError):
            for dial in dials:
                dial.cancel()
            for link in await asyncio.gather(*dials, return_exceptions=True):
                if isinstance(link, Link):
                    link.close()
            raise
        if self._find(message.deployment, message.epoch) is not known:
            for link in links:
                link.close()
            raise RefusedError("the deployment was stopped while it was being connected")
        known.links.update(zip(wanted, links, strict=True))
        return Linked(message.request, message.deployment, message.epoch, dict(known.links))

    async def time(self, message: TimeLink) -> LinkTimed:
        """LinkError, AuthenticationError or BadInputError if that cannot be done."""
        pem = self._certificates.get(message.device)
        if pem is None:
            raise AuthenticationError(f"device {message.device[:8]} is not of this household")
        if len(message.sizes) > MAX_SIZES or not all(0 < size <= MAX_ECHO_BYTES for size in message.sizes):
            raise BadInputError(f"at most {MAX_SIZES} frames of at most {MAX_ECHO_BYTES} bytes")
        frames = await self._plane.echo(message.device, pem, message.hosts, message.port, message.sizes)
        return LinkTimed(message.request, tuple(frames))

    async def forget(self, deployment: DeploymentId, epoch: int | None = None, only: bool = False) -> None:
        """End all links of a deployment, in order; or those of its epochs up to `epoch`, or of that one alone."""
        epochs = self._known.get(deployment, {})
        for one in [one for one in epochs if epoch is None or (one == epoch if only else one <= epoch)]:
            del epochs[one]
        if not epochs:
            self._known.pop(deployment, None)
        await self._plane.forget(deployment, epoch, only)

    async def close(self) -> None:
        if self._reporting is not None:
            self._reporting.cancel()
        self._known.clear()
        await self._plane.close()

    async def _dial(self, hop: Hop, deployment: DeploymentId, epoch: int, *how: Any, **more: Any) -> Link:
        deadline = asyncio.get_running_loop().time() + CONNECT_TIMEOUT_S
        while True:
            pem = self._certificates.get(hop.device)
            try:
                if pem is None:
                    raise AuthenticationError(f"device {hop.device[:8]} is not of this household")
                at = hop.device, pem, hop.hosts, hop.port
                return await self._plane.connect(*at, deployment, epoch, hop.stage, *how, **more)
            except (LinkError, AuthenticationError):
                if asyncio.get_running_loop().time() >= deadline:
                    raise
            await asyncio.sleep(CONNECT_PAUSE_S)

    def _head_linked(self, link: Link) -> None:
        self._inbox.put(HeadLinked(link), always=True)

    def _deliver(self, delivery: Delivery) -> None:
        """Into the inbox, on whichever thread reads; the channel's credit bounds how many frames wait there."""
        self._inbox.put(Arrived(delivery, from_frame(delivery.frame)), always=True)

    def _deliver_state(self, delivery: Delivery) -> None:
        """On the loop; as `_deliver`."""
        self._inbox.put(StateCame(delivery, from_state_frame(delivery.frame)), always=True)

    def _echoed(self, delivery: Delivery) -> None:
        """A frame that times a link wakes a compute thread that waits, as a step's does, and is dropped."""
        delivery.taken()
        if self._inbox.empty:
            self._inbox.put(Echoed())
            self._loop.call_soon_threadsafe(self._report_soon)

    def _timed(self, device: DeviceId, nbytes: int, seconds: float) -> None:
        if nbytes:
            self._timings.append((device, nbytes, seconds))
            self._loop.call_soon_threadsafe(self._report_soon)

    def _report_soon(self) -> None:
        if self._reporting is None:
            self._reporting = self._loop.call_later(REPORT_S, self._report)

    def _report(self) -> None:
        self._reporting = None
        frames = tuple(self._timings)
        self._timings.clear()
        self._tell(LinkTraffic(frames, self._inbox.handover_s))

    def _lost(self, link: Link) -> None:
        known = self._find(link.deployment, link.epoch)
        if known is None:
            return
        dialled = [stage for stage, own in known.links.items() if own is link]
        for stage in dialled:
            del known.links[stage]
        ingress = None if dialled else link.stage
        self._inbox.put(Lost(link.deployment, link.epoch, link.device, ingress, link.lost), always=True)

    def _find(self, deployment: DeploymentId, epoch: int) -> _Known | None:
        return self._known.get(deployment, {}).get(epoch)
