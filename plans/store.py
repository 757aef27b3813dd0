"""A directory of plans: every plan that was applied, by digest, and which generation is current.

::

    store/
      plans/sha256-<digest of the file>.json
      generations/0000000007.json        {"generation": 7, "plan": "sha256-…", "applied_at": "…"}
      current                            the number of the current generation

Files are only ever added or replaced whole, so a kill at any point leaves the old state or the new one.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from plans.codec import read_plan
from plans.documents import Document, read_document, reading_stored, write_text
from plans.errors import BadStoredData, InvalidInput
from plans.plan import Plan

__all__ = ["PlanStore", "StoredPlan"]

_NUMBER = re.compile("[0-9]{1,10}")
"""A generation, in as many digits as the name of its file has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPlan:
    """One generation in the store."""

    generation: int
    name: str
    applied_at: str
    path: Path


class _Record(Document):
    """What a file in ``generations`` holds."""

    generation: int = Field(ge=1)
    plan: str = Field(pattern="^sha256-[0-9a-f]{64}$")
    applied_at: str


class PlanStore:
    """The store at ``root``; the folder is made when the first plan is put in."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, plan: Plan) -> str:
        """Store a plan and return its name, ``sha256-…``; storing the same plan again mends a damaged file."""
        text = plan.model_dump_json(indent=2, by_alias=True) + "\n"
        name = f"sha256-{hashlib.sha256(text.encode()).hexdigest()}"
        path = self._plan_path(name)
        if not path.exists() or path.read_bytes() != text.encode():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        return name

    def get(self, name: str) -> Plan:
        """Return the plan stored as ``name``.

        Raises:
            InvalidInput: There is no such plan.
            BadStoredData: Its file does not have the content that its name promises.
        """
        path = self._plan_path(name)
        if not path.is_file():
            remedy = "restore it from a backup, or name another generation"
            raise InvalidInput.of("the file of a stored plan", where=path, found="no such file", remedy=remedy)
        if f"sha256-{hashlib.sha256(path.read_bytes()).hexdigest()}" != name:
            raise BadStoredData(path, "its content does not match its digest; restore it from a backup or delete it")
        return read_plan(path)

    def names(self) -> tuple[str, ...]:
        """Return the name of every plan, the one stored last first; also of those that were never noted as live."""
        files = [path for path in (self.root / "plans").glob("sha256-*.json") if path.is_file()]
        return tuple(path.stem for path in sorted(files, key=lambda path: (-path.stat().st_mtime_ns, path.name)))

    def record(self, generation: int, plan: Plan, *, applied_at: str) -> StoredPlan:
        """Store ``plan`` as ``generation`` and make it current."""
        name = self.put(plan)
        path = self._generation_path(generation)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"generation": generation, "plan": name, "applied_at": applied_at}
        write_text(path, json.dumps(content, indent=2) + "\n")
        write_text(self.root / "current", f"{generation}\n")
        return StoredPlan(generation=generation, name=name, applied_at=applied_at, path=self._plan_path(name))

    def current(self) -> StoredPlan | None:
        """Return the current generation, or None in an empty store.

        Raises:
            BadStoredData: The pointer or what it points to is damaged.
        """
        pointer = self.root / "current"
        if not pointer.exists():
            return None
        text = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not _NUMBER.fullmatch(text):
            raise BadStoredData(pointer, f"a generation number was expected, found {text[:40]!r}")
        return self.generation(int(text))

    def generation(self, number: int) -> StoredPlan:
        """Return generation ``number``.

        Raises:
            InvalidInput: It is not in the store.
            BadStoredData: Its record is damaged.
        """
        path = self._generation_path(number)
        if not path.is_file():
            known = ", ".join(str(stored.generation) for stored in self.generations()) or "none"
            raise InvalidInput.of(f"a stored generation ({known})", where=self.root, found=number)
        return self._read(path)

    def generations(self) -> tuple[StoredPlan, ...]:
        """Return every generation, oldest first."""
        return tuple(self._read(path) for path in sorted((self.root / "generations").glob("*.json")))

    def _read(self, path: Path) -> StoredPlan:
        with reading_stored(path, remedy="restore this generation record from a backup or delete it"):
            record = read_document(path, _Record)
        return StoredPlan(
            generation=record.generation,
            name=record.plan,
            applied_at=record.applied_at,
            path=self._plan_path(record.plan),
        )

    def _plan_path(self, name: str) -> Path:
        return self.root / "plans" / f"{name}.json"

    def _generation_path(self, number: int) -> Path:
        return self.root / "generations" / f"{number:010d}.json"
