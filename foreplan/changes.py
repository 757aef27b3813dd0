"""Changes of a simulated run, as they are spelled on the command line."""

from __future__ import annotations

import math
import re
from pathlib import Path

from evaluator.changes import Failure, PlanChange, Recovery
from plans.codec import read_plan
from plans.errors import InvalidInput

__all__ = ["failures_of", "plan_change_of"]

_FAILURE = re.compile(r"(?P<node>[^@/]+)(/(?P<gpu>[0-9]+))?@(?P<start>[0-9.eE+]+)(-(?P<end>[0-9.eE+]+))?")


def plan_change_of(text: str) -> PlanChange:
    """Read ``SECONDS=PLAN``.

    Raises:
        InvalidInput: It is none, or the plan cannot be read.
    """
    time, equals, path = text.partition("=")
    at_s = _seconds(time)
    if not equals or at_s is None:
        raise InvalidInput.of("SECONDS=PLAN, such as 60=next.json", where="--then", found=repr(text))
    return PlanChange(at_s=at_s, plan=read_plan(Path(path)))


def failures_of(text: str) -> list[Failure | Recovery]:
    """Read ``NODE[/GPU]@FROM[-TO]``: a failure and, with TO, the recovery.

    Raises:
        InvalidInput: It is none, or ends before it starts.
    """
    found = _FAILURE.fullmatch(text)
    start_s = _seconds(found["start"]) if found else None
    if found is None or start_s is None:
        expected = "NODE[/GPU]@FROM[-TO] in seconds, such as node-a@60-120 or node-a/0@60"
        raise InvalidInput.of(expected, where="--fail", found=repr(text))
    node, gpu = found["node"], None if found["gpu"] is None else int(found["gpu"])
    failure = Failure(at_s=start_s, node=node, gpu=gpu)
    if found["end"] is None:
        return [failure]
    end_s = _seconds(found["end"])
    if end_s is None or end_s <= start_s:
        raise InvalidInput.of(f"an end after {start_s:g} s", where="--fail", found=repr(text))
    return [failure, Recovery(at_s=end_s, node=node, gpu=gpu)]


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
