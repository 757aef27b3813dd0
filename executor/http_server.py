"""Small HTTP servers beside the gRPC ones: with TLS and roles where those have them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from executor.roles import METRICS, Guard
from executor.tls import Credentials, check_transport, peer_identity
from plans.errors import InvalidInput

__all__ = ["http_server", "metrics_application", "role_check"]

_GRACE_S = 5.0
"""How long requests may go on once the server is told to stop."""
_LINGER_S = 10.0
"""How long a client that is refused may go on sending before its connection is closed."""

_log = logging.getLogger("executor.http")
_METRICS = "text/plain; version=0.0.4; charset=utf-8"


@contextlib.asynccontextmanager
async def http_server(
    application: web.Application,
    address: str,
    *,
    where: str,
    credentials: Credentials | None = None,
    insecure: bool = False,
    shared_port: bool = False,
) -> AsyncIterator[int]:
    """Serve ``application`` on ``address`` (``host:port``) inside the block; yield the port.

    Bodies come encoded as they were sent: what one of a few bytes holds may fill the memory.

    Args:
        application: What to serve.
        address: Where; port 0 takes a free one.
        where: The option that names the address, for errors.
        credentials: For HTTPS, where every caller shows a certificate.
        insecure: Whether to speak in the clear off loopback.
        shared_port: Whether other processes may listen on the same port.

    Raises:
        InvalidInput: The address cannot be listened on, or only with certificates.
    """
    check_transport(address, credentials, insecure=insecure, where=where)
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit() and int(port) < 65536):
        raise InvalidInput.of("host:port, such as 127.0.0.1:8000", where=where, found=repr(address))
    # aiohttp lets requests go on for this time twice, the second time without reading more of them.
    runner = web.AppRunner(
        application,
        access_log=None,
        logger=_log,
        shutdown_timeout=_GRACE_S / 2,
        handler_cancellation=True,
        lingering_time=_LINGER_S,
        auto_decompress=False,
    )
    await runner.setup()
    try:
        site = web.TCPSite(
            runner,
            host.strip("[]"),
            int(port),
            ssl_context=credentials.ssl_context() if credentials else None,
            reuse_port=shared_port or None,
        )
        try:
            await site.start()
        except OSError as error:
            remedy = "stop what listens there, or choose another address"
            expected = "an address of this machine with a free port"
            raise InvalidInput.of(expected, where=where, found=address, remedy=remedy) from error
        sockets: Any = runner.addresses
        yield int(sockets[0][1])
    finally:
        await runner.cleanup()


def _is_ours(record: logging.LogRecord) -> bool:
    """Say whether a problem is the server's: what cannot be read is the client's, who was told."""
    return not (record.exc_info and isinstance(record.exc_info[1], web.RequestPayloadError | HttpProcessingError))


_log.addFilter(_is_ours)


def metrics_application(render: Callable[[], Awaitable[bytes]], guard: Guard | None = None) -> web.Application:
    """Return an application that answers ``GET /metrics`` with what ``render`` returns.

    ``guard`` says who may ask; without one, everybody.
    """

    async def metrics(request: web.Request) -> web.Response:
        if guard is not None and (problem := role_check(guard, METRICS, request)):
            return web.Response(status=403, text=problem)
        return web.Response(body=await render(), headers={"Content-Type": _METRICS})

    application = web.Application()
    application.router.add_get("/metrics", metrics)
    return application


def role_check(guard: Guard, method: str, request: web.Request) -> str:
    """Return why the caller of ``method`` (a gRPC method's name) is refused; empty when it is let through."""
    name, roles = peer_identity(request.get_extra_info("ssl_object"))
    return guard.refusal(method, roles, peer=str(request.remote), name=name)
