"""The heavy-traffic tail bound: how long a request waits, and what utilisation a deadline allows.

Source: J. F. C. Kingman, "On queues in heavy traffic", J. R. Stat. Soc. B 24 (1962): in a GI/G/1 queue near saturation
the wait is exponential with mean ``tau (ca^2 + cs^2) / (2 (1 - rho))``, so ``P(W > t) ~ exp(-2 (1 - rho) t / (tau
(ca^2 + cs^2)))``. Here ``tau`` is the group's time per request, a batch's hold of the bottleneck stage over its size.
See docs/formulation.md, section 3.
"""

from __future__ import annotations

import math

__all__ = ["slotted_tail", "slotted_utilisation_limit", "utilisation_limit"]

_HALVINGS = 40
"""Steps of the bisection for a utilisation: far below any error of a latency."""


def utilisation_limit(slack_s: float, request_s: float, variability: float, miss: float) -> float:
    """Return the utilisation at which a share ``miss`` of requests waits longer than ``slack_s``; below 0 for none.

    Args:
        slack_s: Time that a request may wait, seconds.
        request_s: Time of the group per request, seconds, above 0.
        variability: Sum of the squared coefficients of variation of arrivals and of service, at least 0.
        miss: Share of requests that may wait longer, in (0, 1).
    """
    if variability <= 0:
        return 1.0
    if slack_s <= 0:
        return -math.inf
    return 1.0 - math.log(1.0 / miss) * request_s * variability / (2.0 * slack_s)


def slotted_tail(wait_s: float, request_s: float, variability: float, utilisation: float, slots: float) -> float:
    """Return the probability that a request waits longer than ``wait_s`` for one of ``slots``.

    A request waits only when all slots are taken: with probability ``rho^(sqrt(2 (c + 1)) - 1)`` (H. Sakasegawa, *An
    approximation formula Lq = alpha rho^beta / (1 - rho)*, Ann. Inst. Stat. Math. 29, 1977), and then as Kingman's tail
    says. Bursts take slots together: ``c`` is ``slots`` over their peakedness, ``(1 + variability) / 2`` where that is
    above 1 (Hayward's approximation).

    Args:
        wait_s: Seconds; less than 0 is exceeded by every request.
        request_s: Time of the group per request with all slots in use, seconds, above 0.
        variability: Sum of the squared coefficients of variation of arrivals and of service, at least 0.
        utilisation: Share of the time that the slots are in use, at least 0; from 1 on every request waits.
        slots: Requests that are served at a time, at least 1.
    """
    if wait_s < 0 or utilisation >= 1:
        return 1.0
    exponent: float = math.sqrt(2.0 * (slots / max(1.0, (1.0 + variability) / 2.0) + 1.0)) - 1.0
    if variability <= 0:
        return 0.0 if wait_s > 0 else math.pow(utilisation, exponent)
    return math.pow(utilisation, exponent) * math.exp(-2.0 * (1.0 - utilisation) * wait_s / (request_s * variability))


def slotted_utilisation_limit(slack_s: float, request_s: float, variability: float, miss: float, slots: float) -> float:
    """Return the utilisation at which `slotted_tail` of ``slack_s`` is ``miss``, in [0, 1]; 0 where nothing may wait.

    Args:
        slack_s: Time that a request may wait, seconds.
        request_s: As for `slotted_tail`.
        variability: As for `slotted_tail`.
        miss: Share of requests that may wait longer, in (0, 1).
        slots: As for `slotted_tail`.
    """
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        late = slotted_tail(slack_s, request_s, variability, middle, slots)
        low, high = (middle, high) if late <= miss else (low, middle)
    return low
