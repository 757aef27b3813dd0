"""The routing table in force, kept in a file so that a gateway that was killed goes on with it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pydantic import Field

from executor.state import Backend, RoutingTable, ServiceRoutes, Target
from executor.state_folder import storing
from plans.documents import FORMAT_VERSION, Document, canonical_digest, read_document, reading_stored, write_document
from plans.errors import BadStoredData

__all__ = ["RoutingJournal"]


class _Backend(Document):
    node: str
    address: str


class _Target(Document):
    group: str
    node: str
    weight: float
    variant: str
    # Left out where they are not known, so that the digest of an older table is what it was.
    share_s: float = Field(default=0.0, exclude_if=lambda seconds: not seconds)
    alone_s: float = Field(default=0.0, exclude_if=lambda seconds: not seconds)


class _Routes(Document):
    service: str
    deadline_s: float
    first_token_s: float | None = Field(default=None, exclude_if=lambda seconds: seconds is None)
    targets: tuple[_Target, ...]
    stage: str = Field(default="", exclude_if=lambda stage: not stage)


class _Table(Document):
    generation: int = Field(ge=1)
    placement_digest: str
    backends: tuple[_Backend, ...]
    services: tuple[_Routes, ...]


class _Stored(Document):
    format_version: str = FORMAT_VERSION
    digest: str
    table: _Table


class RoutingJournal:
    """One file, ``routes.json``, in a folder; every write replaces it atomically."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "routes.json"

    def read(self) -> RoutingTable | None:
        """Return the table stored last; None when none was.

        Raises:
            BadStoredData: The file is damaged.
        """
        if not self.path.exists():
            return None
        with reading_stored(self.path, remedy=_REMEDY):
            stored = read_document(self.path, _Stored)
            if stored.digest != canonical_digest([stored.table]):
                raise BadStoredData(self.path, f"its content does not match its digest; {_REMEDY}")
            return _inner(stored.table)

    async def write(self, table: RoutingTable) -> None:
        """Store ``table``; it is on the disk when this returns.

        Raises:
            StateNotStored: The folder cannot be written, or the disk is full.
        """
        stored = _outer(table)
        document = _Stored(digest=canonical_digest([stored]), table=stored)
        with storing(self.path):
            await asyncio.to_thread(write_document, self.path, document)


_REMEDY = "remove the file and run `foreplan apply` again: the gateway then gets its routes anew"


def _inner(table: _Table) -> RoutingTable:
    return RoutingTable(
        generation=table.generation,
        placement_digest=table.placement_digest,
        backends=tuple(Backend(**backend.model_dump()) for backend in table.backends),
        services=tuple(
            ServiceRoutes(
                service=routes.service,
                deadline_s=routes.deadline_s,
                first_token_s=routes.first_token_s,
                stage=routes.stage,
                targets=tuple(Target(**target.model_dump()) for target in routes.targets),
            )
            for routes in table.services
        ),
    )


def _outer(table: RoutingTable) -> _Table:
    return _Table(
        generation=table.generation,
        placement_digest=table.placement_digest,
        backends=tuple(_Backend(node=backend.node, address=backend.address) for backend in table.backends),
        services=tuple(
            _Routes(
                service=routes.service,
                deadline_s=routes.deadline_s,
                first_token_s=routes.first_token_s,
                stage=routes.stage,
                targets=tuple(
                    _Target(
                        group=target.group,
                        node=target.node,
                        weight=target.weight,
                        variant=target.variant,
                        share_s=target.share_s,
                        alone_s=target.alone_s,
                    )
                    for target in routes.targets
                ),
            )
            for routes in table.services
        ),
    )
