"""The heavy-traffic tail bound: how long a request waits, and what utilisation a deadline allows.

Source: J. F. C. Kingman, "On queues in heavy traffic", J. R. Stat. Soc. B 24 (1962): in a GI/G/1 queue near saturation
the wait is exponential with mean ``tau (ca^2 + cs^2) / (2 (1 - rho))``, so ``P(W > t) ~ exp(-2 (1 - rho) t / (tau
(ca^2 + cs^2)))``. Here ``tau`` is the group's time per request, a batch's hold of the bottleneck stage over its size.
See docs/formulation.md, section 3.
"""

from __future__ import annotations

import math

__all__ = ["utilisation_limit"]


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
