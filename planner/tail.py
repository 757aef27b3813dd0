"""The heavy-traffic tail bound: how long a request waits, and what utilisation a deadline allows.

Source: J. F. C. Kingman, "On queues in heavy traffic", J. R. Stat. Soc. B 24 (1962): in a GI/G/1 queue near saturation
the wait is exponential with mean ``tau (ca^2 + cs^2) / (2 (1 - rho))``, so ``P(W > t) ~ exp(-2 (1 - rho) t / (tau
(ca^2 + cs^2)))``. Here ``tau`` is the group's time per request, a batch's hold of the bottleneck stage over its size.
See docs/formulation.md, section 3.
"""

from __future__ import annotations

import math

__all__ = ["miss_ratio", "utilisation_limit", "wait_s"]


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


def miss_ratio(slack_s: float, request_s: float, variability: float, utilisation: float) -> float:
    """Return the share of requests that waits longer than ``slack_s``, in [0, 1].

    At most ``utilisation`` of them find the group busy, hence the factor in front (exact for M/M/1).
    """
    if slack_s < 0 or utilisation >= 1:
        return 1.0
    if utilisation <= 0 or variability <= 0:
        return 0.0
    return utilisation * math.exp(-2.0 * (1.0 - utilisation) * slack_s / (request_s * variability))


def wait_s(quantile: float, request_s: float, variability: float, utilisation: float) -> float:
    """Return the ``quantile`` of the wait, seconds: the inverse of `miss_ratio`.

    Utilisation counts as at most 0.999, so the answer is finite.
    """
    utilisation = min(utilisation, 0.999)
    if utilisation <= 1.0 - quantile or variability <= 0:
        return 0.0
    return math.log(utilisation / (1.0 - quantile)) * request_s * variability / (2.0 * (1.0 - utilisation))
