"""Discrete-event simulation of a plan on a trace, with the executor's own dispatch rules.

Modules: `simulation` (the entry point), `scenario` (documents to arrays), `kernel` (the compiled event loop).
"""

from evaluator.simulation import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
