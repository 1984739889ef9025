"""Ordered delivery, on paper: the window decides what comes next and what may be committed."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from services.oona.bus import StoredRecord, TopicPartition
from services.oona.delivery import DeliveryWindow, Entry
from services.oona.subscription import FailureLedger, retry_delay

P0, P1 = TopicPartition("t", 0), TopicPartition("t", 1)


def record(offset: int, key: bytes = b"k", source: TopicPartition = P0) -> StoredRecord:
    return StoredRecord(source, offset, 0, key, b"", ())


def window(*keys: bytes, limit: int = 100) -> DeliveryWindow:
    made = DeliveryWindow(limit)
    for offset, key in enumerate(keys):
        made.add(record(offset, key))
    return made


def drain(made: DeliveryWindow, now: float = 0.0) -> list[Entry]:
    found = []
    while (entry := made.next(now)) is not None:
        found.append(entry)
    return found


def offsets(entries: list[Entry]) -> list[int]:
    return [entry.record.offset for entry in entries]


def test_records_come_in_order_and_the_prefix_is_committed() -> None:
    made = window(b"a", b"b", b"a")
    first, second, third = drain(made)
    assert offsets([first, second, third]) == [0, 1, 2]
    made.settle(second)
    assert made.take_commits() == {}
    made.settle(first)
    assert made.take_commits() == {P0: 2}
    assert made.take_commits() == {}
    made.settle(third)
    assert made.take_commits() == {P0: 3}
    assert made.room == 100


def test_a_failed_record_takes_the_rest_of_its_key_with_it() -> None:
    made = window(b"a", b"b", b"a", b"a")
    made.add(record(9, b"b", P1))
    delivered = drain(made)
    made.settle(delivered[2])  # acknowledged, and yet it comes again: its handler must see 0 before 2
    made.fail(delivered[0], retry_at=5.0)
    assert made.in_flight(delivered[0].delivery_id) is None
    assert drain(made, 4.9) == []
    assert made.next_retry() == 5.0
    assert offsets(drain(made, 5.0)) == [0]
    assert delivered[0].attempt == 2
    made.settle(delivered[0])
    assert offsets(drain(made, 5.0)) == [2, 3]
    assert made.take_commits() == {P0: 1}


def test_other_keys_and_records_without_key_go_on() -> None:
    made = window(b"a", b"", b"b", b"")
    delivered = drain(made)
    made.fail(delivered[1], retry_at=1.0)
    made.add(record(4, b""))
    made.add(record(5, b"b"))
    assert offsets(drain(made, 0.0)) == [4, 5]
    assert offsets(drain(made, 1.0)) == [1]


def test_new_records_of_a_waiting_key_wait_behind_it() -> None:
    made = window(b"a")
    (entry,) = drain(made)
    made.fail(entry, retry_at=1.0)
    made.add(record(1, b"a"))
    assert drain(made, 0.0) == []
    assert offsets(drain(made, 1.0)) == [0]
    assert drain(made, 1.0) == []
    made.settle(entry)
    assert offsets(drain(made, 1.0)) == [1]


def test_an_earlier_failure_overtakes_a_later_one() -> None:
    made = window(b"a", b"a", b"a")
    first, second, third = drain(made)
    made.fail(second, retry_at=1.0)
    made.fail(first, retry_at=2.0)
    assert drain(made, 1.5) == [], "the second waits behind the first now"
    assert drain(made, 2.0) == [first]
    made.settle(first)
    assert drain(made, 2.0) == [second, third]


def test_a_dropped_partition_is_forgotten() -> None:
    made = window(b"a", b"a")
    made.add(record(3, b"a", P1))
    first, second, other = drain(made)
    made.fail(first, retry_at=1.0)
    made.settle(other)
    made.drop(P0)
    made.drop(TopicPartition("t", 7))
    assert made.in_flight(second.delivery_id) is None
    assert drain(made, 9.0) == []
    made.settle(second)
    assert made.take_commits() == {P1: 4}
    made.add(record(0, b"a"))  # it came back
    assert offsets(drain(made, 9.0)) == [0]


def test_a_dropped_record_in_the_ready_queue_is_not_delivered() -> None:
    made = window(b"a")
    made.drop(P0)
    assert made.next(0.0) is None


def test_skipped_records_are_settled_at_once() -> None:
    made = DeliveryWindow(10)
    made.add(record(0), skip=True)
    assert made.take_commits() == {P0: 1}
    assert made.next(0.0) is None


def test_the_window_is_bounded() -> None:
    made = window(b"a", b"b", limit=2)
    assert made.full
    assert made.room == 0
    made.settle(drain(made)[0])
    assert not made.full


def test_what_a_member_was_at_is_the_first_unsettled_of_each_partition() -> None:
    made = window(b"a", b"b", b"c")
    made.add(record(5, b"z", P1))
    delivered = drain(made)
    made.settle(delivered[0])
    assert offsets(made.oldest_in_flight()) == [1, 5]
    made.settle(delivered[3])
    assert offsets(made.oldest_in_flight()) == [1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([b"a", b"b", b"c", b""]), min_size=1, max_size=20), st.integers(0, 2**32))
def test_whatever_fails_all_is_handled_in_order_per_key_and_committed(keys: list[bytes], seed: int) -> None:
    chance = random.Random(seed)
    made = DeliveryWindow(100)
    waiting = list(enumerate(keys))
    in_flight: list[Entry] = []
    handled: list[StoredRecord] = []
    now, failures_left = 0.0, 15
    while True:
        if waiting and chance.random() < 0.5:
            made.add(record(*waiting.pop(0)))
        in_flight += drain(made, now)
        in_flight = [entry for entry in in_flight if made.in_flight(entry.delivery_id) is entry]
        if not waiting and not in_flight and made.next_retry() is None:
            break
        # A handler takes what it gets in turn; what fails, fails at any time.
        if in_flight and failures_left and chance.random() < 0.3:
            failures_left -= 1
            made.fail(in_flight.pop(chance.randrange(len(in_flight))), now + 3 * chance.random())
        elif in_flight:
            entry = in_flight.pop(0)
            handled.append(entry.record)
            made.settle(entry)
        now += 1.0
    assert made.take_commits() == {P0: len(keys)}
    assert {done.offset for done in handled} == set(range(len(keys)))
    for key in {b"a", b"b", b"c"} & set(keys):
        last_seen = [done.offset for done in handled if done.key == key]
        assert last_seen[-1] == max(last_seen), "the last thing that a handler sees of a key is its newest record"
        # The last sights of all records of the key are in order.
        final = {offset: place for place, offset in enumerate(last_seen)}
        assert sorted(final, key=final.__getitem__) == sorted(final)


def test_the_pause_doubles_up_to_five_seconds() -> None:
    assert [retry_delay(n) for n in (1, 2, 3, 20)] == [0.1, 0.2, 0.4, 5.0]


def test_the_ledger_is_bounded_and_forgets_the_oldest() -> None:
    ledger = FailureLedger(limit=2)
    for offset in range(3):
        ledger.set("g", record(offset), offset + 1)
    assert [ledger.get("g", record(offset)) for offset in range(3)] == [0, 2, 3]
    assert ledger.get("other", record(1)) == 0
    ledger.forget("g", record(1))
    ledger.forget("g", record(1))
    assert ledger.get("g", record(1)) == 0
