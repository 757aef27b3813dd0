"""What a user is told of a call that failed."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from executor.control_client import remote_failure

_ALL = "failed to connect to all addresses; last error: "
_ASKS = "Socket closed (it may ask for a certificate that it trusts: --grpc-client-cert)"


@pytest.mark.parametrize(
    ("details", "told"),
    [
        (f"{_ALL}UNKNOWN: ipv4:10.0.0.1:80: Connection refused", "Connection refused"),
        (f"{_ALL}UNAVAILABLE: ipv6:%5B::1%5D:80: Socket closed", _ASKS),
        (
            "Stream removed (Socket closed)",
            "Stream removed (Socket closed) (its connection broke: it ended, or its net",
        ),
        ("UNKNOWN: what a model says", "UNKNOWN: what a model says"),
        ("", "no details"),
    ],
)
def test_a_status_is_said_once_with_a_hint_only_where_one_helps(details: str, told: str) -> None:
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
    assert str(remote_failure("agent of a", error)).startswith(f"agent of a: UNAVAILABLE: {told}")
