from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from executor.reconcile import (
    Adopt,
    Charge,
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
    st.tuples(st.sampled_from("ab"), st.sampled_from("vw"), st.integers(0, 1), st.integers(1, 60), st.integers(1, 4)),
    max_size=6,
    unique_by=lambda one: one[:3],
)


def loaded(one):
    return advance(advance(one, Event.RETRIED) if one.phase is Phase.FAILED else one, Event.LOADED)


def perform(action, replicas, groups):
    match action:
        case Release(key=key):
            del replicas[key]
        case Adopt(key=key):
            replicas[key] = loaded(replicas[key])
        case Charge(group=name, variant=variant, memory_bytes=memory):
            models = groups[name].models
            charged = [
                dataclasses.replace(one, memory_bytes=memory) if one.variant == variant else one for one in models
            ]
            groups[name] = dataclasses.replace(groups[name], models=tuple(charged))
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
                    replicas[key] = loaded(one)
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
    """Replicas come, go, grow and shrink; whatever fits is loaded as large as it is wanted."""
    replicas, groups = {}, {}
    for service, variant, gpu, memory, max_batch in first:
        one = replica(service, variant, gpu, memory=memory, max_batch=max_batch, committed=True)
        replicas[one.key] = one
    settle(replicas, groups, 80)
    goal = {}
    for service, variant, gpu, memory, max_batch in second:
        one = replica(service, variant, gpu, memory=memory, max_batch=max_batch, committed=True)
        goal[one.key] = one
    for key, one in tuple(replicas.items()):
        if key not in goal:
            replicas[key] = advance(one, Event.RETIRED)
    for key, one in goal.items():
        replicas[key] = dataclasses.replace(replicas[key], settings=one.settings) if key in replicas else one
    settle(replicas, groups, 80)
    assert set(replicas) == set(goal)
    assert set(groups) == {key.group for key in goal}
    waiting = set(deferred(tuple(replicas.values()), tuple(groups.values()), 80))
    assert all(one.phase is Phase.SERVING for key, one in replicas.items() if key not in waiting)
    sizes = {}
    for key, one in goal.items():
        sizes[key.group, key.variant] = max(sizes.get((key.group, key.variant), 0), one.memory_bytes[0])
    found = {(view.id, one.variant): one for view in groups.values() for one in view.models}
    for key, one in goal.items():
        if key not in waiting:
            assert found[key.group, key.variant].memory_bytes == (sizes[key.group, key.variant],)
            assert found[key.group, key.variant].max_batch >= one.max_batch_needed
    totals = {name: sum(size for (group, _), size in sizes.items() if group == name) for name in groups}
    assert all(totals[key.group] > 80 for key in waiting)


def test_a_model_that_is_needed_for_less_makes_room_at_once():
    shrunk = replica("a", memory=30, phase=Phase.SERVING, committed=True)
    new = replica("b", "w", memory=60, committed=True)
    groups = [group(model(memory=70))]
    assert deferred([shrunk, new], groups, 100) == ()
    assert set(act([shrunk, new], groups)) == {
        Charge(group="n/0", variant="v", memory_bytes=(30,)),
        LoadModel(group="n/0", variant="w", max_batch=1, memory_bytes=(60,)),
    }


def test_a_model_grows_only_where_there_is_room_and_its_room_is_then_taken():
    grown = replica("a", memory=80, max_batch=2, phase=Phase.SERVING, committed=True)
    other = replica("b", "w", memory=60, phase=Phase.SERVING, committed=True)
    full = [group(model(memory=30, max_batch=1), model("w", memory=60))]
    assert act([grown, other], full) == ()
    assert deferred([grown, other], full, 100) == (grown.key,)
    new = replica("c", "w", memory=60)
    alone = [group(model(memory=30, max_batch=1))]
    assert act([grown, new], alone) == (LoadModel(group="n/0", variant="v", max_batch=2, memory_bytes=(80,)),)
    loaded = [group(model(memory=30, max_batch=2))]
    assert act([grown, new], loaded) == (Charge(group="n/0", variant="v", memory_bytes=(80,)),)
    assert deferred([grown, new], loaded, 100) == (new.key,)


def test_a_replica_takes_over_a_loaded_model_only_when_it_is_large_enough():
    late = [replica("a", phase=Phase.SERVING, committed=True), replica("b", max_batch=4)]
    assert act(late, [group(model())]) == (LoadModel(group="n/0", variant="v", max_batch=4, memory_bytes=(10,)),)
    failed = replica("b", phase=Phase.FAILED, committed=True)
    assert act([failed], [group(model())]) == (Adopt(key=failed.key),)
