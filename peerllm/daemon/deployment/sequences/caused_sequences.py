"""Which request a sequence is computed for, in the logs of all devices that compute it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

from peerllm.daemon.control_messages import Computing
from peerllm.daemon.deployment.negotiation import Surroundings
from peerllm.daemon.deployment.sequences.admitted_sequence import AdmittedSequence
from peerllm.request_ids import caused_by
from peerllm.types import DeploymentId, DeviceId

LAST_REQUESTS = 256  # that have a line: it is not repeated for each of their sequences

log = logging.getLogger(__name__)


class CausedSequences:
    """Of one deployment; `devices`: those that compute it now."""

    def __init__(
        self, deployment: DeploymentId, around: Surroundings, devices: Callable[[], Sequence[DeviceId]]
    ) -> None:
        self._deployment, self._around, self._devices = deployment, around, devices
        self._named: deque[str] = deque(maxlen=LAST_REQUESTS)

    def begins(self, sequence: AdmittedSequence) -> None:
        """It is given to the engines."""
        if not sequence.cause or sequence.cause in self._named:
            return
        self._named.append(sequence.cause)
        devices = dict.fromkeys(self._devices())
        with caused_by(sequence.cause):
            where = ", ".join(map(self._around.name, devices))
            log.info("sequence %d of %s is computed on %s", sequence.number, self._deployment[:8], where)
        for device in devices:
            if device != self._around.me:
                self._around.tell_device(device, Computing(self._deployment, sequence.number, sequence.cause))
