r"""What a node was last told to run, kept on disk so that an agent which died takes up where it was.

One file, ``committed.foreplan``, replaced atomically at every commit::

    FOREPLAN-AGENT-JOURNAL 1\n     what it is, and the version of the layout
    <crc32, 8 hex> <bytes>\n       of what follows
    foreplan.control.v1.DesiredState, serialised

Beside it, an empty file ``drained`` while an operator keeps the node out of the rotation.

A file that cannot be believed stops the agent: running nothing, or half of something, would be worse.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from google.protobuf.message import DecodeError

from executor.proto import control_pb2 as pb
from executor.state import DesiredState
from executor.state_folder import made_folder, storing
from executor.wire import desired_state_from_proto, desired_state_to_proto
from plans.documents import atomic_writer
from plans.errors import BadStoredData, InvalidInput

__all__ = ["Journal"]

_MAGIC = b"FOREPLAN-AGENT-JOURNAL"
_VERSION = b"1"
_HEADER = re.compile(rb"\A(FOREPLAN-AGENT-JOURNAL) ([0-9]+)\n([0-9a-f]{8}) ([0-9]+)\n")
_REMEDY = "move the file away to start empty, then run `foreplan apply` again"


class Journal:
    """The committed desired state of one node, in the folder ``state_dir``, which is made when missing.

    Raises:
        InvalidInput: The folder cannot be made.
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = made_folder(state_dir) / "committed.foreplan"
        self._drained = self.path.with_name("drained")

    def write(self, state: DesiredState) -> None:
        """Replace what is stored; after a crash at any moment the file holds the old state or the new one.

        Raises:
            StateNotStored: The folder cannot be written, or the disk is full.
        """
        body = desired_state_to_proto(state).SerializeToString(deterministic=True)
        with storing(self.path), atomic_writer(self.path) as stream:
            stream.write(b"%s %s\n%08x %d\n" % (_MAGIC, _VERSION, zlib.crc32(body), len(body)))
            stream.write(body)

    def clear(self) -> None:
        """Forget what is stored.

        Raises:
            StateNotStored: The folder cannot be written.
        """
        with storing(self.path):
            self.path.unlink(missing_ok=True)

    def write_drained(self, drained: bool) -> None:
        """Note whether the node is drained.

        Raises:
            StateNotStored: The folder cannot be written.
        """
        with storing(self._drained):
            if drained:
                self._drained.touch()
            else:
                self._drained.unlink(missing_ok=True)

    def read_drained(self) -> bool:
        """Return whether the node is drained."""
        return self._drained.exists()

    def read(self) -> DesiredState | None:
        """Return what is stored, or None when nothing was ever committed.

        Raises:
            BadStoredData: The file is damaged, or of another version.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadStoredData(self.path, f"cannot be read: {error.strerror}") from error
        header = _HEADER.match(content)
        if header is None:
            raise BadStoredData(self.path, f"this is no journal of an agent, or its header is damaged; {_REMEDY}")
        if header[2] != _VERSION:
            problem = f"version {header[2].decode()} of the journal is not known here, expected {_VERSION.decode()}"
            raise BadStoredData(self.path, f"{problem}; start the agent of the Foreplan that wrote it")
        body = content[header.end() :]
        if len(body) != int(header[4]) or zlib.crc32(body) != int(header[3], 16):
            raise BadStoredData(self.path, f"the content does not match its checksum; {_REMEDY}")
        try:
            return desired_state_from_proto(pb.DesiredState.FromString(body))
        except (DecodeError, InvalidInput) as error:
            raise BadStoredData(self.path, f"the content is no desired state ({error}); {_REMEDY}") from error
