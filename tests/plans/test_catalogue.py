from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError

from plans.catalogue import CatalogueEntry, catalogue
from plans.cluster import Cluster
from plans.documents import parse_document
from plans.errors import InvalidInput

NODE = "nodes: [{name: node-a, gpus: {type: %s, count: 2}}]"


def test_every_entry_names_its_datasheet_and_a_plain_rate() -> None:
    assert len(catalogue()) >= 30
    assert {"t4-16gb", "a100-sxm4-80gb", "l4-24gb", "h100-pcie-80gb", "mi300x-192gb"} <= catalogue().keys()
    for entry in catalogue().values():
        host = urlsplit(entry.source).hostname or ""
        assert host.endswith({"NVIDIA": ("nvidia.com", "widen.net", "web.archive.org"), "AMD": "amd.com"}[entry.vendor])
        assert "fp32" in entry.flops_per_s


def test_an_entry_without_an_address_is_refused() -> None:
    stated = catalogue()["l4-24gb"].model_dump() | {"source": "the datasheet"}
    with pytest.raises(ValidationError, match="source"):
        CatalogueEntry.model_validate(stated)


@pytest.mark.parametrize("entry", catalogue().values(), ids=catalogue().keys())
def test_figures_lie_where_devices_of_this_century_do(entry: CatalogueEntry) -> None:
    assert 10e9 < entry.memory < 1e12
    assert 150e9 < entry.memory_bandwidth < 10e12
    assert 40 <= entry.power_w <= 1500
    assert entry.host_bandwidth < entry.memory_bandwidth
    assert entry.interconnect is None or entry.host_bandwidth < entry.interconnect < entry.memory_bandwidth
    assert entry.host_bandwidth in (16e9, 32e9, 64e9, 450e9)  # PCIe 3, 4, 5 with 16 lanes, NVLink-C2C
    assert 4e12 < entry.flops_per_s["fp32"] < entry.flops_per_s["fp16"] < 1e16


@pytest.mark.parametrize("entry", catalogue().values(), ids=catalogue().keys())
def test_dense_peaks_double_from_one_number_type_to_the_next_as_tensor_units_do(entry: CatalogueEntry) -> None:
    rates = entry.flops_per_s
    plain_fp16 = entry.vendor == "AMD" and entry.memory <= 128 * 10**9  # the second generation has no faster int8
    for slow, quick in (("tf32", "fp16"), ("fp16", "fp8"), ("fp16", "int8")):
        if slow in rates and quick in rates:
            assert rates[quick] == pytest.approx(rates[slow] * (1 if plain_fp16 else 2), rel=0.03)
    assert rates.get("bf16", rates["fp16"]) == rates["fp16"]
    assert rates.get("fp8", 0) in (0, rates.get("int8"))
    assert rates.get("tf32", rates["fp32"]) >= rates["fp32"]


@pytest.mark.parametrize(
    ("small", "large", "same"),
    [
        ("a100-pcie-40gb", "a100-pcie-80gb", ("flops_per_s", "host_bandwidth", "interconnect")),
        ("a100-sxm4-40gb", "a100-sxm4-80gb", ("flops_per_s", "host_bandwidth", "interconnect", "power_w")),
        ("v100-sxm2-16gb", "v100-sxm2-32gb", ("flops_per_s", "memory_bandwidth", "power_w", "source")),
        ("gh200-96gb", "gh200-144gb", ("flops_per_s", "host_bandwidth", "interconnect", "source")),
        ("h100-sxm5-80gb", "h200-sxm-141gb", ("flops_per_s", "interconnect", "power_w")),
        ("h100-nvl-94gb", "h200-nvl-141gb", ("flops_per_s", "host_bandwidth")),
        ("mi300x-192gb", "mi325x-256gb", ("flops_per_s", "interconnect")),
    ],
)
def test_siblings_differ_in_their_memory_alone(small: str, large: str, same: tuple[str, ...]) -> None:
    one, other = catalogue()[small], catalogue()[large]
    assert one.memory < other.memory
    assert one.memory_bandwidth <= other.memory_bandwidth
    for field in same:
        assert getattr(one, field) == getattr(other, field)


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
