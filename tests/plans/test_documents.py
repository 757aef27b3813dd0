from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given

from plans import Cluster, Demand, InvalidInput, Plan, Services, parse_document, read_document, read_plan, write_plan
from plans.documents import atomic_writer, canonical_digest, write_text
from plans.service import check_against_cluster
from tests.plans.strategies import cluster, plans

CLUSTER = """\
gpu_types:
  h100-80gb: {memory: 80GiB, cost_per_hour: 3.9, load_bandwidth: 12GB/s}
nodes:
  - {name: node-a, address: "10.0.0.1:7443", gpus: {type: h100-80gb, count: 8}, intra_bandwidth: 450GB/s, zone: rack-1}
network: {bandwidth: 25Gb/s, latency: 50us}
"""
SERVICES = """\
services:
  - name: detect
    class: latency
    slo: {deadline: 150ms, attainment: 0.99}
    variants: [{model: yolos-small, accuracy: 0.61}, {model: yolos-tiny, accuracy: 0.55}]
    min_accuracy: 0.5
    pin: [node-a]
  - name: street-video
    class: frequency
    slo: {fps: 30, jitter: 10ms}
    variants: [{model: segformer-b0}]
  - name: chat
    class: generation
    slo: {ttft: 500ms, tpot: 40ms, attainment: 0.95}
    variants: [{model: llama-8b}]
workflows:
  - {name: plates, slo: {deadline: 400ms}, edges: [{from: detect, to: chat, fanout: 1.6, bytes: 150KB}]}
"""


def faults(text, kind):
    with pytest.raises(InvalidInput) as caught:
        parse_document(text, kind, where="file.yaml")
    return caught.value.faults


def test_the_documents_of_the_manual_are_accepted():
    inventory = parse_document(CLUSTER, Cluster, where="c")
    assert inventory.gpu_types["h100-80gb"].memory_bytes == 80 * 2**30
    assert inventory.network.latency_s == pytest.approx(50e-6)
    assert len(list(inventory.gpus())) == 8
    services = parse_document(SERVICES, Services, where="s")
    assert [s.request_class for s in services.services] == ["latency", "frequency", "generation"]
    assert services.service("street-video").deadline_s() == pytest.approx(1 / 30 + 0.01)
    assert services.service("chat").deadline_s(101) == pytest.approx(0.5 + 100 * 0.04)
    assert services.workflows[0].edges[0].payload_bytes == 150_000


def test_all_faults_come_at_once_each_with_its_line():
    found = faults(
        "services:\n"
        "  - {name: a, class: frequency, slo: {fps: 30, attainment: 1.2}, variants: [{model: m}]}\n"
        "  - name: b\n"
        "    slo: {deadline: soon}\n"
        "    variants: [{model: m}]\n"
        "    colour: red\n",
        Services,
    )
    assert [(f.line, f.field) for f in found] == [
        (2, "services[0].slo.attainment"),
        (4, "services[1].slo.deadline"),
        (6, "services[1].colour"),
    ]
    assert found[0].expected == "less than 1"
    assert "duration such as 150ms" in found[1].expected
    assert found[2].found == "an unknown field"
    assert "file.yaml:4: services[1].slo.deadline: found 'soon'" in str(found[1])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (("80GiB", "-80GiB"), "gpu_types.h100-80gb.memory"),
        (("count: 8", "count: 0"), "nodes[0].gpus.count"),
        (("count: 8", "count: eight"), "nodes[0].gpus.count"),
        (("cost_per_hour: 3.9", "cost_per_hour: .nan"), "gpu_types.h100-80gb.cost_per_hour"),
        (('"10.0.0.1:7443"', "nowhere"), "nodes[0].address"),
        (('"10.0.0.1:7443"', '"10.0.0.1:65536"'), "nodes[0].address"),
        (('"10.0.0.1:7443"', '"10.0.0.1:0"'), "nodes[0].address"),
        (("type: h100-80gb", "type: h200"), "nodes[0].gpus.type"),
        (("name: node-a", 'name: "../etc"'), "nodes[0].name"),
    ],
)
def test_impossible_values_are_named(change, field):
    assert [f.field for f in faults(CLUSTER.replace(*change), Cluster)] == [field]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("min_accuracy: 0.5", "min_accuracy: 0.9"), "the best has 0.61"),
        (("name: chat", "name: detect"), "a name of its own"),
        (("to: chat", "to: nobody"), "known services"),
        (("to: chat", "to: detect"), "circle"),
        (("class: latency", "class: best-effort"), "latency"),
        (("{model: yolos-tiny, accuracy: 0.55}", "{model: yolos-small}"), "another model"),
    ],
)
def test_documents_that_contradict_themselves_are_refused(change, expected):
    assert expected in " ".join(f.expected for f in faults(SERVICES.replace(*change), Services))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("name: chat", "name: detect"), "services[2].name: found 'detect' again, expected a name of its own"),
        (("class: latency", "class: best-effort"), ".class: found 'best-effort', expected one of 'latency', "),
        (("[{model: yolos-small", "7 # "), ".variants: found 7, expected a list"),
        (("[{model: yolos-small", "[] # "), ".variants: found none, expected at least 1"),
    ],
)
def test_a_fault_is_told_in_the_words_of_the_file(change, expected):
    found = [str(fault) for fault in faults(SERVICES.replace(*change), Services)]
    assert any(expected in fault for fault in found), found


