"""What would be planned for a model now, where nothing is to be started."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from peerllm.daemon.control_messages import Holding
from peerllm.daemon.decide.demand import Blueprint
from peerllm.daemon.decide.deployment_life.deployment_events import MakePlan
from peerllm.daemon.decide.holdings import HouseholdHoldings
from peerllm.daemon.deployment.described_model import DescribedModel, ModelAtHand
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.deployment.planning.next_plan import NextPlan
from peerllm.daemon.deployment.planning.plan_search import PlanSearch
from peerllm.daemon.deployment.planning.profile_requests import ProfileRequests
from peerllm.daemon.facade import RunOptions
from peerllm.types import DeploymentId, DeviceId


class PlanTrial:
    """`say` hears what is being done."""

    def __init__(
        self,
        options: RunOptions,
        around: Surroundings,
        timings: ProfileRequests,
        at_hand: ModelAtHand | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model = DescribedModel(options, around, lambda message, _: say(message), at_hand)
        self._options, self._around = options, around
        self._search = PlanSearch(options, around, timings, say)

    async def preview(self, held: Mapping[DeviceId, int]) -> Blueprint:
        """The plan if `held` bytes were free besides."""
        inspected = await self.model.describe()
        self._search.free = {d: one.free_bytes + held.get(d, 0) for d, one in self._around.candidates().items()}
        return (await self._search.plan(inspected, frozenset())).blueprint

    async def could_go_on(self, deployment: DeploymentId, told: Mapping[DeviceId, tuple[Holding, ...]]) -> None:
        """Raises why no plan works for a deployment of which devices have loaded something, as they `told`."""
        holdings = HouseholdHoldings()
        for device, loaded in told.items():
            holdings.told(device, [one for one in loaded if one.deployment == deployment])
        await self.model.describe()
        plans = NextPlan(self._options, self._around, self._search, holdings, self.model)
        await plans.find(MakePlan(0, frozenset(), compare=False), None, ())
