"""One model's life on its source: planned, loaded, served, and planned again when a device of it is gone."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peerllm.daemon.control_messages import DeploymentState, DeploymentView, Progress, Trouble
from peerllm.daemon.decide.assignments import assignments, travelling
from peerllm.daemon.decide.demand import Blueprint, check_options
from peerllm.daemon.decide.device_profiles import shown
from peerllm.daemon.deployment.admission import Admission, ServingCapacity
from peerllm.daemon.deployment.model_files import dtype_of
from peerllm.daemon.deployment.negotiation import (
    DeviceFailedError,
    Surroundings,
    activate_all,
    assign_all,
    release_all,
    reserve_all,
)
from peerllm.daemon.deployment.plan_search import PlanSearch
from peerllm.daemon.deployment.profile_requests import ProfileRequests
from peerllm.daemon.facade import RunOptions, RunProgress, ServedModel
from peerllm.engine.messages import Inspected, TensorAt
from peerllm.errors import (
    BadInputError,
    EngineError,
    InfeasibleError,
    LinkError,
    PeerLLMError,
    RefusedError,
    UnavailableError,
)
from peerllm.planner.cost.byte_sizes import human_bytes
from peerllm.types import DeviceId

MAX_ATTEMPTS = 5  # plans tried one after another when devices refuse or leave, before the reason is given
CONTENTION_S = 0.2  # wait after the first refusal; doubles, and differs from device to device
RETRY_S = 2.0  # a waiting deployment tries again after this, doubling ...
RETRY_MOST_S = 60.0  # ... up to this, and whenever the household changes
GATHER_S = 5.0  # how long a model too large for the devices here waits for those that have not arrived
ECHO_S = 1.0  # what we let go of ourselves is told back to us as free memory within this
SETTLE_S = 0.3  # changes of the household come in bursts
UNDER_WAY = ("planning", "loading")  # states in which there is progress to tell
FETCH_SHARE = 0.8  # of a device's progress bar, where weights travel

log = logging.getLogger(__name__)


class Deployment:
    """Owned by the coordinator: `start` it, `stop` it; `outcome` waits for the way it goes."""

    def __init__(self, options: RunOptions, around: Surroundings, timings: ProfileRequests, remembered: bool) -> None:
        self.id = secrets.token_hex(16)
        self.options = options
        self.created = int(time.time())
        self.state: DeploymentState = "planning"
        self.reason = ""
        self._lacking_bytes = 0  # of the household's memory, where it waits for that
        self.epoch = 0
        self.blueprint: Blueprint | None = None
        self.model_dir: Path | None = None
        self.inspected: Inspected | None = None
        self._missing_bytes = 0  # of the model's files, on this disk
        self._form = ""  # of those files, see ModelOnDisk
        self.sequences = Admission(self.id, around.tell_engine, around.changed)
        self.watchers: list[Callable[[RunProgress], None]] = []
        self.profiles: Mapping[str, Any] = {}  # device name: the layer times that the last plan went by
        self._around, self._timings = around, timings
        self.lasting = remembered  # it has served: from then on it waits for devices instead of giving up
        self._shares: dict[DeviceId, float] = {}
        self._message = ""  # what is being done ...
        self._share = 0.0  # ... and how much of it, where no device loads
        self._asked: set[DeviceId] = set()  # devices that may hold something of ours
        self._search = PlanSearch(options, around, timings, self._planning)
        self._trouble: asyncio.Queue[str] = asyncio.Queue(1)
        self._stirred = asyncio.Event()
        self._outcomes: list[asyncio.Future[None]] = []
        self._task: asyncio.Task[None] | None = None

    # ---- what the coordinator does with it ----------------------------------------------------------------------

    def start(self) -> None:
        self._task = asyncio.create_task(self._live(), name=f"deployment {self.options.model}")

    async def outcome(self) -> None:
        """Returns when it serves; raises why it does not, now or at the end of the attempt under way."""
        if self.state == "serving":
            return
        if self._task is None or self._task.done():
            raise UnavailableError(self.reason or "the deployment has ended")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outcomes.append(future)
        self._stirred.set()
        await future

    async def stop(self) -> None:
        """End everything, here and on the other devices."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._finish("stopped", UnavailableError(f"{self.options.model} was stopped"))
        await self._let_go()

    def stir(self) -> None:
        """The household changed: a waiting deployment tries again."""
        self._stirred.set()

    def gone(self, device: DeviceId, reason: str) -> None:
        """A device is no longer reachable."""
        if device in self._asked and self.state in ("loading", "serving"):
            self._alarm(f"{self._around.name(device)} is gone ({reason})")

    def trouble(self, device: DeviceId, told: Trouble) -> None:
        """A device's part of the deployment is lost."""
        if told.epoch == self.epoch and device in self._asked and self.state in ("loading", "serving"):
            reason = f"{self._around.name(device)}: {told.reason}"
            if told.engine_died:
                self._note_failure(device, EngineError(reason))
            self._alarm(reason)

    def _note_failure(self, device: DeviceId, error: PeerLLMError) -> None:
        """The next plan makes less use of the device."""
        promised = self.blueprint.promises.get(device, 0) if self.blueprint is not None else 0
        self._search.failed(device, self.epoch, promised, error)

    def _alarm(self, reason: str) -> None:
        if not self._trouble.full():  # the first reason is the one that counts
            self._trouble.put_nowait(reason)

    def progress(self, device: DeviceId, event: Progress) -> None:
        """A device told how far it has fetched or loaded."""
        if event.epoch != self.epoch or device not in self._asked or self.state != "loading":
            return
        share = min(1.0, event.done_bytes / max(1, event.total_bytes))
        if device != self._around.me:
            share = share * FETCH_SHARE if event.phase == "fetch" else FETCH_SHARE + share * (1 - FETCH_SHARE)
        self._shares[device] = max(share, self._shares.get(device, 0.0))
        self._say("loading", self._message)

    def view(self) -> DeploymentView:
        plan = self.blueprint.plan if self.blueprint is not None else None
        inspected = self.inspected
        return DeploymentView(
            deployment=self.id,
            model=self.options.model,
            name=self.options.name,
            context=self._context(),
            message=self._message if self.state in UNDER_WAY else "",
            state=self.state,
            epoch=self.epoch,
            coordinator=self._around.me,
            stages=plan.stages if plan is not None else (),
            stage_memory_bytes=self.blueprint.stage_memory_bytes if self.blueprint is not None else (),
            predicted=asdict(plan.predicted) if plan is not None else {},
            measured=self.sequences.measured,
            reason=self.reason,
            progress=self._done(),
            slots=self.blueprint.workload.sequences if self.blueprint is not None else 0,
            schedule=self.options.schedule,
            activations=self.blueprint.activations if self.blueprint is not None else (),
            activations_wanted=self.options.activations,
            dtype=inspected.dtype if inspected is not None else "",
            quantize=inspected.quantize if inspected is not None else "",
            quantize_wanted=self.options.quantize,
            form=self._form,
            created=self.created,
            missing_bytes=self._lacking_bytes,
        )

    def served(self) -> ServedModel:
        return ServedModel(
            deployment=self.id,
            name=self.options.name,
            model=self.options.model,
            state=self.state,
            reason=self.reason,
            created=self.created,
            model_dir=self.model_dir,
            context=self._context(),
            stop_ids=self.inspected.stop_ids if self.inspected is not None else (),
            message=self._message if self.state in UNDER_WAY else "",
            progress=self._done(),
            missing_bytes=self._lacking_bytes,
        )

    def _context(self) -> int:
        return self.blueprint.workload.context if self.blueprint is not None else 0

    def _done(self) -> float:
        """How much of a download or of loading is done, 0 to 1."""
        if self.state == "serving":
            return 1.0
        return sum(self._shares.values()) / len(self._shares) if self._shares else self._share

    async def preview(self, held: Mapping[DeviceId, int]) -> Blueprint:
        """What would be planned now if `held` bytes were free besides; the deployment is not to be started."""
        await self._prepare()
        assert self.inspected is not None
        self._search.free = {d: one.free_bytes + held.get(d, 0) for d, one in self._around.candidates().items()}
        _, blueprint = await self._search.plan(self.inspected, set())
        return blueprint

    def own_tensors(self) -> dict[str, TensorAt]:
        """Where the tensors lie on this device."""
        layers = self.inspected.tensors if self.inspected is not None else ()
        return {tensor.name: tensor for layer in layers for tensor in layer}

    # ---- its life -------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        tries = 0
        try:
            while True:
                try:
                    await self._prepare()
                    await self._establish()
                except (InfeasibleError, RefusedError, LinkError, UnavailableError, EngineError) as error:
                    await self._let_go()
                    if not self.lasting:
                        raise
                    self._become("waiting", str(error), getattr(error, "missing_bytes", 0))
                    self._resolve(error)
                    tries += 1
                    await self._pause(min(RETRY_MOST_S, RETRY_S * 2.0 ** min(tries - 1, 8)))
                    continue
                tries, self.lasting = 0, True
                self._serve()
                reason = await self._trouble.get()
                log.warning("%s stopped serving: %s", self.options.model, reason)
                self.sequences.interrupt(reason)
                self._become("waiting", reason)
                await self._let_go()
        except PeerLLMError as error:
            await self._let_go()
            self._finish("failed", error)
        except Exception as error:
            log.exception("deployment %s", self.options.model)
            await self._let_go()
            self._finish("failed", EngineError(f"{self.options.model}: {type(error).__name__}: {error}"))

    async def _prepare(self) -> None:
        """Find out what the model holds, once; what the hub tells of it suffices."""
        if self.inspected is not None:
            return
        self._say("planning", f"looking for {self.options.model}")
        async with self._around.looked_up(self.options.model, self._planning) as found:
            self.inspected = await self._read(found.directory)
        self._missing_bytes, self._form = found.missing_bytes, found.form
        if not found.missing_bytes:
            self.model_dir = found.directory

    def _planning(self, message: str, share: float | None = None) -> None:
        self._say("planning", message, share)

    async def _read(self, directory: Path) -> Inspected:
        options = self.options
        self._say("planning", f"reading {options.model}")
        inspected = await self._around.inspect(directory, dtype_of(options.model, options.dtype), options.quantize)
        check_options(options, inspected)
        return inspected

    async def _download(self) -> None:
        """Fetch the weights, for which there is a plan."""
        model, size = self.options.model, human_bytes(self._missing_bytes)

        def told(share: float) -> None:
            self._say("planning", f"downloading {model}, {size}: {share:.0%}", share)

        told(0.0)
        directory = await self._around.resolve(model, told, self._missing_bytes)
        self.inspected = await self._read(directory)
        self.model_dir = directory

    async def _establish(self) -> None:
        """Plan and load until a plan stands; the last reason is raised after MAX_ATTEMPTS."""
        assert self.inspected is not None
        failure: PeerLLMError = UnavailableError("no plan was tried")
        absent: set[DeviceId] = set()
        self._stirred.clear()
        until = asyncio.get_running_loop().time() + (0.0 if self.lasting else GATHER_S)
        attempt = 0
        while attempt < MAX_ATTEMPTS:
            if attempt:
                spread = 1 + int(self._around.me[:8], 16) / 2**32
                await asyncio.sleep(CONTENTION_S * 2 ** (attempt - 1) * spread)
            try:
                await self._attempt(absent)
                return
            except InfeasibleError as error:
                failure = await self._search.explained(self.inspected, error, absent)
                if await self._gathered(until):
                    continue
                if not self._contended():
                    break
                self._search.free.clear()  # who stands in the way may be about to let go
            except (RefusedError, LinkError, UnavailableError, EngineError) as error:
                failure = error
                await self._let_go()  # what the others have loaded for this plan would stand in the way of the next
            attempt += 1
        raise failure

    async def _gathered(self, until: float) -> bool:
        """Too little memory, but devices of the household are not here yet: whether something changed in time."""
        if not self._around.absent():
            return False
        self._stirred.clear()
        try:
            async with asyncio.timeout_at(until):
                await self._stirred.wait()
        except TimeoutError:
            return False
        return True

    def _contended(self) -> bool:
        """Whether memory that the household lends is promised elsewhere."""
        return any(c.free_bytes < c.hello.lent_bytes for c in self._around.candidates().values())

    async def _attempt(self, absent: set[DeviceId]) -> None:
        assert self.inspected is not None
        around = self._around
        self._become("planning", "")
        candidates, blueprint = await self._search.plan(self.inspected, absent)
        if self.model_dir is None:
            await self._download()
            candidates, blueprint = await self._search.plan(self.inspected, absent)  # much may have changed meanwhile
        inspected = self.inspected
        self.profiles = {
            around.name(device): shown(one, inspected.profile, inspected.dtype) for device, one in candidates.items()
        }
        moving = travelling(blueprint, inspected, around.me)
        hashes = await around.hashes(
            moving, lambda share: self._say("planning", f"hashing the weights that will travel: {share:.0%}", share)
        )
        self.epoch += 1
        self._asked |= set(blueprint.promises)
        refused = await reserve_all(around, self.id, self.epoch, blueprint.promises)
        if refused is not None:
            device, answer = refused
            await self._let_go()
            failure = RefusedError(f"{around.name(device)} cannot take part: {answer.reason}")
            if answer.error == "LinkError":
                absent.add(device)
            elif answer.free_bytes < blueprint.promises[device]:
                self._search.free[device] = answer.free_bytes
            else:  # it has room and refuses all the same
                self._note_failure(device, UnavailableError(str(failure)))
            raise failure
        self.blueprint, self._trouble = blueprint, asyncio.Queue(1)
        self._shares = dict.fromkeys(blueprint.promises, 0.0)
        self._become("loading", "")
        self._say("loading", f"loading on {', '.join(around.name(device) for device in blueprint.plan.devices)}")
        hub = await around.hub_places(self.own_tensors().values())
        work = assignments(self.id, self.epoch, blueprint, inspected, hashes=hashes, address=around.address, hub=hub)
        try:
            await self._unless_trouble(assign_all(around, work))
            self._say("loading", "connecting")
            await self._unless_trouble(activate_all(around, self.id, self.epoch, blueprint.plan.devices))
        except DeviceFailedError as failed:
            if not isinstance(failed.error, LinkError):  # else it is away, and no candidate until it is back
                self._note_failure(failed.device, failed.error)
            if failed.device != around.me and isinstance(failed.error, BadInputError):
                raise EngineError(str(failed)) from failed  # another device may be able to
            raise failed.error from failed

    async def _unless_trouble(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for `work`, or raise UnavailableError as soon as a device of the plan is in trouble."""
        doing = asyncio.create_task(work, name=f"establish {self.options.model}")
        alarm = asyncio.create_task(self._trouble.get(), name=f"trouble of {self.options.model}")
        try:
            await asyncio.wait({doing, alarm}, return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                doing.result()
            if alarm.done():  # also where both came at once: nobody else would hear of it
                raise UnavailableError(alarm.result())
        finally:
            for task in (doing, alarm):
                task.cancel()
            await asyncio.wait({doing, alarm})
            if not doing.cancelled():
                doing.exception()  # seen, also where the trouble came first

    def _serve(self) -> None:
        assert self.blueprint is not None
        assert self.inspected is not None
        work, less = self.blueprint.workload, self._search.served(self.blueprint.workload)
        self._search.free.clear()
        if less:
            log.warning("%s: %s", self.options.name, less)
            self._say("serving", less)
        self._become("serving", less)
        self._say("serving", f"{self.options.name} is served")
        vocabulary, stop_ids = self.inspected.vocabulary, self.inspected.stop_ids
        self.sequences.open(ServingCapacity(work.sequences, work.context, vocabulary, stop_ids))
        self._resolve(None)

    async def _let_go(self) -> None:
        """Release everything that this deployment holds on any device."""
        asked = set(self._asked)
        if asked:  # forgotten only afterwards: who cancels this midway starts it again
            self._search.free |= await release_all(self._around, self.id, self.epoch, asked)
            self._asked -= asked
        self._shares.clear()

    async def _pause(self, seconds: float) -> None:
        """Wait for the household to change, `seconds` at most."""
        away = self._around.absent()
        await asyncio.sleep(min(ECHO_S, seconds))
        if self._around.absent() == away:
            self._stirred.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._stirred.wait()
            await asyncio.sleep(SETTLE_S)
        except TimeoutError:
            pass
        self._search.free.clear()

    # ---- telling --------------------------------------------------------------------------------------------------

    def _become(self, state: DeploymentState, reason: str, lacking_bytes: int = 0) -> None:
        self.state, self.reason, self._lacking_bytes = state, reason, lacking_bytes
        if state in ("waiting", "planning"):
            self.blueprint = None
        self._around.changed()

    def _finish(self, state: DeploymentState, error: PeerLLMError) -> None:
        self.state, self.reason, self.blueprint = state, str(error), None
        self.sequences.close(str(error))
        self._resolve(error)
        self._around.changed()

    def _resolve(self, error: PeerLLMError | None) -> None:
        waiting, self._outcomes = self._outcomes, []
        for future in waiting:
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

    def _say(self, state: str, message: str, share: float | None = None) -> None:
        self._message, self._share = message, share or 0.0
        shares = {self._around.name(device): value for device, value in self._shares.items()}
        if share is not None:
            shares = {self._around.name(self._around.me): share}
        for watcher in self.watchers:
            watcher(RunProgress(state, message, shares))
        self._around.changed()


def same_demand(a: RunOptions, b: RunOptions) -> bool:
    """Whether a deployment that runs with `a` satisfies `b`; any value satisfies an option that `b` leaves open."""
    return (
        a.objective == b.objective
        and a.private == b.private
        and b.dtype in ("auto", a.dtype)
        and b.quantize in ("auto", a.quantize)
        and a.schedule == b.schedule
        and b.activations in ("auto", a.activations)
        and b.context in (None, a.context)
        and b.slots in (None, a.slots)
        and b.prompt_chunk in (None, a.prompt_chunk)
        and b.name in ("", a.name)
    )


def refuse_other(a: RunOptions, b: RunOptions) -> None:
    """BadInputError where a model already runs with other options."""
    if not same_demand(a, b):
        raise BadInputError(f"{a.model} already runs as {a.name} with other options; `peerllm stop {a.name}` first")
