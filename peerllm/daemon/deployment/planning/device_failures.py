"""What failed on which device lately, and what the next plan makes of it. Sans-I/O.

After its first failure a device is avoided where another plan is feasible. After a second one within FAILURE_S no plan
uses it, or only for less than what did not fit, until FAILURE_S have passed without a failure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from peerllm.daemon.decide.device_profiles import Candidate
from peerllm.errors import PeerLLMError, RefusedError
from peerllm.types import DeviceId

FAILURE_S = 60.0  # a failure counts for so long
REPEATED = 2  # failures of a device from which on no plan may ignore them
LESS = 0.75  # of what did not fit, a device is asked to hold so much next time


@dataclass(frozen=True, slots=True)
class _Failure:
    epoch: int
    count: int
    until: float
    error: PeerLLMError
    most_bytes: int | None  # what the device may be asked to hold; None: nothing


class DeviceFailures:
    """Remembers one deployment's. `now` is any clock that only rises. The source is never left out of a plan."""

    def __init__(self, source: DeviceId) -> None:
        self._source = source
        self._failures: dict[DeviceId, _Failure] = {}

    def note(self, device: DeviceId, epoch: int, promised_bytes: int, error: PeerLLMError, now: float) -> None:
        """Remember that the device failed in an epoch that promised so much of it. Told twice, it counts once."""
        self._forget(now)
        before = self._failures.get(device)
        if before is not None and before.epoch == epoch:
            return
        count = 1 if before is None else before.count + 1
        most = int(LESS * promised_bytes) if _for_want_of_room(error) else None
        self._failures[device] = _Failure(epoch, count, now + FAILURE_S, error, most)

    def usable(self, candidates: Mapping[DeviceId, Candidate], now: float) -> list[dict[DeviceId, Candidate]]:
        """The candidates to plan with, the most careful choice first; the last leaves out who failed repeatedly."""
        self._forget(now)
        choices = [self._without(candidates, least) for least in (1, REPEATED)]
        return choices if choices[0] != choices[1] else choices[:1]

    def repeated(self, now: float) -> PeerLLMError | None:
        """The latest failure of a device that no plan may use; None if there is none."""
        self._forget(now)
        counted = [failure for failure in self._failures.values() if failure.count >= REPEATED]
        return max(counted, key=lambda failure: failure.until).error if counted else None

    def _forget(self, now: float) -> None:
        self._failures = {device: one for device, one in self._failures.items() if one.until > now}

    def _without(self, candidates: Mapping[DeviceId, Candidate], least: int) -> dict[DeviceId, Candidate]:
        """The candidates, without those that failed at least `least` times, or with less memory for them."""
        result = {}
        for device, one in candidates.items():
            failure = self._failures.get(device)
            if failure is None or failure.count < least:
                result[device] = one
            elif failure.most_bytes is not None:
                result[device] = replace(one, free_bytes=min(one.free_bytes, failure.most_bytes))
            elif device == self._source:
                result[device] = one
        return result


def _for_want_of_room(error: PeerLLMError) -> bool:
    return isinstance(error, RefusedError) or "out of memory" in str(error)
