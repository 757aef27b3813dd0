"""All profiles at hand: a folder of profile documents, looked up by model and GPU type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from plans.documents import canonical_digest, read_document
from plans.errors import Fault, InvalidInput
from profiles.document import Phase, Profile
from profiles.generation import compose_whole, whole_parallelisms
from profiles.latency import LatencyModel

__all__ = ["ProfileLibrary"]


class ProfileLibrary:
    """Profiles by (model, GPU type); iterating yields them sorted by these.

    Raises:
        InvalidInput: Two profiles are of one model and GPU type.
    """

    def __init__(self, profiles: Iterable[Profile]) -> None:
        listed = tuple(profiles)
        _check_unique([(profile, "") for profile in listed])
        self._profiles = {(p.model, p.gpu_type): p for p in sorted(listed, key=lambda p: (p.model, p.gpu_type))}
        self._models: dict[tuple[str, str, int, int, float | None, float | None, Phase], LatencyModel] = {}

    @classmethod
    def read(cls, folder: Path) -> ProfileLibrary:
        """Read every ``*.json`` under ``folder``.

        Raises:
            InvalidInput: The folder holds no profile, or some file is none, or two are of one model and GPU type; the
                faults of all files at once.
        """
        if not folder.is_dir():
            raise InvalidInput.of(
                "a folder of profile documents", where=folder, found="no folder", remedy="make one with `profile run`"
            )
        paths = sorted(path for path in folder.rglob("*.json") if path.is_file())
        if not paths:
            raise InvalidInput.of("at least one profile (*.json)", where=folder, found="none")
        faults: list[Fault] = []
        found: list[tuple[Profile, str]] = []
        for path in paths:
            try:
                found.append((read_document(path, Profile), str(path)))
            except InvalidInput as error:
                faults.extend(error.faults)
        try:
            _check_unique(found)
        except InvalidInput as error:
            faults.extend(error.faults)
        if faults:
            raise InvalidInput(faults)
        return cls(profile for profile, _ in found)

    def __iter__(self) -> Iterator[Profile]:
        return iter(self._profiles.values())

    def __len__(self) -> int:
        return len(self._profiles)

    @property
    def digest(self) -> str:
        """Digest of the content: the order and layout of the files do not count."""
        return canonical_digest(self)

    def profile(self, model: str, gpu_type: str) -> Profile | None:
        """Return the profile of ``model`` on ``gpu_type``, or None."""
        return self._profiles.get((model, gpu_type))

    def parallelisms(self, model: str, gpu_type: str) -> tuple[tuple[int, int], ...]:
        """Return every (tp, pp) that the profile of ``model`` on ``gpu_type`` tells whole requests for, sorted.

        That is one with rows of whole requests, or with rows of both prefill and decode.
        """
        profile = self.profile(model, gpu_type)
        return whole_parallelisms(profile) if profile else ()

    def latency(
        self,
        model: str,
        gpu_type: str,
        tp: int,
        pp: int,
        *,
        input_tokens: float | None = None,
        output_tokens: float | None = None,
        phase: Phase = "whole",
    ) -> LatencyModel | None:
        """Return the latency model of ``model`` on ``gpu_type`` at this parallelism, or None without rows for it.

        Whole requests of a model that was measured by phases are put together from these (`profiles.generation`).
        """
        profile = self.profile(model, gpu_type)
        if profile is None:
            return None
        key = (model, gpu_type, tp, pp, input_tokens, output_tokens, phase)
        if key not in self._models:
            found = _rows_for(profile, tp, pp, input_tokens, output_tokens, phase)
            if found is None:
                return None
            self._models[key] = LatencyModel(found, tp, pp, input_tokens, output_tokens, phase)
        return self._models[key]


def _rows_for(
    profile: Profile, tp: int, pp: int, input_tokens: float | None, output_tokens: float | None, phase: Phase
) -> Profile | None:
    """Return the profile that has rows of ``phase`` at this parallelism: this one, or one composed from its phases."""
    if any((row.tp, row.pp, row.phase) == (tp, pp, phase) for row in profile.rows):
        return profile
    if phase == "whole" and (tp, pp) in whole_parallelisms(profile):
        return compose_whole(profile, tp, pp, input_tokens, output_tokens)
    return None


def _check_unique(found: list[tuple[Profile, str]]) -> None:
    first: dict[tuple[str, str], str] = {}
    faults = []
    for profile, where in found:
        key = (profile.model, profile.gpu_type)
        if key in first:
            faults.append(
                Fault(
                    where=where,
                    found=f"a second profile of {profile.model} on {profile.gpu_type}",
                    expected="one profile per model and GPU type",
                    remedy=f"keep this one or {first[key]}" if first[key] else "keep one of them",
                )
            )
        first.setdefault(key, where)
    if faults:
        raise InvalidInput(faults)
