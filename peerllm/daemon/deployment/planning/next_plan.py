"""A deployment's next plan, as its decider asks for it: from what is loaded where, and what moving would cost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from peerllm.daemon.decide.demand import USE, Blueprint, Moving, added_bytes, held_bytes
from peerllm.daemon.decide.deployment_life.deployment_events import MakePlan, PlanFound
from peerllm.daemon.decide.device_profiles import shown
from peerllm.daemon.decide.holdings import HouseholdHoldings
from peerllm.daemon.deployment.described_model import DescribedModel
from peerllm.daemon.deployment.establishing import Epoch
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.deployment.planning.plan_search import PlanSearch, PlanSearched
from peerllm.daemon.facade import RunOptions
from peerllm.engine.messages import Inspected
from peerllm.errors import InfeasibleError
from peerllm.planner.replan.migration import DISK_MBPS
from peerllm.planner.replan.replan_decision import ReplanDecision
from peerllm.types import DeviceId

WORTH_A_PAUSE = 0.25  # of the time that requests take, or of the tokens
MakeRoom = Callable[[Callable[[dict[DeviceId, int]], Awaitable[bool]]], Awaitable[bool]]  # as IdleModels.make_room
MAX_PLANS = 4  # found and not established, kept for the decider to choose from


class NextPlan:
    """Finds the plans of one deployment; what it learns by one serves the next."""

    def __init__(
        self,
        options: RunOptions,
        around: Surroundings,
        search: PlanSearch,
        holdings: HouseholdHoldings,
        model: DescribedModel,
    ) -> None:
        self.profiles: Mapping[str, Any] = {}  # device name: the layer times that the last plan went by
        self.search = search
        self.make_room: MakeRoom | None = None  # by other models, which then leave
        self._options, self._around = options, around
        self._holdings, self._model = holdings, model
        self._load_mbps = DISK_MBPS
        self._found: dict[int, Blueprint] = {}  # by the number of their MakePlan
        self._fetched: dict[DeviceId, frozenset[int]] = {}  # layers that devices have on their disks

    async def find(self, asked: MakePlan, running: Epoch | None, in_flight: tuple[int, ...]) -> PlanFound:
        """The plan for a model that was described; InfeasibleError says what is missing.

        Models that nobody uses make room for it where it needs that.
        """
        inspected = self._model.inspected
        assert inspected is not None
        try:
            searched = await self._searched(inspected, asked, running, in_flight)
        except InfeasibleError:
            if asked.compare or self.make_room is None or not await self.make_room(self.fits):
                raise
            searched = await self._searched(inspected, asked, running, in_flight)
        self._found[asked.number] = blueprint = searched.blueprint
        while len(self._found) > MAX_PLANS:
            del self._found[next(iter(self._found))]
        decision, work, stages = searched.decision, blueprint.workload, blueprint.plan.stages
        reason = decision.reason if decision is not None else ""
        if decision is None and running is not None:
            reason = f"making room for {work.sequences} answers at once with a context of {work.context:,} tokens"
        same = running is not None and running.blueprint.plan.stages == stages
        stay = asked.compare and same and decision is not None and decision.action == "stay"
        beside = self._beside(blueprint)
        if asked.compare and not beside and decision is not None and _share(decision, blueprint) < WORTH_A_PAUSE:
            stay, reason = True, "stay: a better plan does not fit beside this one, and gains too little for a pause"
        return PlanFound(asked.number, stages, stay, beside, reason)

    def loaded(self, nbytes: int, seconds: float) -> None:
        """Note how long a device took to load so much: the next plans expect that rate."""
        if nbytes > 0 and seconds > 0:
            self._load_mbps = min(DISK_MBPS, nbytes * 8 / 1e6 / seconds)

    def found(self, number: int) -> Blueprint:
        """The plan that answered the MakePlan of that number, one of the last few."""
        return self._found[number]

    def fetched(self, epoch: Epoch) -> None:
        """Every device of the epoch has its layers on its disk now."""
        for device in epoch.devices:
            self._fetched[device] = self._fetched.get(device, frozenset()) | epoch.layers(device)

    def contended(self) -> bool:
        """Whether memory that the household lends is promised to other models, which may be about to let go."""
        self.search.free.clear()
        found = self._around.candidates()
        return any(c.free_bytes + self._holdings.promised_bytes(d) < c.hello.lent_bytes for d, c in found.items())

    async def fits(self, freed: dict[DeviceId, int]) -> bool:
        """Whether there is a plan with so many more bytes free on devices; then they count as free."""
        inspected = self._model.inspected
        assert inspected is not None
        before, candidates = self.search.free, self._around.candidates()
        free = {d: before.get(d, one.free_bytes) for d, one in candidates.items()}
        self.search.free = {d: nbytes + freed.get(d, 0) for d, nbytes in free.items()}
        held = {d: self._holdings.promised_bytes(d) for d in self._holdings.devices}
        try:
            await self.search.plan(inspected, frozenset(), held=held)
        except InfeasibleError:
            self.search.free = before
            return False
        return True

    # ---- inside ---------------------------------------------------------------------------------------------------

    async def _searched(
        self, inspected: Inspected, asked: MakePlan, running: Epoch | None, in_flight: tuple[int, ...]
    ) -> PlanSearched:
        size = running.size if running is not None else self._holdings.size
        held, loaded = dict[DeviceId, int](), dict[DeviceId, frozenset[int]]()
        for device in self._holdings.devices:
            shards = self._holdings.shards(device, size)
            loaded[device] = self._holdings.layers(device, size)
            promised = self._holdings.promised_bytes(device)
            held[device] = promised or held_bytes(self._options, inspected, size, shards)
        moving = None
        if size != (0, 0):
            everything = frozenset(range(len(inspected.profile.layers)))
            cached = self._fetched | ({self._around.me: everything} if self._model.model_dir is not None else {})
            current = running.blueprint.plan if running is not None else None
            moving = Moving(current, size, loaded, cached, in_flight, asked.compare, self._load_mbps)
        try:
            searched = await self.search.plan(inspected, asked.without, moving, held)
        except InfeasibleError as error:
            raise await self.search.explained(inspected, error, asked.without, held) from error
        self.profiles = {
            self._around.name(device): shown(one, inspected.profile, inspected.dtype)
            for device, one in searched.candidates.items()
        }
        return searched

    def _beside(self, blueprint: Blueprint) -> bool:
        """Whether the plan fits beside all that is loaded."""
        free = self._around.candidates()
        size = blueprint.workload.sequences, blueprint.workload.context
        for device in blueprint.promises:
            room = self.search.free.get(device, free[device].free_bytes if device in free else 0)
            if added_bytes(blueprint, device, self._holdings.shards(device, size)) > room:
                return False
        return True


def _share(decision: ReplanDecision, blueprint: Blueprint) -> float:
    """The gain of moving, as a share of the work in the time in which it must pay for itself."""
    predicted = decision.plan.predicted
    if blueprint.workload.objective == "latency":
        return decision.gain / (USE.requests * predicted.request_ms + decision.gain)
    return decision.gain / (predicted.tokens_per_second * USE.ms / 1000)