def test_an_empty_file_and_an_alias_within_itself_are_called_so():
    assert faults("", Cluster)[0].found == "an empty file"
    assert faults("nodes: &a [*a]", Cluster)[0].found.startswith("an alias that holds itself")


@pytest.mark.parametrize("text", ["", "[1, 2]", "{a: 1", "a: 1\na: 2", "\x00", "just a word", "{" * 5000])
def test_what_is_no_mapping_is_refused(text):
    assert faults(text, Cluster)[0].where == "file.yaml"


@pytest.mark.parametrize(
    "value",
    [
        "9" * 5000, "0x" + "f" * 5000, '!!int ""', "!!int nine", "!!float nine", "!!bool maybe", "!!timestamp soon",
        "!!float 1" + ":1" * 400,
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_read_is_named_with_its_line(value):
    fault = faults(CLUSTER.replace("25Gb/s", value), Cluster)[0]
    assert (fault.line, "which cannot be read as" in fault.found) == (5, True)
    assert len(fault.found) < 100


def test_a_repeated_key_is_named_with_its_line():
    fault = faults(CLUSTER + "network: {}\n", Cluster)[0]
    assert (fault.line, "'network' twice" in fault.found) == (6, True)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"nothing\.yaml"):
        read_document(tmp_path / "nothing.yaml", Cluster)


def test_pins_must_name_places_of_the_cluster():
    services = parse_document(SERVICES.replace("pin: [node-a]", "pin: [node-z]"), Services, where="s")
    with pytest.raises(InvalidInput, match=r"services\[0\]\.pin: found 'node-z'"):
        check_against_cluster(services, cluster(), where="services.yaml")


@given(plans())
def test_a_plan_reads_back_as_it_was_written(tmp_path_factory, one):
    """Law: decode after encode is the identity."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_plan(path, one)
    assert read_plan(path) == one


def test_an_unknown_major_version_is_refused_and_a_newer_minor_adds_fields(tmp_path):
    path = tmp_path / "plan.json"
    text = '{"format_version": "%s", "solver": {"name": "x", "status": "optimal", "objective": 0, "bound": 0, '
    text += '"gap": 0, "wall_s": 0, "seed": 0}, "colour": "red"}'
    path.write_text(text % "1.7")
    assert read_plan(path).groups == ()
    for version in ("2.0", "0.9"):
        path.write_text(text % version)
        with pytest.raises(InvalidInput, match="major version 1"):
            read_plan(path)
    path.write_text(text % "1.0")
    with pytest.raises(InvalidInput, match="colour"):
        read_plan(path)
    for version in ("one", "1", "1.", "1.\u00b2", "1." + "9" * 5000):
        path.write_text(text % version)
        with pytest.raises(InvalidInput, match="format_version"):
            read_plan(path)


@given(plans())
def test_a_plan_cut_short_is_refused_not_half_read(tmp_path_factory, one):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_plan(path, one)
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(InvalidInput):
        read_plan(path)


def test_routes_and_groups_must_agree():
    base = {"solver": {"name": "x", "status": "optimal", "objective": 0, "bound": 0, "gap": 0, "wall_s": 0, "seed": 0}}
    with pytest.raises(ValueError, match="does not"):
        Plan.model_validate(base | {"routes": {"detect": [{"group": "node-0/0", "weight": 1.0}]}})


def test_demand_quantiles_must_not_fall():
    text = (
        'window_s: 60\nservices:\n  - {service: a, rate_rps: [{mean: 1, quantiles: {"0.5": 3, "0.9": 2}}]}\n'
        '  - {service: b, rate_rps: [{mean: -1}]}\n  - {service: c, rate_rps: [{mean: 1, quantiles: {"1.5": 3}}]}\n'
    )
    assert [f.field for f in faults(text, Demand)] == [
        "services[0].rate_rps[0].quantiles",
        "services[1].rate_rps[0].mean",
        "services[2].rate_rps[0].quantiles",
    ]


def test_a_quantile_between_two_is_interpolated_and_never_extrapolated():
    text = (
        'window_s: 60\nservices:\n  - {service: a, rate_rps: [{mean: 1, quantiles: {"0.5": 2, "0.9": 4}}, {mean: 3}]}\n'
    )
    demand = parse_document(text, Demand, where="d").of("a")
    assert demand is not None
    assert [demand.rate_rps[0].at(level) for level in (0.1, 0.5, 0.7, 0.99)] == pytest.approx([2, 2, 3, 4])
    assert demand.peak_rps(0.5) == 3


def test_a_digest_ignores_comments_order_and_spelling_of_units():
    one = parse_document(CLUSTER, Cluster, where="c")
    other = parse_document("# hello\n" + CLUSTER.replace("80GiB", "81920MiB"), Cluster, where="c")
    changed = parse_document(CLUSTER.replace("80GiB", "81GiB"), Cluster, where="c")
    assert canonical_digest([one]) == canonical_digest([other]) != canonical_digest([changed])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def interrupted():
        with atomic_writer(path) as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_file_that_it_has_no_room_for(tmp_path):
    def full():
        with atomic_writer(tmp_path / "x.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: '.*x\.json'"):
        full()
    assert list(tmp_path.iterdir()) == []


def test_writing_into_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InvalidInput, match="writable folder"):
        write_text(tmp_path / "no" / "file", "text")
