"""A port that is free, for servers that cannot tell which one they took, or come back on the one they had."""

from __future__ import annotations

from foreplan.ports import free_ports


def free_port() -> int:
    return free_ports(1)[0]
