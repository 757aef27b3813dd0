from __future__ import annotations

import pytest

from plans.catalogue import CatalogueEntry, catalogue
from plans.cluster import Cluster
from plans.documents import parse_document
from plans.errors import InvalidInput

NODE = "nodes: [{name: node-a, gpus: {type: %s, count: 2}}]"


def test_every_entry_names_its_source_and_a_plain_rate() -> None:
    assert {"t4-16gb", "a100-sxm4-80gb", "l4-24gb", "h100-pcie-80gb", "mi300x-192gb"} <= catalogue().keys()
    for entry in catalogue().values():
        assert "datasheet" in entry.source
        assert "fp32" in entry.flops_per_s


@pytest.mark.parametrize("entry", catalogue().values(), ids=catalogue().keys())
def test_figures_lie_where_devices_of_this_century_do(entry: CatalogueEntry) -> None:
    assert 10e9 < entry.memory < 1e12
    assert entry.host_bandwidth < entry.memory_bandwidth
    assert 4e12 < entry.flops_per_s["fp32"] < entry.flops_per_s["fp16"] < 1e16
    if "int8" in entry.flops_per_s:
        assert entry.flops_per_s["fp16"] <= entry.flops_per_s["int8"]


def test_the_memory_in_a_name_is_the_memory_of_the_entry() -> None:
    for name, entry in catalogue().items():
        assert name.endswith(f"-{entry.memory // 10**9}gb")


@pytest.mark.parametrize("stated", ["{cost_per_hour: 0.8}", "{}", ""])
def test_a_cluster_may_name_a_type_of_the_catalogue_without_its_memory(stated: str) -> None:
    cluster = parse_document(f"gpu_types: {{l4-24gb: {stated}}}\n{NODE % 'l4-24gb'}", Cluster, where="c.yaml")
    assert cluster.gpu_types["l4-24gb"].memory_bytes == 24 * 10**9


def test_what_a_cluster_states_goes_before_the_catalogue() -> None:
    text = f"gpu_types: {{l4-24gb: {{memory: 20GiB}}}}\n{NODE % 'l4-24gb'}"
    assert parse_document(text, Cluster, where="c.yaml").gpu_types["l4-24gb"].memory_bytes == 20 * 2**30


def test_an_unknown_type_still_has_to_state_its_memory() -> None:
    with pytest.raises(InvalidInput, match="memory"):
        parse_document(f"gpu_types: {{mine: {{cost_per_hour: 1}}}}\n{NODE % 'mine'}", Cluster, where="c.yaml")
