"""Compile jobs: one per content, remembered across a kill, bounded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from services.chassis.errors import EsperError, Reason
from services.tezzeret.jobs import STAGES, Job, JobBook, Spec, State
from tests.support.interfaces import SPAN, WIDTH


def spec(size: int = 2, seed: int = 1, blueprint: str = "blueprints/b") -> Spec:
    return Spec(blueprint, WIDTH, size, seed)


def book(folder: Path, **limits: int) -> JobBook:
    return JobBook(folder, **{"queue_limit": 4, **limits})


def reason_of(caught: pytest.ExceptionInfo[EsperError]) -> Reason:
    return caught.value.reason


def test_equal_specifications_are_one_job_wherever_their_layers_sit(tmp_path: Path) -> None:
    elsewhere = replace(WIDTH, writers=(replace(WIDTH.writers[0], path="other.place"),))
    jobs = book(tmp_path)
    first, created = jobs.create(spec())
    again, repeated = jobs.create(Spec("blueprints/b", elsewhere, 2, 1))
    assert (created, repeated) == (True, False)
    assert first == again
    others = {spec(size=3).job_name, spec(seed=2).job_name, spec(blueprint="blueprints/c").job_name}
    others |= {Spec("blueprints/b", SPAN, 2, 1).job_name, replace(spec(), target="cuda").job_name}
    assert first.name not in others
    assert len(others) == 5


def test_a_failed_or_cancelled_job_runs_again_and_one_that_succeeded_does_not(tmp_path: Path) -> None:
    jobs = book(tmp_path)
    job, _ = jobs.create(spec())
    for state, runs_again in ((State.FAILED, True), (State.CANCELLED, True), (State.SUCCEEDED, False)):
        jobs.put(replace(job, state=state, attempts=2))
        made, fresh = jobs.create(spec())
        assert fresh is runs_again
        assert made.attempts == 2
        assert made.state is (State.QUEUED if runs_again else State.SUCCEEDED)


def test_a_book_opened_again_queues_what_was_running_and_remembers_the_rest(tmp_path: Path) -> None:
    jobs = book(tmp_path)
    running, done, waiting = (jobs.create(spec(seed=seed))[0] for seed in (1, 2, 3))
    jobs.put(replace(running, state=State.RUNNING, stage="BUILDING", attempts=1))
    jobs.put(replace(done, state=State.SUCCEEDED, kernel="blueprints/b/kernels/k", digest="00"))
    reopened = book(tmp_path)
    assert reopened.get(running.name).state is State.QUEUED
    assert reopened.get(running.name).attempts == 1
    assert reopened.get(done.name).kernel == "blueprints/b/kernels/k"
    assert [job.name for job in reopened.queued()] == [running.name, waiting.name]
    assert reopened.jobs()[0].name == waiting.name


def test_a_stage_need_not_survive(tmp_path: Path) -> None:
    jobs = book(tmp_path)
    job, _ = jobs.create(spec())
    jobs.put(replace(job, stage="BUILDING"), durable=False)
    assert jobs.get(job.name).stage == "BUILDING"
    assert book(tmp_path).get(job.name).stage == ""


def test_the_queue_is_bounded_and_ended_jobs_are_forgotten_oldest_first(tmp_path: Path) -> None:
    jobs = book(tmp_path, queue_limit=2, keep=1)
    first, _ = jobs.create(spec(seed=1))
    second, _ = jobs.create(spec(seed=2))
    with pytest.raises(EsperError) as caught:
        jobs.create(spec(seed=3))
    assert reason_of(caught) is Reason.COMPILE_QUEUE_FULL
    assert caught.value.retry_after is not None
    jobs.put(replace(first, state=State.FAILED))
    jobs.put(replace(second, state=State.SUCCEEDED))
    assert [job.name for job in jobs.jobs()] == [second.name]
    assert len(list(tmp_path.glob("*.json"))) == 1
    with pytest.raises(EsperError) as caught:
        jobs.get(first.name)
    assert reason_of(caught) is Reason.COMPILE_JOB_NOT_FOUND


def test_progress_follows_the_stages() -> None:
    job = Job("compileJobs/j", spec())
    assert job.progress == 0
    assert replace(job, stage=STAGES[0]).progress == 0
    assert 0 < replace(job, stage=STAGES[-1]).progress < 1
    assert replace(job, state=State.SUCCEEDED).progress == 1


def test_files_that_are_no_jobs_are_passed_over_and_left_alone(tmp_path: Path) -> None:
    job, _ = book(tmp_path).create(spec())
    torn, newer, other = (tmp_path / name for name in ("torn.json", "newer.json", "other.json"))
    torn.write_text('{"name": ')
    newer.write_text(json.dumps({**job.to_json(), "priority": 3}))
    other.write_text("[]")
    assert [known.name for known in book(tmp_path).jobs()] == [job.name]
    assert torn.exists()
    assert newer.exists()
    assert other.exists()


def test_a_job_under_which_the_service_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    jobs = book(tmp_path)
    job, _ = jobs.create(spec())
    jobs.put(replace(job, state=State.RUNNING, attempts=5))
    given_up = book(tmp_path).get(job.name)
    assert given_up.state is State.FAILED
    assert given_up.error_reason == Reason.WORKER_CRASHED
    assert "5 times" in given_up.error_message
    assert book(tmp_path).create(spec())[1]


def test_a_job_that_cannot_be_stored_is_not_created(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    jobs = book(folder)
    folder.rmdir()
    with pytest.raises(EsperError) as caught:
        jobs.create(spec())
    assert reason_of(caught) is Reason.STORAGE_FAILED
    assert jobs.jobs() == []
    folder.mkdir()
    assert jobs.create(spec())[1]


def test_a_forgotten_job_is_gone_from_the_folder_too(tmp_path: Path) -> None:
    jobs = book(tmp_path)
    job, _ = jobs.create(spec())
    jobs.forget(job)
    jobs.forget(job)
    assert jobs.find(job.name) is None
    assert book(tmp_path).jobs() == []
