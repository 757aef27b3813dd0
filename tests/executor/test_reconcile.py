from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from executor.reconcile import (
    Adopt,
    GroupView,
    LoadModel,
    ModelPhase,
    ModelView,
    Release,
    StartWorker,
    StopWorker,
    UnloadModel,
    WorkerPhase,
    deferred,
    next_time_s,
    reconcile,
)
from executor.replica import Event, Replica, advance
from executor.state import DesiredReplica, Phase, ReplicaKey


def replica(service="s", variant="v", gpu=0, *, memory=10, max_batch=1, **changed):
    settings = DesiredReplica(
        service=service,
        variant=variant,
        max_batch=max_batch,
        deadline_s=1.0,
        batch_latency_s=(0.1,) * max_batch,
        memory_bytes=(memory,),
    )
    key = ReplicaKey(group=f"n/{gpu}", service=service, variant=variant)
    return Replica(**({"key": key, "gpus": (gpu,), "settings": settings} | changed))


def model(variant="v", phase=ModelPhase.LOADED, *, memory=10, max_batch=1, not_before_s=0.0):
    return ModelView(
        variant=variant, phase=phase, max_batch=max_batch, memory_bytes=(memory,), not_before_s=not_before_s
    )


def group(*models, gpu=0, worker=WorkerPhase.READY, not_before_s=0.0):
    return GroupView(id=f"n/{gpu}", gpus=(gpu,), worker=worker, not_before_s=not_before_s, models=models)


def act(replicas, groups, *, pending=None, capacity=100, now_s=0.0):
    return reconcile(replicas, groups, pending or {}, capacity, now_s)


def test_nothing_wanted_and_nothing_there_is_nothing_to_do():
    assert act([], []) == ()


def test_a_new_group_gets_a_worker_and_then_its_models():
    assert act([replica()], []) == (StartWorker(group="n/0", gpus=(0,)),)
    assert act([replica()], [group(worker=WorkerPhase.STARTING)]) == ()
    assert act([replica()], [group()]) == (LoadModel(group="n/0", variant="v", max_batch=1, memory_bytes=(10,)),)


def test_a_model_for_two_services_is_loaded_once_and_adopted_by_the_other():
    both = [replica("a", max_batch=2), replica("b", max_batch=4)]
    assert act(both, [group()]) == (LoadModel(group="n/0", variant="v", max_batch=4, memory_bytes=(10,)),)
    late = [replica("a", phase=Phase.SERVING, committed=True), replica("b")]
    assert act(late, [group(model())]) == (Adopt(key=late[1].key),)


def test_a_worker_that_ended_is_started_again_when_its_backoff_is_over():
    ended = group(worker=WorkerPhase.ENDED, not_before_s=5.0)
    failed = replica(phase=Phase.FAILED, committed=True)
    assert act([failed], [ended], now_s=4.9) == ()
    assert next_time_s([failed], [ended], 4.9) == 5.0
    assert act([failed], [ended], now_s=5.0) == (StartWorker(group="n/0", gpus=(0,)),)


def test_a_failed_load_is_tried_again_for_what_is_committed_only():
    groups = [group(model(phase=ModelPhase.FAILED, not_before_s=5.0))]
    assert act([replica(phase=Phase.FAILED, committed=True)], groups, now_s=4.0) == ()
    assert act([replica(phase=Phase.FAILED, committed=True)], groups, now_s=5.0) != ()
    assert act([replica(phase=Phase.FAILED)], groups, now_s=5.0) == ()


def test_a_larger_batch_is_loaded_for_and_a_smaller_one_is_not():
    serving = replica(phase=Phase.SERVING, committed=True, max_batch=2)
    larger = dataclasses.replace(serving, staged=replica(max_batch=4).settings)
    assert act([larger], [group(model(max_batch=2))]) == (
        LoadModel(group="n/0", variant="v", max_batch=4, memory_bytes=(10,)),
    )
    smaller = dataclasses.replace(serving, staged=replica(max_batch=1).settings)
    assert act([smaller], [group(model(max_batch=2))]) == ()


def test_a_drained_replica_is_released_and_its_model_and_worker_go_after_it():
    draining = replica(phase=Phase.DRAINING, drain_until_s=9.0)
    assert act([draining], [group(model())], pending={draining.key: 1}, now_s=8.0) == ()
    assert act([draining], [group(model())], pending={draining.key: 1}, now_s=9.0) == (Release(key=draining.key),)
    assert act([draining], [group(model())], now_s=0.0) == (Release(key=draining.key),)
    assert act([], [group(model())]) == (UnloadModel(group="n/0", variant="v"),)
    assert act([], [group(model(phase=ModelPhase.UNLOADING))]) == ()
    assert act([], [group()]) == (StopWorker(group="n/0"),)


