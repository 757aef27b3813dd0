from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.bundles import Bundles, Gathered
from executor.dispatcher import Dispatcher, DropReason, QueueLimits, Waiting
from executor.errors import QueueFull
from executor.state import ReplicaKey

KEY = ReplicaKey(group="g", service="video", variant="v")
OTHER = ReplicaKey(group="g", service="other", variant="v")


def frame(number: int, deadline_s: float = 10.0, **changed: Any) -> Waiting:
    return Waiting(**({"number": number, "key": KEY, "deadline_s": deadline_s, "payload_bytes": 3} | changed))


def add(
    bundles: Bundles, one: Waiting, stream: str = "s", most: int = 3, largest_s: float = 2.0, now_s: float = 0.0
) -> Any:
    return bundles.add(one, stream, most=most, largest_s=largest_s, now_s=now_s)


def test_frames_of_one_stream_enter_together_when_the_bundle_is_full() -> None:
    bundles = Bundles()
    assert add(bundles, frame(1, 10)) is None
    assert add(bundles, frame(2, 9), "another") is None
    assert add(bundles, frame(3, 11)) is None
    full = add(bundles, frame(4, 12))
    assert [part.number for part in full.parts] == [1, 3, 4]
    assert (full.deadline_s, full.items, full.payload_bytes) == (10, 3, 9)
    assert bundles.gathered(KEY).frames == 1


def test_one_that_is_not_full_enters_when_waiting_longer_would_be_late() -> None:
    bundles = Bundles()
    add(bundles, frame(1, 10))
    add(bundles, frame(2, 11))
    add(bundles, frame(3, 9), "another")
    assert bundles.next_s() == 7
    assert bundles.due(6.9) == []
    assert [[part.number for part in one.parts] for one in bundles.due(8)] == [[3], [1, 2]]
    assert bundles.next_s() is None


def test_a_frame_that_cannot_wait_enters_at_once() -> None:
    bundles = Bundles()
    assert add(bundles, frame(1, 2.0)).number == 1
    assert add(bundles, frame(2), most=1).number == 2
    assert bundles.next_s() is None


def test_a_later_frame_with_less_time_brings_its_bundle_in_sooner() -> None:
    bundles = Bundles()
    add(bundles, frame(1, 10, priority=9))
    add(bundles, frame(2, 5, priority=5))
    assert bundles.next_s() == 3
    (bundle,) = bundles.due(3)
    assert [part.number for part in bundle.parts] == [1, 2]
    assert (bundle.deadline_s, bundle.priority) == (5, 5)
    assert bundles.next_s() is None


def test_a_frame_that_cannot_wait_leaves_the_others_of_its_stream_their_time() -> None:
    bundles = Bundles()
    add(bundles, frame(1, 10))
    assert add(bundles, frame(2, 1.9)) == frame(2, 1.9)
    assert bundles.next_s() == 8


def test_closing_gives_back_every_frame_by_itself() -> None:
    bundles = Bundles()
    add(bundles, frame(1))
    add(bundles, frame(2, key=OTHER))
    assert [one.number for one in bundles.close(KEY)] == [1]
    assert [one.number for one in bundles.close()] == [2]
    assert bundles.due(100) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 2), st.floats(0.1, 5)), max_size=40), st.integers(1, 5))
def test_law_every_frame_comes_out_once_and_none_after_its_time(
    frames: list[tuple[str, float, float]], most: int
) -> None:
    bundles, now_s, out = Bundles(), 0.0, []
    for number, (stream, passed_s, left_s) in enumerate(frames):
        now_s += passed_s
        out += bundles.due(now_s)
        ready = add(bundles, frame(number, now_s + left_s), stream, most=most, largest_s=1.0, now_s=now_s)
        out += [ready] if ready else []
        next_s = bundles.next_s()
        assert next_s is None or next_s > now_s
        gathering = {(place, one.deadline_s) for place, bundle in bundles._gathering.items() for one in bundle.frames}
        assert all(next_s is not None and next_s <= deadline_s - 1.0 for _, deadline_s in gathering)
    out += bundles.due(1e9)
    assert sorted(part.number for one in out for part in one.parts) == list(range(len(frames)))
    assert all(len(one.parts) <= most for one in out)


def test_a_bundle_is_batched_and_dropped_as_a_whole() -> None:
    dispatcher = Dispatcher()
    dispatcher.configure(KEY, 4, [1.0, 1.0, 1.0, 1.0])
    bundle = Waiting(number=1, key=KEY, deadline_s=5, items=3, frames=(frame(1, 5), frame(2, 6), frame(3, 7)))
    dispatcher.add(bundle)
    dispatcher.add(frame(4, 8))
    assert dispatcher.queued(KEY) == 4
    batch = dispatcher.decide(0).batch
    assert batch is not None
    assert [one.number for one in batch.requests] == [1, 2, 3, 4]
    assert batch.items == 4
    dispatcher.add(bundle)
    drops = dispatcher.decide(4.5).drops
    assert [(drop.request.number, drop.reason) for drop in drops] == [(n, DropReason.HOPELESS) for n in (1, 2, 3)]


def test_a_bundle_too_large_for_new_rules_comes_apart() -> None:
    dispatcher = Dispatcher()
    dispatcher.configure(KEY, 4, [1.0] * 4)
    dispatcher.add(Waiting(number=1, key=KEY, deadline_s=5, items=3, frames=(frame(1, 5), frame(2, 6), frame(3, 7))))
    assert dispatcher.configure(KEY, 2, [1.0] * 2) == ()
    batch = dispatcher.decide(0).batch
    assert batch is not None
    assert [one.number for one in batch.requests] == [1, 2]


