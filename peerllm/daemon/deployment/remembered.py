"""The deployments that a device brings back when it starts again, in a file of one line each."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from peerllm.codec import decode, encode
from peerllm.daemon.facade import RunOptions
from peerllm.errors import LinkError
from peerllm.saved_files import replace_file
from peerllm.types import DeploymentId, DeviceId

MAX_REMEMBERED = 64  # lines read

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RememberedDeployment:
    """A deployment that served; `epoch` is the last that did when this was written.

    `inherited`: of the deployment whose model this device inherited; "": the options say where the model is.
    `devices` had a part in it, so one of them may go on with it. `asleep`: it was unloaded, and comes when asked for.
    """

    options: RunOptions
    deployment: DeploymentId
    epoch: int
    inherited: DeploymentId = ""
    succeeds: DeploymentId = ""
    devices: tuple[DeviceId, ...] = ()
    asleep: bool = False


def recall(file: Path) -> list[RememberedDeployment]:
    """What was written last; damaged lines are skipped and named in the log."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return []
    result = []
    for line in lines[:MAX_REMEMBERED]:
        try:
            result.append(decode(line, RememberedDeployment))
        except LinkError as error:
            log.warning("%s: a line was skipped: %s", file, error)
    return result


def remember(file: Path, deployments: Iterable[RememberedDeployment]) -> None:
    """Replaces the file as a whole; raises OSError."""
    replace_file(file, b"".join(encode(one, RememberedDeployment) + b"\n" for one in deployments))