def test_a_group_whose_worker_ended_is_forgotten_when_nothing_is_wanted_of_it():
    assert act([], [group(worker=WorkerPhase.ENDED)]) == (StopWorker(group="n/0"),)


def test_a_staged_model_waits_while_the_old_one_holds_the_memory():
    old = replica(variant="old", memory=60, phase=Phase.SERVING, committed=True)
    new = replica(variant="new", memory=60)
    groups = [group(model("old", memory=60))]
    assert deferred([old, new], groups, 100) == (new.key,)
    assert act([old, new], groups) == ()
    assert deferred([old, new], groups, 120) == ()


def test_memory_of_a_gpu_is_shared_by_all_groups_on_it():
    old = replica(memory=60, phase=Phase.SERVING, committed=True)
    pair = dataclasses.replace(
        replica(variant="new", memory=60), gpus=(0,), key=ReplicaKey(group="n/x", service="t", variant="new")
    )
    assert deferred([old, pair], [group(model(memory=60))], 100) == (pair.key,)


def test_a_staged_model_never_takes_the_memory_of_one_that_lost_its_worker():
    crashed = replica(variant="old", memory=60, phase=Phase.FAILED, committed=True)
    staged = replica(variant="new", memory=60, gpu=0)
    ended = group(worker=WorkerPhase.ENDED, not_before_s=9.0)
    assert deferred([staged, crashed], [ended], 100) == (staged.key,)


# The law: performing the answers again and again ends, with everything that fits loaded and nothing else left.

wanted = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from("vw"), st.integers(0, 1), st.integers(1, 40), st.booleans()),
    max_size=6,
    unique_by=lambda one: one[:3],
)


def perform(action, replicas, groups):
    match action:
        case Release(key=key):
            del replicas[key]
        case Adopt(key=key):
            replicas[key] = advance(replicas[key], Event.LOADED)
        case StartWorker(group=name, gpus=gpus):
            groups[name] = GroupView(id=name, gpus=gpus, worker=WorkerPhase.READY)
            for key, one in replicas.items():
                if key.group == name and one.phase is Phase.FAILED:
                    replicas[key] = advance(one, Event.RETRIED)
        case StopWorker(group=name):
            del groups[name]
        case LoadModel(group=name, variant=variant, max_batch=size, memory_bytes=memory):
            made = ModelView(variant=variant, phase=ModelPhase.LOADED, max_batch=size, memory_bytes=memory)
            others = [one for one in groups[name].models if one.variant != variant]
            groups[name] = dataclasses.replace(groups[name], models=(*others, made))
            for key, one in replicas.items():
                if (key.group, key.variant) == (name, variant) and one.phase in (Phase.LOADING, Phase.FAILED):
                    loading = advance(one, Event.RETRIED) if one.phase is Phase.FAILED else one
                    replicas[key] = advance(loading, Event.LOADED)
        case UnloadModel(group=name, variant=variant):
            others = tuple(one for one in groups[name].models if one.variant != variant)
            groups[name] = dataclasses.replace(groups[name], models=others)


def settle(replicas, groups, capacity):
    for _ in range(50):
        actions = reconcile(tuple(replicas.values()), tuple(groups.values()), {}, capacity, 0.0)
        if not actions:
            return
        assert len(set(actions)) == len(actions)
        for action in actions:
            perform(action, replicas, groups)
        for gpu in (0, 1):
            used = sum(one.memory_bytes[0] for view in groups.values() if view.gpus == (gpu,) for one in view.models)
            assert used <= capacity
    raise AssertionError("it does not come to rest")


@given(wanted, wanted)
def test_a_node_comes_to_rest_with_what_is_wanted_and_nothing_else(first, second):
    replicas, groups = {}, {}
    for service, variant, gpu, memory, _ in first:
        one = replica(service, variant, gpu, memory=memory, committed=True)
        replicas[one.key] = one
    settle(replicas, groups, 80)
    kept = {replica(service, variant, gpu).key for service, variant, gpu, _, _ in second}
    for key, one in tuple(replicas.items()):
        if key not in kept:
            replicas[key] = advance(one, Event.RETIRED)
    for service, variant, gpu, memory, _ in second:
        one = replica(service, variant, gpu, memory=memory, committed=True)
        replicas.setdefault(one.key, one)
    settle(replicas, groups, 80)
    assert set(replicas) == kept
    waiting = set(deferred(tuple(replicas.values()), tuple(groups.values()), 80))
    assert {key for key, one in replicas.items() if one.phase is not Phase.SERVING} == waiting
    assert set(groups) == {key.group for key in kept}
    loaded = {(view.id, one.variant) for view in groups.values() for one in view.models}
    assert loaded == {(key.group, key.variant) for key in kept - waiting}