def test_what_gathers_is_counted_by_replica() -> None:
    bundles = Bundles()
    add(bundles, frame(1, 10))
    add(bundles, frame(2, 10), "another")
    add(bundles, frame(3, 10, key=OTHER))
    assert bundles.gathered(KEY) == Gathered(frames=2, items=2, payload_bytes=6)
    assert bundles.gathered(OTHER) == Gathered(frames=1, items=1, payload_bytes=3)
    assert bundles.items_before(frame(4, 10)) == 2
    assert bundles.items_before(frame(4, 9.9)) == bundles.items_before(frame(4, 99, priority=1)) == 0
    bundles.due(100)
    assert bundles.gathered(KEY) == Gathered()


def test_a_frame_that_is_taken_back_gathers_no_more_and_the_others_keep_their_time() -> None:
    bundles = Bundles()
    for number, deadline_s in ((1, 10), (2, 11), (3, 12)):
        add(bundles, frame(number, deadline_s), most=4)
    assert bundles.remove(frame(2))
    assert not bundles.remove(frame(2))
    assert bundles.next_s() == 8
    assert bundles.remove(frame(1))
    assert bundles.next_s() == 10
    assert bundles.remove(frame(3))
    assert bundles.next_s() is None
    assert bundles.gathered(KEY) == Gathered()
    assert add(bundles, frame(4, 20), most=2) is None
    assert [one.number for one in add(bundles, frame(5, 20), most=2).parts] == [4, 5]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 2), st.booleans()), max_size=40), st.integers(1, 5))
def test_law_a_frame_comes_out_or_is_taken_back_and_the_counts_agree(
    steps: list[tuple[str, float, bool]], most: int
) -> None:
    bundles, now_s, out, inside = Bundles(), 0.0, [], {}
    for number, (stream, passed_s, is_taken_back) in enumerate(steps):
        now_s += passed_s
        if is_taken_back and inside:
            gone = inside.pop(next(iter(inside)))
            assert bundles.remove(gone)
            found = bundles.due(now_s)
        else:
            one = inside[number] = frame(number, now_s + 3)
            ready = add(bundles, one, stream, most=most, largest_s=1.0, now_s=now_s)
            found = bundles.due(now_s) + ([ready] if ready else [])
        for part in (part for bundle in found for part in bundle.parts):
            del inside[part.number]
            out.append(part.number)
        assert bundles.gathered(KEY).frames == len(inside)
    assert len(set(out)) == len(out)
    assert sorted(part.number for one in bundles.due(1e9) for part in one.parts) == sorted(inside)


def test_a_frame_in_a_queued_bundle_can_be_taken_back() -> None:
    dispatcher = Dispatcher()
    dispatcher.configure(KEY, 4, [1.0] * 4)
    dispatcher.add(Waiting.bundle([frame(1, 5), frame(2, 6), frame(3, 7)]))
    assert dispatcher.cancel(frame(1, 5))
    assert not dispatcher.cancel(frame(1, 5))
    assert (dispatcher.items(KEY), dispatcher.queued(KEY), dispatcher.next_deadline_s()) == (2, 2, 6)
    assert dispatcher.cancel(frame(3, 7))
    assert dispatcher.cancel(frame(2, 6))
    assert dispatcher.decide(0).batch is None


def test_each_frame_of_a_bundle_counts_against_the_limit() -> None:
    dispatcher = Dispatcher(QueueLimits(requests=3))
    dispatcher.configure(KEY, 4, [1.0] * 4)
    dispatcher.add(Waiting.bundle([frame(1), frame(2)]))
    with pytest.raises(QueueFull, match="2 requests"):
        dispatcher.add(Waiting.bundle([frame(3), frame(4)]))
    with pytest.raises(QueueFull, match="3 requests"):
        dispatcher.check_room(frame(5), requests=1)
    dispatcher.add(frame(5))


class TestPriorities:
    def test_the_more_urgent_goes_first_whatever_the_deadlines(self) -> None:
        dispatcher = Dispatcher()
        dispatcher.configure(KEY, 1, [1.0])
        dispatcher.configure(OTHER, 1, [1.0])
        dispatcher.add(frame(1, 5.0))
        dispatcher.add(frame(2, 9.0, priority=1))
        dispatcher.add(frame(3, 8.0, priority=1, key=OTHER))
        order = [dispatcher.decide(0).batch for _ in range(3)]
        assert [batch.requests[0].number for batch in order if batch] == [3, 2, 1]

    def test_what_is_left_of_its_batch_is_filled_with_the_less_urgent(self) -> None:
        dispatcher = Dispatcher()
        dispatcher.configure(KEY, 3, [1.0, 1.5, 2.0])
        for number, priority in ((1, 5), (2, 1), (3, 9), (4, 5)):
            dispatcher.add(frame(number, 10.0 + number, priority=priority))
        batch = dispatcher.decide(0).batch
        assert batch is not None
        assert [one.number for one in batch.requests] == [2, 1, 4]

    def test_the_urgent_is_not_displaced_by_many_that_are_less(self) -> None:
        dispatcher = Dispatcher()
        dispatcher.configure(KEY, 2, [1.0, 3.0])
        dispatcher.add(frame(1, 2.0, priority=1))
        for number in range(2, 8):
            dispatcher.add(frame(number, 20.0))
        decision = dispatcher.decide(0)
        assert decision.drops == ()
        assert decision.batch is not None
        assert [one.number for one in decision.batch.requests] == [1]

    def test_a_priority_that_is_none_is_refused(self) -> None:
        dispatcher = Dispatcher()
        dispatcher.configure(KEY, 1, [1.0])
        for priority in (0, 10):
            with pytest.raises(ValueError, match="priority"):
                dispatcher.add(frame(1, priority=priority))
