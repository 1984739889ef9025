"""Whose cores are whose."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.chassis.placement import Placement, device_interrupts, place

_QUIET: dict[int, int] = {}


@pytest.mark.parametrize(
    ("threads", "interrupts", "job"),
    [
        (1, _QUIET, {3}),
        (1, {3: 9, 2: 1, 1: 1, 0: 5}, {2}),
        (2, _QUIET, {2, 3}),
        (2, {0: 1, 1: 2, 2: 3, 3: 4}, {0, 1}),
        (3, {0: 100}, {1, 2, 3}),
        (3, {3: 100}, {0, 1, 2}),
    ],
)
def test_a_job_gets_neighbors_that_devices_leave_alone(threads: int, interrupts: dict[int, int], job: set[int]) -> None:
    cores = frozenset({0, 1, 2, 3})
    assert place(cores, threads, interrupts) == Placement(frozenset(job), cores - job)


def test_too_few_cores_are_shared() -> None:
    assert place(frozenset({0, 1}), 2, _QUIET) == Placement(frozenset(), frozenset())


def test_cores_that_are_not_ours_are_nobodys() -> None:
    assert place(frozenset({4, 6}), 1, {4: 1, 5: 0, 6: 2}) == Placement(frozenset({4}), frozenset({6}))


def test_interrupts_of_devices_are_counted_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / "interrupts"
    file.write_text(
        "            CPU0       CPU2       \n"
        "  1:          7          0   IO-APIC   1-edge      i8042\n"
        " 36:          3     383951   PCI-MSIX-0000:00:02.0   1-edge      virtio1-req.0\n"
        "LOC:    3669353    1613527   Local timer interrupts\n"
        "ERR:          5\n"
    )
    assert device_interrupts(file) == {0: 10, 2: 383951}
    file.write_text("")
    assert device_interrupts(file) == {}
    assert device_interrupts(tmp_path / "none") == {}


def test_this_machine_says_it_of_the_cores_that_it_has() -> None:
    found = device_interrupts()
    assert not found or found.keys() >= os.sched_getaffinity(0)
