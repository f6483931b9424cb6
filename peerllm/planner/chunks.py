"""Prompts in chunks that follow each other through a plan's stages: how long the first token takes, and the best cut.

Small chunks keep every device busy early, large ones cost a device less. Not in the cost model: that a prompt's later
chunks attend to more tokens than its first ones. That hardly depends on the cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peerllm.planner.cost import Links
from peerllm.planner.memory import MIN_CHUNK
from peerllm.planner.simulator.route import Leg, decode_legs, prompt_legs
from peerllm.types import Cuts, DeviceId, DeviceProfile, ModelProfile, Plan, Stage, chunk_of, pieces_of

MOST_WAIT_MS = 500.0  # a step that finds another sequence's chunk at work on a stage waits so long, at most ...
MOST_WAIT_STEPS = 8  # ... or as long as so many steps take there, where that is longer
CLOSE = 0.02  # of the time to the first token: what a larger chunk may cost, for it saves passes and frames
GROWTH = 1.25  # prompts up to so many times as long are cut alike
LONGEST = 8192  # tokens; longer prompts are cut like these


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A plan's stages as prompts see them."""

    model: ModelProfile
    devices: Mapping[DeviceId, DeviceProfile]
    links: Links
    stages: Sequence[Stage]

    def first_token_ms(self, prompt: int, chunk: int) -> float:
        """Until the first token of a prompt alone in the household is back at the source.

        By the simulator's rules: devices and links take chunks in turn, of a device's stages the earlier first. Exact
        where a device has one stage, or the source the head too. That of a prompt only twice as many chunks as there
        are stages are under way at once delays nothing: a lap takes at most as long as the busiest device or link for
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
        """Of `sizes(most)` the largest that is close to the best."""
        times = {size: self.first_token_ms(prompt, size) for size in sizes(most)}
        enough = min(times.values()) * (1 + CLOSE)
        return max(size for size, ms in times.items() if ms <= enough)

    def cuts(self, longest: int, most: int) -> Cuts:
        """The best chunk of at most `most` tokens for prompts of up to `longest`."""
        found: list[tuple[int, int]] = []
        prompt = 1
        while prompt <= min(longest, LONGEST):
            chunk = self.best_chunk(prompt, most)
            if not found or found[-1][1] != chunk:
                found.append((prompt, chunk))
            prompt = max(MIN_CHUNK + 1, int(prompt * GROWTH))  # shorter ones are never cut
        return tuple(found)

    def most_chunk(self, most: int) -> int:
        """The largest chunk of at most `most` tokens that a step of another sequence may have to wait for."""
        steps = decode_legs(self.model, self.devices, self.links, self.stages, 1)
        waits = [max(MOST_WAIT_MS, MOST_WAIT_STEPS * leg.compute_ms) for leg in steps]

        def fair(size: int) -> bool:
            return all(leg.compute_ms <= wait for leg, wait in zip(self._legs(size, final=True), waits, strict=True))

        least, *others = sizes(most)
        return max((size for size in others if fair(size)), default=least)

    def _legs(self, tokens: int, final: bool) -> tuple[Leg, ...]:
        return prompt_legs(self.model, self.devices, self.links, self.stages, tokens, final)


def sizes(most: int) -> list[int]:
    """Chunks to choose from, rising: powers of two, at which layers are timed and few products compiled, and `most`."""
    found = []
    size = MIN_CHUNK
    while size < most:
        found.append(size)
        size *= 2
    return [*found, most]


def in_chunks(plan: Plan, pipeline: Pipeline, prompt: int, cuts: Cuts, crowding: float = 1.0) -> Plan:
    """The plan with the time to the first token that its prompts take as they are cut.

    All else stays as the plan was judged: with the prompt whole, one stage after the other. `crowding`: how many times
    longer its devices take while all of them compute, which is neither so at a prompt's beginning nor at its end.
    """
    chunk = chunk_of(cuts, prompt)
    first = pipeline.first_token_ms(prompt, chunk)
    lap, devices = pipeline.first_token_ms(min(chunk, prompt), chunk), len(set(plan.devices))
    first += (crowding - 1) * max(0.0, first - 2 * lap * (devices - 1) / devices)
    return replace(plan, predicted=replace(plan.predicted, time_to_first_token_ms=first))
