"""Certificates for tests: one authority with a holder of every role, and what goes wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from executor.certificates import init_authority, issue
from executor.roles import Role
from executor.tls import Credentials, Dialer, TlsFiles

HOSTS = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Authority:
    folder: Path

    @classmethod
    def made(cls, folder: Path) -> Authority:
        init_authority(folder)
        return cls(folder)

    def files(self, name: str) -> TlsFiles:
        return TlsFiles(
            certificate=self.folder / f"{name}.pem",
            key=self.folder / f"{name}-key.pem",
            authorities=self.folder / "ca.pem",
        )

    def issue(self, role: Role, name: str = "", *, days_ago: int = 0) -> TlsFiles:
        """Issue a certificate for a day; with ``days_ago`` it has expired."""
        start = datetime.now(UTC) - timedelta(days=days_ago)
        issue(self.folder, name or role.value, role, hosts=HOSTS, days=1, replace=True, now=start)
        return self.files(name or role.value)

    def dialer(self, role: Role) -> Dialer:
        return Dialer(Credentials(self.issue(role)))
