"""What Tamiyo's records promise, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from services.chassis.errors import EsperError, Reason
from services.tamiyo.decisions import Decision, DecisionMaker
from services.tamiyo.registry import PolicyRegistry
from services.tamiyo.store import Request, Store, sqlite_url
from tests.infrastructure.processes import free_ports
from tests.support.observations import observation, slot

_ASKED = Request("CreatePolicy", "p", "digest")
_SEEN = observation([slot("a", 4, 3.9), slot("b", 4)])


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "state")
    found: str = request.getfixturevalue("postgres_url")
    return found


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store(url, decision_limit=3)
    yield opened
    opened.close()


def decide(maker: DecisionMaker, request_id: str, policy: str = "policies/utilization") -> tuple[Decision, bool]:
    return maker.decide(_SEEN, policy, request_id=request_id, digest="d", request_digest=f"{request_id}{policy}")


def reason_of(caught: pytest.ExceptionInfo[EsperError]) -> Reason:
    return caught.value.reason


def test_decisions_are_kept_word_for_word_and_the_oldest_go(store: Store, url: str) -> None:
    maker = DecisionMaker(store, PolicyRegistry(store))
    made = [decide(maker, f"r{number}")[0] for number in range(4)]
    reopened = Store(url, decision_limit=3)
    again = DecisionMaker(reopened, PolicyRegistry(reopened))
    assert decide(again, "r3") == (made[3], False)
    assert again.get(made[3].name) == made[3]
    assert [decision for _, decision in again.page("", None, 10)] == made[:0:-1]
    first = again.page("runs/r", None, 1)
    assert [decision for _, decision in again.page("runs/r", first[0][0], 10)] == [made[2], made[1]]
    assert again.page("runs/other", None, 10) == []
    with pytest.raises(EsperError) as caught:
        again.get(made[0].name)
    assert reason_of(caught) is Reason.DECISION_NOT_FOUND
    with pytest.raises(EsperError) as caught:
        decide(again, "r3", "policies/uniform")
    assert reason_of(caught) is Reason.REQUEST_ID_REUSED
    reopened.close()


def test_pause_survives_and_says_its_reason(store: Store) -> None:
    maker = DecisionMaker(store, PolicyRegistry(store))
    maker.pause("maintenance")
    paused = DecisionMaker(store, PolicyRegistry(store))
    assert "paused (maintenance)" in decide(paused, "a")[0].plan.explanation
    paused.resume()
    assert decide(maker, "b")[0].plan.changes
    maker.pause("")
    assert "no reason given" in decide(maker, "c")[0].plan.explanation


def test_versions_are_immutable_and_one_is_active(store: Store, url: str) -> None:
    registry = PolicyRegistry(store)
    second = registry.create("utilization", {"least_need": 0.99})
    assert (second.name, second.active, second.parent) == ("policies/utilization@2", False, "policies/utilization@1")
    assert second.parameters["measure"] == "effective_rank"
    assert second.digest != registry.get("policies/utilization@1").digest
    etag = second.etag
    active = registry.activate("policies/utilization@2", etag=etag)
    assert active.active
    assert active.etag != etag
    with pytest.raises(EsperError) as caught:
        registry.activate("policies/utilization@2", etag=etag)
    assert reason_of(caught) is Reason.ETAG_MISMATCH
    reopened = Store(url, decision_limit=3)
    restored = PolicyRegistry(reopened)
    assert restored.get("policies/utilization").name == "policies/utilization@2"
    assert restored.versions() == registry.versions()
    restored.activate("policies/utilization@1")
    assert restored.get("policies/utilization").version == 1
    assert [version.version for version in restored.versions("utilization")] == [1, 2]
    reopened.close()


def test_outcomes_are_kept_once_and_teach_a_new_version(store: Store) -> None:
    registry = PolicyRegistry(store)
    with pytest.raises(EsperError) as caught:
        registry.learn("utilization", min_outcomes=1)
    assert reason_of(caught) is Reason.NO_OUTCOMES
    for request_id in ("a", "a", "b"):
        outcome = {"seed": request_id, "family": "widen", "state": "FOSSILIZED", "contribution": 1.5}
        store.add_outcome(request_id, outcome)
    assert store.outcome_count() == 2
    learned = registry.learn("utilization", min_outcomes=2)
    assert learned.estimates["widen"].contribution == 1.5
    assert registry.get("policies/utilization@1").estimates == {}


@pytest.mark.parametrize(
    ("algorithm", "parameters", "reason"),
    [
        ("magic", {}, Reason.UNKNOWN_ALGORITHM),
        ("utilization", {"nonsense": 1}, Reason.INVALID_FIELD),
        ("narrowest", {"nonsense": 1}, Reason.INVALID_FIELD),
        ("utilization", {"least_need": -1}, Reason.INVALID_FIELD),
    ],
)
def test_versions_that_make_no_sense_are_refused(
    store: Store, algorithm: str, parameters: dict[str, object], reason: Reason
) -> None:
    registry = PolicyRegistry(store)
    with pytest.raises(EsperError) as caught:
        registry.create(algorithm, parameters)
    assert reason_of(caught) is reason
    for name in ("policies/nobody", "utilization", "policies/utilization@99"):
        with pytest.raises(EsperError) as caught:
            registry.get(name)
        assert reason_of(caught) is Reason.POLICY_NOT_FOUND


def test_two_that_share_a_database_see_each_other(store: Store, url: str) -> None:
    other_store = Store(url, decision_limit=3)
    here, there = PolicyRegistry(store), PolicyRegistry(other_store)
    assert here.create("utilization", {}).version == 2
    assert there.create("utilization", {}).version == 3
    there.activate("policies/utilization@3")
    assert here.get("policies/utilization").version == 3
    assert [version.active for version in here.versions("utilization")] == [False, False, True]
    # Both answer one request: the first answer stands, whoever asks.
    first, new = decide(DecisionMaker(store, here), "same")
    assert new
    assert decide(DecisionMaker(other_store, there), "same") == (first, False)
    assert not other_store.add_decision("decisions/x", "runs/r", "same", "digest", {})
    other_store.close()


def test_a_version_number_that_was_taken_meanwhile_is_passed_over(store: Store, url: str) -> None:
    registry = PolicyRegistry(store)

    class Late(Store):
        """Another Tamiyo takes the number between the look and the insert."""

        def add_policy(
            self,
            name: str,
            algorithm: str,
            version: int,
            active: bool,
            document: Mapping[str, Any],
            *,
            request: Request | None = None,
        ) -> bool:
            if name == "policies/random@2":
                assert store.add_policy(name, algorithm, version, active, document)
            if name == "policies/random@4":
                assert store.add_policy(name, algorithm, version, active, document, request=request)
            return super().add_policy(name, algorithm, version, active, document, request=request)

        def decision_of_request(self, request_id: str) -> tuple[str, dict[str, Any]] | None:
            found = super().decision_of_request(request_id)
            if found is None:
                decide(DecisionMaker(store, registry), request_id)
            return found

    late = Late(url, decision_limit=3)
    assert PolicyRegistry(late).create("random", {}, request=_ASKED).name == "policies/random@3"
    # Not only the number was taken: the other had the same request to answer.
    twice = replace(_ASKED, id="twice")
    assert PolicyRegistry(late).create("random", {}, request=twice).name == "policies/random@4"
    assert [version.version for version in registry.versions("random")] == [1, 2, 3, 4]
    decision, new = decide(DecisionMaker(late, PolicyRegistry(late)), "raced")
    assert not new
    assert decide(DecisionMaker(store, registry), "raced") == (decision, False)
    late.close()


def test_a_change_that_is_asked_for_again_was_made(store: Store, url: str) -> None:
    registry = PolicyRegistry(store)
    made = registry.create("random", {"concentration": 3}, request=_ASKED)
    choice = Request("ActivatePolicy", _ASKED.id, "digest")  # of another rpc: ids of two rpcs are two
    assert registry.activate(made.name, etag=made.etag, request=choice).active
    registry.activate("policies/random@1")
    reopened = Store(url, decision_limit=3)
    later = PolicyRegistry(reopened)
    # Neither a second version nor a second activation; and its etag is no longer asked for.
    assert later.create("random", {"concentration": 3}, request=_ASKED) == made
    assert later.activate(made.name, etag=made.etag, request=choice) == made
    assert [(version.name, version.active) for version in later.versions("random")] == [
        ("policies/random@1", True),
        (made.name, False),
    ]
    reopened.close()


def test_an_algorithm_is_named_in_full(store: Store) -> None:
    registry = PolicyRegistry(store)
    assert registry.get("policies/uniform").name == "policies/uniform@1"
    for name in ("", "policies/", "policies/@1", "uniform@1"):
        with pytest.raises(EsperError, match="known are policies/fixed") as caught:
            registry.get(name)
        assert reason_of(caught) is Reason.POLICY_NOT_FOUND
    with pytest.raises(EsperError, match="below 1") as caught:
        registry.learn("utilization", min_outcomes=-1)
    assert reason_of(caught) is Reason.INVALID_FIELD


def test_what_is_no_database_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tamiyo.sqlite").write_bytes(b"no database at all, but long enough to be read as one" * 100)
    closed = free_ports(1)[0]
    for url in (
        sqlite_url(tmp_path),
        f"sqlite:///{tmp_path / 'none' / 'x.sqlite'}",
        f"postgresql+psycopg://esper:secret@127.0.0.1:{closed}/none",
        "nonsense",
    ):
        with pytest.raises(EsperError) as caught:
            Store(url, decision_limit=3)
        assert reason_of(caught) is Reason.UNAVAILABLE
        assert "\n" not in caught.value.message
        assert "secret" not in caught.value.message


def test_a_full_database_is_told_apart_and_loses_nothing(tmp_path: Path) -> None:
    store = Store(sqlite_url(tmp_path), decision_limit=3)
    registry = PolicyRegistry(store)
    before = registry.versions()

    def no_more_room(connection: Any, _record: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")

    store.close()
    sa.event.listen(sa.pool.Pool, "connect", no_more_room)
    try:
        full = Store(sqlite_url(tmp_path), decision_limit=3)
    finally:
        sa.event.remove(sa.pool.Pool, "connect", no_more_room)
    with pytest.raises(EsperError) as caught:
        full.set_setting("key", "x" * 100_000)
    assert reason_of(caught) is Reason.STORAGE_FULL
    assert PolicyRegistry(full).versions() == before
    assert full.setting("key") is None
    full.close()


def test_a_closed_window_is_a_decision_too(store: Store) -> None:
    maker = DecisionMaker(store, PolicyRegistry(store))
    late = replace(_SEEN, progress=0.9)
    decision, new = maker.decide(late, "policies/uniform", request_id="late", digest="d", request_digest="d")
    assert new
    assert not decision.plan.changes
    assert "has closed" in decision.plan.explanation
    assert maker.get(decision.name) == decision
