"""The result of a simulated run: every span of work, and the rates, utilisations and waits that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Literal

from peerllm.planner.cost.prediction import Lap
from peerllm.types import ScheduleName

SpanKind = Literal["compute", "transfer", "air"]
SETTLING = 0.25  # first share of the time when all groups decode, left out of the steady rate: queues still form


@dataclass(frozen=True, slots=True)
class SimulatedSpan:
    """One resource doing one thing. `resource` is a device's name, "a to b" for a link, or a shared medium's name.

    "air" is the bytes part of a transfer, which also has a span on its link.
    """

    resource: str
    kind: SpanKind
    stage: int  # the stage that computes or sends
    group: int
    sequence: int | None  # whose prompt; None for a group's decode step
    step: int  # 0 is the prompt
    ready_ms: float  # when it joined the resource's queue
    start_ms: float
    end_ms: float


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """All spans in the order of their start, in milliseconds since the start of the run."""

    schedule: ScheduleName
    micro_batch: int
    prefill: bool
    events: tuple[SimulatedSpan, ...]
    returns: tuple[tuple[float, ...], ...]  # [group][step]: when the tokens of that step were back (0 without prefill)

    @property
    def makespan_ms(self) -> float:
        return max(times[-1] for times in self.returns)

    @property
    def tokens(self) -> int:
        return self.micro_batch * sum(len(times) - (not self.prefill) for times in self.returns)

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run, prompts included."""
        return 1000 * self.tokens / self.makespan_ms if self.makespan_ms else inf

    @property
    def time_to_first_token_ms(self) -> tuple[float, ...]:
        """By group, when the last of its sequences had its first token; empty without prefill."""
        return tuple(times[0] for times in self.returns) if self.prefill else ()

    @property
    def step_ms(self) -> float | None:
        """Mean time from one token of a group to its next, waiting included; None without a step."""
        steps = sum(len(times) - 1 for times in self.returns)
        return sum(times[-1] - times[0] for times in self.returns) / steps if steps else None

    @property
    def steady_tokens_per_second(self) -> float | None:
        """Decode rate while all groups decode and queues have settled; None if that is shorter than a step.

        The sum of each group's own rate, from its first to its last token in that time, so that no partial step counts.
        """
        start, end = max(times[0] for times in self.returns), min(times[-1] for times in self.returns)
        start += SETTLING * (end - start)
        total = 0.0
        for times in self.returns:
            within = [at for at in times if start <= at <= end]
            if len(within) < 2:
                return None
            took = within[-1] - within[0]
            total += self.micro_batch * (len(within) - 1) / took if took else inf
        return 1000 * total

    def utilisation(self, kind: SpanKind) -> Mapping[str, float]:
        """By resource, the share of the makespan it was at work."""
        return {name: self._share(sum(s.end_ms - s.start_ms for s in own)) for name, own in self._by_name(kind).items()}

    def stage_utilisation(self) -> Mapping[int, float]:
        """By stage, the share of the makespan its device computed for it."""
        busy: dict[int, float] = {}
        for span in self.events:
            if span.kind == "compute":
                busy[span.stage] = busy.get(span.stage, 0.0) + span.end_ms - span.start_ms
        return {stage: self._share(took) for stage, took in sorted(busy.items())}

    def waiting_ms(self, kind: SpanKind) -> Mapping[str, float]:
        """By resource, how long work waited for it on average."""
        found = self._by_name(kind)
        return {name: sum(s.start_ms - s.ready_ms for s in own) / len(own) for name, own in found.items()}

    def _by_name(self, kind: SpanKind) -> dict[str, list[SimulatedSpan]]:
        found: dict[str, list[SimulatedSpan]] = {}
        for span in self.events:
            if span.kind == kind:
                found.setdefault(span.resource, []).append(span)
        return found

    def _share(self, busy_ms: float) -> float:
        return busy_ms / self.makespan_ms if self.makespan_ms else 0.0


def formula_tokens_per_second(lap: Lap, schedule: ScheduleName, micro_batches: int) -> float:
    """The closed form of the steady rate; exact where a lap visits every resource once (see `simulation`)."""
    if schedule == "no-bubble":
        return 1000 * lap.rate(micro_batches)
    groups = micro_batches if schedule == "bubble" else 1
    round_ms = lap.ring_ms + (groups - 1) * lap.bottleneck_ms
    return 1000 * groups * lap.batch / round_ms if round_ms else inf
