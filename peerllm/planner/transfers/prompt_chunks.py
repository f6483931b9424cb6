"""How prompts are cut into chunks that follow each other through the stages, and when the first token comes.

Small chunks keep every device busy early, large ones cost a device less. The cost model leaves out that later chunks
attend to more tokens than earlier ones: that hardly depends on the cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peerllm.planner.cost.layer_costs import Links
from peerllm.planner.cost.working_space import MIN_CHUNK
from peerllm.planner.simulator.pass_legs import Leg, decode_legs, prompt_legs
from peerllm.types import Cuts, DeviceId, DeviceProfile, ModelProfile, Plan, Stage, chunk_of, pieces_of

MOST_WAIT_MS = 500.0  # the longest that a step should wait for another sequence's chunk on a stage, ...
MOST_WAIT_STEPS = 8  # ... or as long as so many steps take there, if that is longer
CLOSE = 0.02  # share of the time to first token that a larger chunk may cost, since it saves passes
GROWTH = 1.25  # ratio of the prompt lengths that are tried
LONGEST = 8192  # tokens; longer prompts are cut like this one


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The stages of a plan, as prompts pass through them."""

    model: ModelProfile
    devices: Mapping[DeviceId, DeviceProfile]
    links: Links
    stages: Sequence[Stage]

    def first_token_ms(self, prompt: int, chunk: int) -> float:
        """Until the first token of a prompt, alone in the household, is back at the source.

        Uses the simulator's rules: devices and links serve chunks in order, a device its earlier stage first. Exact
        where each device has one stage, or the source also the head. The limit of chunks under way at once (twice the
        number of stages) never delays one, because a lap takes at most as long as the busiest device or link needs for
        so many.
        """
        *_, last = pieces = pieces_of(prompt, chunk)
        whole = self._legs(pieces[0], final=False) if len(pieces) > 1 else ()
        passes = [*[whole] * (len(pieces) - 1), self._legs(last, final=True)]
        at = [0.0] * len(passes)
        free: defaultdict[tuple[DeviceId, ...], float] = defaultdict(float)
        for place in range(len(self.stages)):
            for number, legs in enumerate(passes):
                if place >= len(legs):
                    continue
                leg, device = legs[place], (legs[place].device,)
                at[number] = free[device] = max(at[number], free[device]) + leg.compute_ms
                if leg.receiver is not None:
                    link = leg.device, leg.receiver
                    at[number] = free[link] = max(at[number], free[link]) + leg.hop_ms
        return at[-1]

    def best_chunk(self, prompt: int, most: int) -> int:
        """The largest of `sizes(most)` that is close to the best."""
        times = {size: self.first_token_ms(prompt, size) for size in sizes(most)}
        enough = min(times.values()) * (1 + CLOSE)
        return max(size for size, ms in times.items() if ms <= enough)

    def cuts(self, longest: int, most: int) -> Cuts:
        """(shortest prompt, chunk) pairs: the best chunk of at most `most` tokens for prompts up to `longest`."""
        found: list[tuple[int, int]] = []
        prompt = 1
        while prompt <= min(longest, LONGEST):
            chunk = self.best_chunk(prompt, most)
            if not found or found[-1][1] != chunk:
                found.append((prompt, chunk))
            prompt = max(MIN_CHUNK + 1, int(prompt * GROWTH))  # shorter prompts are never cut
        return tuple(found)

    def most_chunk(self, most: int) -> int:
        """The largest chunk, of at most `most` tokens, that another sequence's step can be made to wait for."""
        steps = decode_legs(self.model, self.devices, self.links, self.stages, 1)
        waits = [max(MOST_WAIT_MS, MOST_WAIT_STEPS * leg.compute_ms) for leg in steps]

        def fair(size: int) -> bool:
            return all(leg.compute_ms <= wait for leg, wait in zip(self._legs(size, final=True), waits, strict=True))

        least, *others = sizes(most)
        return max((size for size in others if fair(size)), default=least)

    def _legs(self, tokens: int, final: bool) -> tuple[Leg, ...]:
        return prompt_legs(self.model, self.devices, self.links, self.stages, tokens, final)


def sizes(most: int) -> list[int]:
    """Chunk sizes to choose from, ascending: powers of two, at which layers are timed, and `most`."""
    found = []
    size = MIN_CHUNK
    while size < most:
        found.append(size)
        size *= 2
    return [*found, most]


def in_chunks(plan: Plan, pipeline: Pipeline, prompt: int, cuts: Cuts, crowding: float = 1.0) -> Plan:
    """The plan with the time to first token of a prompt cut by `cuts`.

    Everything else stays as predicted for a prompt that travels whole. `crowding`: how many times longer its devices
    take while all of them compute, which is not so while the prompt's first chunk enters and its last one leaves.
    """
    chunk = chunk_of(cuts, prompt)
    first = pipeline.first_token_ms(prompt, chunk)
    lap, devices = pipeline.first_token_ms(min(chunk, prompt), chunk), len(set(plan.devices))
    first += (crowding - 1) * max(0.0, first - 2 * lap * (devices - 1) / devices)
    return replace(plan, predicted=replace(plan.predicted, time_to_first_token_ms=first))
