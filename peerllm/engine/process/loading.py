"""The loader thread: one job at a time of what takes too long for the compute thread (load, inspect, measure).

Layers are timed here because a single pass of a large one may take a second, for which steps would wait. Nothing is
timed while steps are computed or while a stage is loaded, so memory is never taken twice.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace

from peerllm.engine.base import Backend, Progress
from peerllm.engine.free_memory import return_memory
from peerllm.engine.messages import FromEngine, Inspect, LoadProgress, LoadStage, Measure, TimeLayers
from peerllm.engine.process.compute import failed
from peerllm.engine.process.inbox import Inbox
from peerllm.engine.schedule.held_shard import HeldShard, chain_of, held_bytes
from peerllm.errors import PeerLLMError, RefusedError, UnavailableError
from peerllm.types import DeploymentId

MAX_JOBS = 256  # loads, inspections and measurements waiting
PROGRESS_S = 0.1  # seconds between two LoadProgress of a stage
ABANDONED = "the deployment was stopped while it was loading"

Job = LoadStage | Inspect | Measure | TimeLayers
Shards = tuple[HeldShard, ...]


class Loader:
    """Calls `finished` with each stage's shards and `tell` with every other answer, both in the loader thread.

    `finished` gets all shards of the stage, and those of them that were loaded for it; `held` says what is loaded of a
    deployment already. `computed` says how many batches the compute thread has done; `broken` is called with an error
    that ends the engine.
    """

    def __init__(
        self,
        backend: Backend,
        tell: Callable[[FromEngine], None],
        finished: Callable[[LoadStage, Shards, Shards], None],
        computed: Callable[[], int] = lambda: 0,
        broken: Callable[[BaseException], None] = lambda error: None,
        held: Callable[[DeploymentId], Shards] = lambda deployment: (),
    ) -> None:
        self._jobs: Inbox[Job] = Inbox(MAX_JOBS)
        self._backend, self._tell, self._finished = backend, tell, finished
        self._computed, self._broken, self._held, self._closed = computed, broken, held, False
        self._lock = threading.Lock()
        self._wanted: dict[int, LoadStage] = {}  # by request: loads that nobody has abandoned or taken over

    def put(self, job: Job) -> None:
        """Queue a job. OverloadedError if too many wait; UnavailableError if layers are to be timed during a load."""
        if isinstance(job, TimeLayers) and self._wanted:
            raise UnavailableError("a model is being loaded here; layers are timed when it is quiet")
        if isinstance(job, LoadStage):
            with self._lock:  # before the job is queued: the loader thread may begin it before `put` returns
                self._wanted[job.request] = job
        try:
            self._jobs.put(job)
        except PeerLLMError:
            with self._lock:
                self._wanted.pop(job.request, None)
            raise

    def abandon(self, deployment: DeploymentId, epoch: int | None = None, only: bool = False) -> None:
        """Let those loads of a deployment, for epochs up to `epoch` or for that one alone, fail that `take_over` was
        not called for."""

        def wanted(spec: LoadStage) -> bool:
            if spec.deployment != deployment:
                return True
            return epoch is not None and (spec.epoch > epoch or (only and spec.epoch < epoch))

        with self._lock:
            self._wanted = {request: spec for request, spec in self._wanted.items() if wanted(spec)}

    def take_over(self, spec: LoadStage) -> None:
        """The load can no longer be abandoned; RefusedError if it was."""
        with self._lock:
            if self._wanted.pop(spec.request, None) is None:
                raise RefusedError(ABANDONED)

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="engine-loader", daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        """The thread ends once its present job is done."""
        self._closed = True
        with self._lock:
            self._wanted.clear()
        self._jobs.close()

    def _run(self) -> None:
        while (jobs := self._jobs.take(wait=True)) is not None:
            for job in jobs:
                # Libraries keep 10 MB and more of scratch for every thread that computed, until it ends.
                thread = threading.Thread(target=self._try, args=(job,), name="engine-loader-job", daemon=True)
                thread.start()
                thread.join()
                return_memory()

    def _try(self, job: Job) -> None:
        try:
            self._do(job)
        except Exception as error:  # a damaged model may raise anything
            if not isinstance(error, PeerLLMError):
                traceback.print_exc()
            self._tell(failed(job.request, error))
            if isinstance(error, self._backend.broken):
                self._broken(error)

    def _do(self, job: Job) -> None:
        match job:
            case LoadStage():
                self._load(job)
            case Inspect():
                self._tell(self._backend.inspect(job))
            case Measure():
                self._tell(self._backend.measure(job))
            case TimeLayers():
                self._time(job)

    def _time(self, job: TimeLayers) -> None:
        before = self._computed()

        def check() -> None:
            if self._closed:
                raise UnavailableError("the engine is stopping")
            if self._computed() != before:
                raise UnavailableError("an answer is being written here; layers are timed when it is quiet")

        self._tell(self._backend.time_layers(job, check))

    def _load(self, spec: LoadStage) -> None:
        last = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal last
            if spec.request not in self._wanted:
                raise RefusedError(ABANDONED)
            now = time.monotonic()
            if now - last >= PROGRESS_S or done >= total:
                last = now
                self._tell(LoadProgress(spec.deployment, spec.stage, done, total))

        fresh: list[HeldShard] = []
        try:
            progress(0, max(1, sum(tensor.nbytes for tensor in spec.tensors)))
            chain, missing = chain_of(self._held(spec.deployment), spec)
            for part in missing:
                fresh.append(self._load_part(spec, part, _limit(spec, chain, fresh), progress))
        except Exception:
            with self._lock:
                self._wanted.pop(spec.request, None)
            for one in fresh:
                one.shard.close()
            raise
        whole = sorted([*chain, *fresh], key=lambda one: one.first_layer)
        self._finished(spec, tuple(whole), tuple(fresh))

    def _load_part(
        self, spec: LoadStage, part: tuple[int, int], limit_bytes: int | None, progress: Progress
    ) -> HeldShard:
        """Layers of a stage that are missing."""
        first, last = part
        wanted = replace(spec, first_layer=first, last_layer=last, limit_bytes=limit_bytes)
        return HeldShard.of(wanted, self._backend.load(wanted, progress))


def _limit(spec: LoadStage, chain: Sequence[HeldShard], fresh: Sequence[HeldShard]) -> int | None:
    """What the next part of a stage may take, of whose shards `chain` were loaded before and `fresh` are by now."""
    limits = (spec.limit_bytes, [*chain, *fresh]), (spec.added_limit_bytes, fresh)
    return min((limit - held_bytes(taken) for limit, taken in limits if limit is not None), default=None)
