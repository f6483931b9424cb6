"""A stage that answers for sequences that nobody knows, in other sequences' slots: for a daemon with this directory in
its PYTHONPATH, whose engines do so with every fourth frame they send."""

import itertools
import sys

if "peerllm.engine" in sys.orig_argv:
    from dataclasses import replace

    from peerllm.engine.schedule.epoch_ring import EpochRing
    from peerllm.engine.wire.parcels import Drawn, Released, TokenBatch

    _pass_on, _turns = EpochRing._pass_on, itertools.count(1)

    def _lie(self, index, parcel):
        _pass_on(self, index, parcel)
        turn = next(_turns)
        if turn % 4 or not isinstance(parcel, TokenBatch | Drawn) or self.stages[index].spec.downstream is None:
            return
        unknown = [replace(run, sequence=run.sequence ^ (turn << 20)) for run in parcel.runs]
        _pass_on(self, index, replace(parcel, runs=unknown))
        _pass_on(self, index, Released(unknown[0].sequence, unknown[0].slot, "made up" if turn % 8 else ""))

    EpochRing._pass_on = _lie
