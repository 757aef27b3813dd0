"""Ports for servers that are told where to listen before they are started."""

from __future__ import annotations

import contextlib
import random
import socket

__all__ = ["free_ports"]


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface that nothing listens on.

    They are not of those that the system gives to outgoing connections (Linux: from 32,768 on), so that none of these
    takes one before it is listened on, or while what listens there is started again.
    """
    found: list[int] = []
    candidates = iter(random.SystemRandom().sample(range(12_000, 32_000), 2_000))
    while len(found) < count:
        port = next(candidates)
        with socket.socket() as held, contextlib.suppress(OSError):
            held.bind(("127.0.0.1", port))
            found.append(port)
    return found
