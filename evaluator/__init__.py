"""Discrete-event simulation of a plan on a trace, with the executor's own dispatch rules.

docs/evaluator.md says what is simulated. Start at `simulation` (documents in, an evaluation out), `run` (arrays in, a
run that can be advanced) and `kernel` (the compiled loop).
"""

from evaluator.measures import RequestLog, StreamSummary, Timeline
from evaluator.run import Run, simulate_counts
from evaluator.scenario import Arrivals, Deadlines, Replicas, compile_arrivals, compile_deadlines, compile_replicas
from evaluator.settings import Settings
from evaluator.simulation import Evaluation, evaluate

__all__ = [
    "Arrivals",
    "Deadlines",
    "Evaluation",
    "Replicas",
    "RequestLog",
    "Run",
    "Settings",
    "StreamSummary",
    "Timeline",
    "compile_arrivals",
    "compile_deadlines",
    "compile_replicas",
    "evaluate",
    "simulate_counts",
]
