"""What a node was last told to run, kept on disk so that an agent which died takes up where it was.

One SQLite database, ``journal.sqlite``, in WAL mode and synced at every commit. Its ``user_version`` is the version of
the layout, and its only table has one row::

    node(id = 1, desired, drained, checksum)

``desired`` is a serialised ``foreplan.control.v1.DesiredState``, empty before the first commit; ``drained`` says if an
operator keeps the node out of the rotation; ``checksum`` is the crc32 of both, as SQLite keeps none of its pages.

The database is made beside its place and moved there complete, so one without its table is damaged, not new. It is
open only while it is read or written, and exclusively: then SQLite needs no ``-shm`` file, and after a kill at any
moment the next to open it finds the old row or the new one.

A database that cannot be believed stops the agent: running nothing, or half of something, would be worse.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

from executor.errors import StateNotStored
from executor.proto import control_pb2 as pb
from executor.state import DesiredState
from executor.state_folder import made_folder, storing
from executor.wire import desired_state_from_proto, desired_state_to_proto
from plans.errors import BadStoredData, InvalidInput

__all__ = ["Journal"]

_VERSION = 1
_SCHEMA = """
PRAGMA user_version = 1;
CREATE TABLE node (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  desired BLOB NOT NULL,
  drained INTEGER NOT NULL,
  checksum INTEGER NOT NULL
);
PRAGMA journal_mode = WAL;
"""
_REMEDY = "move the files journal.sqlite* away to start empty, then run `foreplan apply` again"
_KEPT_OUT = (
    "the journal itself may be whole: free space, inodes or open files, correct the permissions, or end what holds it"
)
_OUTSIDE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
    }
)
"""Primary codes of SQLite for what stands between it and a file, whatever the file holds."""
_SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)  # the second where a message of SQLite quotes a damaged page
_OLD_REMEDY = "finish with the Foreplan that wrote it, or move the file away and run `foreplan apply` again"


class Journal:
    """The committed desired state of one node, in the folder ``state_dir``, which is made when missing.

    Raises:
        InvalidInput: The folder cannot be made.
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = made_folder(state_dir) / "journal.sqlite"

    def write(self, state: DesiredState) -> None:
        """Replace what is stored; after a crash at any moment the old state is there or the new one.

        Raises:
            StateNotStored: The folder cannot be written, the disk is full, or another process holds the database.
            BadStoredData: As for `read`.
        """
        self._change(desired=desired_state_to_proto(state).SerializeToString(deterministic=True))

    def clear(self) -> None:
        """Forget what was committed.

        Raises:
            StateNotStored: The folder cannot be written.
            BadStoredData: As for `read`.
        """
        self._change(desired=b"")

    def write_drained(self, drained: bool) -> None:
        """Note whether the node is drained.

        Raises:
            StateNotStored: The folder cannot be written.
            BadStoredData: As for `read`.
        """
        self._change(drained=drained)

    def read_drained(self) -> bool:
        """Return whether the node is drained.

        Raises:
            BadStoredData: As for `read`.
        """
        return self._stored()[1]

    def read(self) -> DesiredState | None:
        """Return what is stored, or None when nothing was ever committed.

        Raises:
            BadStoredData: The database is damaged, of another version, or cannot be opened.
        """
        desired, _ = self._stored()
        if not desired:
            return None
        try:
            return desired_state_from_proto(pb.DesiredState.FromString(desired))
        except (DecodeError, InvalidInput) as error:
            raise BadStoredData(self.path, f"the content is no desired state ({error}); {_REMEDY}") from error

    def _stored(self) -> tuple[bytes, bool]:
        """Return the serialised state, empty for none, and whether the node is drained."""
        if not self.path.exists():
            self._refuse_file_journal()
            return b"", False
        try:
            with self._opened() as connection:
                return self._row(connection)
        except _SQLITE_ERRORS as error:
            raise self._unreadable(error) from error

    def _change(self, *, desired: bytes | None = None, drained: bool | None = None) -> None:
        """Store what is not None."""
        try:
            if not self.path.exists():
                self._refuse_file_journal()
                self._make()
            with self._opened() as connection, connection:
                was_desired, was_drained = self._row(connection)
                desired = was_desired if desired is None else desired
                drained = was_drained if drained is None else drained
                row = (desired, drained, _checksum(desired, drained))
                connection.execute("UPDATE node SET desired = ?, drained = ?, checksum = ?", row)
        except _SQLITE_ERRORS as error:
            if not _is_outside(error):
                raise self._unreadable(error) from error
            raise StateNotStored(f"{self.path} cannot be written: {error}; {_KEPT_OUT}, and try again") from error

    def _unreadable(self, error: Exception) -> BadStoredData:
        remedy = f"{_KEPT_OUT}, and start again" if _is_outside(error) else _REMEDY
        return BadStoredData(self.path, f"cannot be read: {error}; {remedy}")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path.absolute().as_uri() + "?mode=rw", uri=True)) as connection:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA synchronous = FULL")
            yield connection

    def _row(self, connection: sqlite3.Connection) -> tuple[bytes, bool]:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            raise BadStoredData(self.path, f"this is no journal of an agent, or a damaged one; {_REMEDY}")
        if version != _VERSION:
            problem = f"version {version} of the journal is not known here, expected {_VERSION}"
            raise BadStoredData(self.path, f"{problem}; start the agent of the Foreplan that wrote it")
        rows = connection.execute("SELECT desired, drained, checksum FROM node").fetchall()
        if len(rows) != 1 or not isinstance(rows[0][0], bytes) or rows[0][1] not in (0, 1):
            raise BadStoredData(self.path, f"its row is damaged; {_REMEDY}")
        desired, drained, checksum = rows[0]
        if checksum != _checksum(desired, drained):
            raise BadStoredData(self.path, f"the content does not match its checksum; {_REMEDY}")
        return desired, bool(drained)

    def _make(self) -> None:
        """Make the database beside its place, and move it there."""
        new = self.path.with_name(f"{self.path.name}.new")
        with storing(self.path):
            for left in (new, *(path.with_name(f"{path.name}-wal") for path in (new, self.path))):
                left.unlink(missing_ok=True)  # of a process that was killed here, or of a database moved away
            with contextlib.closing(sqlite3.connect(new)) as connection:
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
                connection.executescript(_SCHEMA)
                with connection:
                    connection.execute("INSERT INTO node VALUES (1, ?, 0, ?)", (b"", _checksum(b"", False)))
            new.replace(self.path)
            _sync(self.path.parent)

    def _refuse_file_journal(self) -> None:
        old = self.path.with_name("committed.foreplan")
        if old.exists():
            raise BadStoredData(old, f"this is the journal of an older Foreplan, which kept a file; {_OLD_REMEDY}")


def _is_outside(error: Exception) -> bool:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in _OUTSIDE


def _checksum(desired: bytes, drained: bool) -> int:
    return zlib.crc32(bytes([drained]) + desired)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
