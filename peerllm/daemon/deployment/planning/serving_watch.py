"""While a deployment serves: whether conditions are other than planned for, and whether answers stand still."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from peerllm.daemon.background_tasks import LatestTasks
from peerllm.daemon.decide.deployment_life.deployment_events import ConditionsChanged, LinksLost
from peerllm.daemon.deployment.establishing import Epoch
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.deployment.planning.conditions_reader import read_conditions
from peerllm.daemon.deployment.planning.plan_search import PlanSearch
from peerllm.daemon.deployment.sequences.admission import Admission
from peerllm.types import DeploymentId

STALL_LOOK_S = 5.0  # how often it is looked whether answers are stalled


class ServingWatch:
    """`serving` gives the epoch that serves, None while none does; `feed` hears what is found."""

    def __init__(
        self,
        deployment: DeploymentId,
        around: Surroundings,
        search: PlanSearch,
        sequences: Admission,
        serving: Callable[[], Epoch | None],
        feed: Callable[[ConditionsChanged | LinksLost], None],
    ) -> None:
        self._deployment, self._around, self._search = deployment, around, search
        self._sequences, self._serving, self._feed = sequences, serving, feed

    def start(self, work: LatestTasks) -> None:
        """Until `work` is closed."""
        work.start("watch", self._watch_conditions())
        work.start("watch for stalls", self._watch_stalls())

    async def _watch_conditions(self) -> None:
        await read_conditions(
            self._around,
            self._deployment,
            lambda: self._serving() if self._sequences.running else None,
            self._search.slower,
            lambda why: self._feed(ConditionsChanged(why)),
        )

    async def _watch_stalls(self) -> None:
        """Have the links made anew where an answer gets no tokens: a stage forgot it, or an engine stands still."""
        while True:
            await asyncio.sleep(STALL_LOOK_S)
            epoch = self._serving()
            if epoch is not None and self._sequences.stalled():
                self._feed(LinksLost(self._around.me, epoch.number, "an answer gets no more tokens"))
