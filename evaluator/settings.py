"""What a run may choose beside plan, services and trace."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from plans.errors import Fault, InvalidInput

__all__ = ["GATEWAY_ROUTING", "Admission", "Latency", "Order", "Routing", "Settings"]

Routing = Literal[
    "weighted",
    "weighted-random",
    "round-robin",
    "shortest-queue",
    "least-finish",
    "earliest-free",
    "credits",
    "corrected",
]
"""How a request finds its replica (docs/evaluator.md, section 4)."""

GATEWAY_ROUTING: Routing = "corrected"
"""What gateways do unless told otherwise: the weights of the plan, corrected by the waits of replicas."""

Order = Literal["edf", "fifo"]
"""Queues by deadline, or by time of entry."""

Admission = Literal["dispatch", "arrival"]
"""Requests are dropped when their turn comes, or accepted or not when they arrive (section 7)."""

Latency = Literal["mean", "profile", "exponential"]
"""Batches take the plan's latency; or it times a factor drawn from the profile's percentiles, or an exponential one."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "routing": get_args(Routing),
    "order": get_args(Order),
    "admission": get_args(Admission),
    "latency": get_args(Latency),
}
_POSITIVE = ("credit_increase", "credit_decrease")
_COUNTS = {"seed": 0, "concurrency": 1, "max_prefill_tokens": 1, "retries": 0, "credit_target": 0}
_MOST = 2**62
_MOST_CONCURRENCY = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to simulate; docs/evaluator.md says exactly what each setting means.

    The defaults are what the executor does, but for what it costs (``overhead_s`` and the two after) and for routing:
    that of gateways is `GATEWAY_ROUTING`, which takes another admission than ``arrival``.

    Attributes:
        seed: Of every draw.
        routing: Policy of the router.
        order: Order of the queues.
        batch_delay_s: Longest time that a head waits for its batch to fill, seconds; 0: a free device never waits.
        early_drop: Whether requests that cannot be met are dropped when their turn comes.
        admission: When it is decided whether to serve a request.
        admission_margin_s: With admission at arrival, seconds by which a finish must be early.
        concurrency: Batches that a group of one stage runs at once.
        latency: Where the latency of a batch comes from.
        overhead_s: Seconds between arrival and queue (gateway, transport).
        response_s: Seconds from the end of a batch to the answer at the client.
        iteration_overhead_s: Seconds that an iteration of a service that generates takes beyond its profile: its agent
            and its worker tell each other sequences and tokens in between.
        credit_target: Requests that may wait at a replica without its credit falling.
        credit_increase: Added to a credit after a batch.
        credit_decrease: Factor on a credit after a batch that left more than the target waiting, in (0, 1].
        warmup_s: Requests that arrive before are simulated and not counted.
        until_s: End of the run; None: when everything has ended.
        retries: Times that a request lost with its node enters again.
        detection_s: Seconds until a failure is known to the router.
        max_prefill_tokens: Prompt tokens that one prefill takes.

    Raises:
        InvalidInput: A value is out of its range, or two exclude each other; all faults at once.
    """

    seed: int = 0
    routing: Routing = "weighted"
    order: Order = "edf"
    batch_delay_s: float = 0.0
    early_drop: bool = True
    admission: Admission = "dispatch"
    admission_margin_s: float = 0.0
    concurrency: int = 1
    latency: Latency = "mean"
    overhead_s: float = 0.0
    response_s: float = 0.0
    iteration_overhead_s: float = 0.0
    credit_target: int = 4
    credit_increase: float = 0.1
    credit_decrease: float = 0.7
    warmup_s: float = 0.0
    until_s: float | None = None
    retries: int = 1
    detection_s: float = 1.0
    max_prefill_tokens: int = 8192

    def __post_init__(self) -> None:
        faults = [fault for field in fields(self) if (fault := self._fault_of(field.name)) is not None]
        if not faults:
            faults = self._contradictions()
        if faults:
            raise InvalidInput(faults)

    def _fault_of(self, name: str) -> Fault | None:
        value: Any = getattr(self, name)
        if name in _CHOICES:
            expected, fine = f"one of {', '.join(_CHOICES[name])}", value in _CHOICES[name]
        elif name == "early_drop":
            expected, fine = "true or false", isinstance(value, bool)
        elif name in _COUNTS:
            least = _COUNTS[name]
            most = _MOST_CONCURRENCY if name == "concurrency" else _MOST
            expected = f"a whole number from {least} to {most}"
            fine = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        elif name == "until_s" and value is None:
            return None
        else:
            unit = "" if name in _POSITIVE else " seconds"
            expected = f"a finite number of at least 0{unit}" + (" and at most 1" if name == "credit_decrease" else "")
            fine = isinstance(value, int | float) and math.isfinite(value) and value >= 0
            fine = fine and not (name == "credit_decrease" and not 0 < value <= 1)
        return None if fine else Fault(where="evaluate", field=name, found=repr(value), expected=expected)

    def _contradictions(self) -> list[Fault]:
        def fault(field: str, expected: str) -> Fault:
            return Fault(where="evaluate", field=field, found=repr(getattr(self, field)), expected=expected)

        faults = []
        if self.until_s is not None and self.until_s <= self.warmup_s:
            faults.append(fault("until_s", f"a time after the warm-up ({self.warmup_s:g} s)"))
        if self.admission == "dispatch":
            if self.routing == "earliest-free":
                faults.append(fault("routing", "admission 'arrival' with routing 'earliest-free'"))
            if self.admission_margin_s:
                faults.append(fault("admission_margin_s", "0 without admission 'arrival'"))
            return faults
        wanted = {"order": "fifo", "batch_delay_s": 0, "concurrency": 1, "latency": "mean"}
        faults += [
            fault(name, f"{value!r} with admission 'arrival'")
            for name, value in wanted.items()
            if getattr(self, name) != value
        ]
        if self.routing in ("credits", "corrected"):
            faults.append(fault("routing", "another policy with admission 'arrival': nothing waits in queues then"))
        return faults
