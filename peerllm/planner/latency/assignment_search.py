"""Cheapest way through layers × devices under a memory limit per device: exact, or with a proven bound.

Where all blocks are alike, `walk` knows a shorter way. Else: a Lagrangian bound, then sweeps of labels between that
bound and the best way known: proofs close above the bound are cheap, and a way found there leaves little to prove. What
could not be decided is left open, and said.
"""

from __future__ import annotations

from peerllm.planner.latency.assignment_problem import AssignmentProblem, placement_cost
from peerllm.planner.latency.equal_blocks.block_problem import equal_blocks
from peerllm.planner.latency.equal_blocks.head_search import HeadSearch
from peerllm.planner.latency.mixed_layers.gap_search import EXACT, Assignment, GapSearch

FEW = 16  # devices up to which the search goes on until it is exact, within reason
WIDTHS = {True: (48, 400, 4000, 40_000), False: (48, 400)}  # labels per layer, for few devices and for many
BUDGET = {True: 1_500_000_000, False: 400_000_000}  # array elements touched before the rest is left open
BUDGET_AGAIN = 200_000_000  # where a walk is known already: what it could not prove is rarely proven here


def cheapest_assignment(problem: AssignmentProblem) -> Assignment:
    """The cheapest assignment of a device to each layer within `room`."""
    blocks = equal_blocks(problem)
    if blocks is None:
        return search_mixed_layers(problem)
    search = HeadSearch(blocks, lambda placement: placement_cost(problem, placement))
    search.run()
    proven = search.bound >= search.best * (1 - EXACT)
    if not search.placement or not (proven or search.spent or len(problem.room) > FEW):
        return search_mixed_layers(problem, Assignment(search.placement, search.best, search.bound))
    bound = search.best if proven else search.bound
    return Assignment(search.placement, search.best, bound, len(problem.cost) - 1, bool(proven))


def search_mixed_layers(problem: AssignmentProblem, known: Assignment | None = None) -> Assignment:
    """The same, whatever the layers are like; `known` is what was found and proven before."""
    again = known is not None and bool(known.placement)
    few = len(problem.room) <= FEW and not again
    budget = BUDGET_AGAIN if again else BUDGET[few]
    search = GapSearch(problem, known)
    search.close_gap(WIDTHS[few], budget)
    if search.relays_short and not search.done:
        rerun = GapSearch(problem, search.result(), no_relays=True)
        rerun.work = search.work
        rerun.close_gap(WIDTHS[few], budget)
        return rerun.result()
    return search.result()
