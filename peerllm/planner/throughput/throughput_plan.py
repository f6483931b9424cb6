"""EdgeShard's throughput plan (eq. 9-13), with the return hop, KV memory and batches: the most tokens per second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf

from peerllm.planner.cost.infeasibility import explain_infeasible
from peerllm.planner.cost.layer_costs import Links, stage_bytes
from peerllm.planner.cost.prediction import Lap, best_lap, predict_throughput
from peerllm.planner.routing.route_graph import Route
from peerllm.planner.throughput.batch_size_search import EXACT, BatchSizeSearch
from peerllm.planner.throughput.class_tables import ClassTables, class_tables
from peerllm.types import DeviceId, DeviceProfile, Medium, ModelProfile, Plan, Stage, Workload


def plan_throughput(
    model: ModelProfile,
    devices: Mapping[DeviceId, DeviceProfile],
    links: Links,
    source: DeviceId,
    workload: Workload,
    *,
    working_bytes: Mapping[DeviceId, int] | int = 0,
    head_on_source: bool = False,
    media: Sequence[Medium] = (),
) -> Plan:
    """Maximise b·min(1/T_bottleneck(b), m/T_ring(b)) over stages, micro-batch size b and count m, m·b <= sequences.

    Each device holds one contiguous range; the source may also hold the head. The search leaves shared media out: with
    them, the plan is the best of the rings it met, and the bound still holds. InfeasibleError names the bytes missing
    in total, or the layer that fits nowhere.
    """
    working = working_bytes if isinstance(working_bytes, Mapping) else dict.fromkeys(devices, working_bytes)
    table = class_tables(model, devices, links, source, workload, working)
    best_ring = _BestRing(model, devices, links, workload, table, media)
    best = best_ring.offer_alone(source, working.get(source, 0))
    search = BatchSizeSearch(table, workload.sequences, best_ring.offer, best)
    search.run((True,) if head_on_source else (False, True))
    if best_ring.stages is None or best_ring.lap is None:
        proven = search.bound == inf
        raise explain_infeasible(
            model, devices, source, workload, working, head_on_source=head_on_source, proven=proven
        )
    predicted = predict_throughput(model, devices, links, best_ring.stages, workload, best_ring.lap, media)
    rate = predicted.tokens_per_second
    bound = 1000 / search.bound if search.bound > 0 else inf
    optimal = rate >= bound * (1 - 10 * EXACT)
    return Plan(best_ring.stages, predicted, optimal=optimal, bound=rate if optimal else bound)


class _BestRing:
    """The best ring offered so far, judged by the cost model, shared media included."""

    def __init__(
        self,
        model: ModelProfile,
        devices: Mapping[DeviceId, DeviceProfile],
        links: Links,
        workload: Workload,
        table: ClassTables,
        media: Sequence[Medium],
    ) -> None:
        self._model, self._devices, self._links, self._workload = model, devices, links, workload
        self._table, self._media = table, media
        self.stages: tuple[Stage, ...] | None = None
        self.lap: Lap | None = None
        self._best = inf

    def offer(self, route: Route, head_home: bool) -> float:
        """Milliseconds per token at the best batch size of this ring, shared media left out."""
        return self._judge(self._table.stages([(visit.kind, visit.last) for visit in route], head_home))

    def offer_alone(self, source: DeviceId, working: int) -> float:
        """The same for the source by itself; infinite if the model does not fit there."""
        stages = (Stage(source, 0, len(self._model.layers) - 1),)
        fits = stage_bytes(self._model, stages, self._workload)[0] + working <= self._devices[source].memory_bytes
        return self._judge(stages) if fits else inf

    def _judge(self, stages: tuple[Stage, ...]) -> float:
        lap = self._best_lap(stages, self._media)
        ms_per_token = _ms_per_token(lap, self._workload)
        if ms_per_token < self._best:
            self._best, self.stages, self.lap = ms_per_token, stages, lap
        return _ms_per_token(self._best_lap(stages, ()), self._workload) if self._media else ms_per_token

    def _best_lap(self, stages: tuple[Stage, ...], media: Sequence[Medium]) -> Lap:
        return best_lap(self._model, self._devices, self._links, stages, self._workload, media)


def _ms_per_token(lap: Lap, workload: Workload) -> float:
    rate = lap.rate(workload.sequences // lap.batch)
    return 1 / rate if rate > 0 else inf
