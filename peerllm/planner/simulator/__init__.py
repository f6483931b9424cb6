"""A plan run as discrete events: queues and resources, never a closed formula (design §6)."""

from peerllm.planner.simulator.engine import MAX_SPANS, simulate
from peerllm.planner.simulator.report import Run, Span, formula_tokens_per_second
from peerllm.planner.simulator.schedules import SCHEDULES
from peerllm.types import ScheduleName

__all__ = ["MAX_SPANS", "SCHEDULES", "Run", "ScheduleName", "Span", "formula_tokens_per_second", "simulate"]
