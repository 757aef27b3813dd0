"""The formats that can be imported, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from plans.errors import InvalidInput
from profiles.importing.generation import read_aiconfigurator, read_genai_perf, read_vllm
from profiles.importing.ledger import Imported, ImportOptions
from profiles.importing.servers import read_mlperf, read_perf_analyzer
from profiles.importing.tables import read_alpaserve, read_melange, read_proteus, read_vidur

__all__ = ["FORMATS", "Format", "import_profiles"]


@dataclass(frozen=True, slots=True)
class Format:
    """A format: what reads it, and what it is, in one line."""

    read: Callable[[Path, ImportOptions], Imported]
    description: str


FORMATS: Mapping[str, Format] = {
    "aiconfigurator": Format(read_aiconfigurator, "AIConfigurator result CSV"),
    "aiperf": Format(read_genai_perf, "AIPerf profile_export_aiperf.json"),
    "alpaserve": Format(read_alpaserve, "AlpaServe-style table: stage latencies by configuration, JSON"),
    "genai-perf": Format(read_genai_perf, "GenAI-Perf CSV or JSON"),
    "melange": Format(read_melange, "Melange throughputs by bucket, JSON"),
    "mlperf": Format(read_mlperf, "MLPerf mlperf_log_summary.txt, or a CSV of results"),
    "perf-analyzer": Format(read_perf_analyzer, "Triton perf_analyzer CSV or JSON export"),
    "proteus": Format(read_proteus, "Proteus CSV: small models by batch"),
    "vidur": Format(read_vidur, "Vidur mlp.csv"),
    "vllm": Format(read_vllm, "vllm bench serve JSON"),
}
"""Every format that can be imported."""


def import_profiles(kind: str, path: Path, options: ImportOptions | None = None) -> Imported:
    """Read ``path`` as a ``kind`` of `FORMATS`.

    Raises:
        InvalidInput: The format is unknown, the file is none of it, or no row of it can be taken.
    """
    found = FORMATS.get(kind)
    if found is None:
        raise InvalidInput.of("one of " + ", ".join(FORMATS), field="FORMAT", found=repr(kind))
    return found.read(path, options or ImportOptions())
