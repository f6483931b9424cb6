"""Choose the search for the cheapest assignment of layers to devices: exact, or with a proven bound.

Models whose blocks are all equal have a search of their own, which is much faster. All others, and what it leaves
unproven in small households, go through label setting under a Lagrangian bound. `proven` says whether the optimum is.
"""

from __future__ import annotations

from peerllm.planner.latency.assignment_problem import AssignmentProblem, placement_cost
from peerllm.planner.latency.equal_blocks.block_problem import equal_blocks
from peerllm.planner.latency.equal_blocks.head_search import HeadSearch
from peerllm.planner.latency.mixed_layers.gap_search import EXACT, Assignment, GapSearch

FEW = 16  # devices up to which the wider label limits and the larger budget are used
WIDTHS = {True: (48, 400, 4000, 40_000), False: (48, 400)}  # labels per layer in turn, for few devices or many
BUDGET = {True: 1_500_000_000, False: 400_000_000}  # array elements touched before the gap stays open
BUDGET_AGAIN = 200_000_000  # after the search for equal blocks: what that could not prove is rarely proven here


def cheapest_assignment(problem: AssignmentProblem) -> Assignment:
    """The cheapest assignment of a device to each layer within every device's room."""
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
    """The same for any layers; `known` is what was found and proven before."""
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
