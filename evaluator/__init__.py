"""Discrete-event simulation of a plan on a trace, with the executor's own dispatch rules.

docs/evaluator.md says what is simulated. Start at `simulation` (documents in, an evaluation out), `run` (arrays in, a
run that can be advanced) and `kernel` (the compiled loop). `course` carries out what changes on the way, `ordered` is
the loop for runs whose groups depend on each other.
"""

from evaluator.changes import Change, Failure, PlanChange, Recovery, random_failures
from evaluator.control import Controller, Observation, ServiceObservation, Turn
from evaluator.measures import RequestLog, StreamSummary, Timeline
from evaluator.run import Run, simulate_counts
from evaluator.scenario import Arrivals, Deadlines, Replicas, compile_arrivals, compile_deadlines, compile_replicas
from evaluator.settings import GATEWAY_ROUTING, Settings
from evaluator.simulation import Evaluation, evaluate

__all__ = [
    "GATEWAY_ROUTING",
    "Arrivals",
    "Change",
    "Controller",
    "Deadlines",
    "Evaluation",
    "Failure",
    "Observation",
    "PlanChange",
    "Recovery",
    "Replicas",
    "RequestLog",
    "Run",
    "ServiceObservation",
    "Settings",
    "StreamSummary",
    "Timeline",
    "Turn",
    "compile_arrivals",
    "compile_deadlines",
    "compile_replicas",
    "evaluate",
    "random_failures",
    "simulate_counts",
]
