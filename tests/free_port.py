"""A port that was free a moment ago, for servers that cannot tell which one they took."""

from __future__ import annotations

import socket


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])
