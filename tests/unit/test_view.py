"""What a person sees while a run goes on."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from services.chassis.supervisor import Event, ServiceStatus, State
from services.tolaria.progress import (
    DecisionProgress,
    EpochProgress,
    Progress,
    SeedProgress,
    StatusProgress,
    StepProgress,
    SummaryProgress,
)
from services.tolaria.view import LiveView, PlainView, QuietView, describe, describe_event, sparkline

EPOCH = EpochProgress(
    arm="grown",
    epoch=1,
    epochs=9,
    step=10,
    steps=90,
    train_loss=0.5,
    validation_loss=0.6,
    validation_accuracy=81.25,
    learning_rate=0.1,
    seconds=1.0,
    parameters=1234,
    flops=10,
    seeds={"TRAINING": 2},
)
STEP = StepProgress(arm="grown", epoch=1, step=15, steps=90, loss=0.4, learning_rate=0.1, steps_per_second=120.0)
SEED = SeedProgress(
    seed="seed-1",
    slot="runs/r/slots/conv[1]",
    blueprint="b",
    family="widen",
    size=2,
    from_state="EVALUATING",
    to_state="FOSSILIZED",
    step=20,
    epoch=2,
    reason="worth +1.00 points",
    contribution={"points": 1.0, "low": 0.5, "high": 1.5},
)
DECISION = DecisionProgress(decision="d", epoch=1, step=10, plan=(), explanation="Widen conv1 by 2.", latency_ms=9.0)
CRASH = Event(0.0, "urza", "exited", "killed by SIGKILL")
START = Event(0.0, "urza", "started", "pid 7")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_sparklines() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▄▄"
    assert sparkline([0.0, 7.0, 14.0], width=2) == "▁█"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (EPOCH, "[grown] epoch   1/9  loss 0.5000  validation 81.25 %  parameters 1,234  seeds: training 2"),
        (
            dataclasses.replace(EPOCH, seeds={}),
            "[grown] epoch   1/9  loss 0.5000  validation 81.25 %  parameters 1,234",
        ),
        (SEED, "seed seed-1 (widen +2 at conv[1]): EVALUATING -> FOSSILIZED at step 20: worth +1.00 points"),
        (dataclasses.replace(SEED, to_state="DORMANT"), None),
        (
            dataclasses.replace(SEED, arm="uniform"),
            "[uniform] seed seed-1 (widen +2 at conv[1]): EVALUATING -> FOSSILIZED at step 20: worth +1.00 points",
        ),
        (DECISION, "Tamiyo (9 ms) after epoch 1: Widen conv1 by 2."),
        (StatusProgress(state="training", message="rolled back"), "rolled back"),
        (STEP, None),
        (SummaryProgress(summary={}), None),
    ],
)
def test_messages_as_lines(message: Progress, line: str | None) -> None:
    assert describe(message) == line


def test_only_what_is_out_of_the_ordinary_is_told_of_the_mesh() -> None:
    assert describe_event(CRASH) == "urza exited: killed by SIGKILL"
    assert describe_event(START) is None
    assert describe_event(Event(0.0, "training", "exited", "exit code 0")) is None


def test_plain_lines_come_one_epoch_a_second_and_the_last_always() -> None:
    out, clock = io.StringIO(), Clock()
    view = PlainView(out, clock=clock)
    view.start()
    for epoch in range(1, 10):
        clock.now = epoch * 0.3
        view.hear(dataclasses.replace(EPOCH, epoch=epoch))
    view.hear(dataclasses.replace(EPOCH, arm="host"))
    view.hear(STEP)
    view.mesh(START)
    view.mesh(CRASH)
    view.stop()
    told = [line.split("  loss")[0] for line in out.getvalue().splitlines()]
    assert told == [
        "[grown] epoch   1/9",
        "[grown] epoch   5/9",
        "[grown] epoch   9/9",
        "[host] epoch   1/9",
        "urza exited: killed by SIGKILL",
    ]


def test_verbose_lines_tell_all() -> None:
    out = io.StringIO()
    view = PlainView(out, verbose=True, clock=Clock())
    view.hear(EPOCH)
    view.hear(dataclasses.replace(EPOCH, epoch=2))
    view.mesh(START)
    assert len(out.getvalue().splitlines()) == 3
    assert "urza started: pid 7" in out.getvalue()


def test_quiet_is_quiet_until_it_is_told_to_say_something() -> None:
    out = io.StringIO()
    view = QuietView(out)
    view.hear(DECISION)
    view.mesh(CRASH)
    view.say("the end")
    assert out.getvalue() == "the end\n"


def picture(view: LiveView) -> str:
    out = io.StringIO()
    Console(file=out, width=110, force_terminal=False).print(view.render())
    return out.getvalue()


def test_the_panel_from_the_first_second_to_the_last() -> None:
    out = io.StringIO()
    services = {
        "urza": ServiceStatus("urza", State.SERVING),
        "oona": ServiceStatus("oona", State.RESTARTING, restarts=2),
        "tamiyo": ServiceStatus("tamiyo"),
    }
    view = LiveView(out, services, run="run-[1]")
    view.start()
    first = picture(view)
    assert "Esper run-[1]" in first, "brackets are no markup"
    assert "waiting for the first epoch" in first
    assert "starting" in first
    view.hear(StatusProgress(state="ready", message="the services are there"))
    assert "the services are there (" in picture(view)
    view.hear(EPOCH)
    assert "step 10 of 90" in picture(view)
    view.hear(STEP)
    view.hear(DECISION)
    view.hear(dataclasses.replace(SEED, to_state="TRAINING", contribution=None))
    now = picture(view)
    assert "step 15 of 90  120 steps/s" in now
    assert "81.25 %" in now
    assert "last decision: Widen conv1 by 2." in now
    assert "seeds: TRAINING 1" in now
    assert "not measured" in now
    assert "oona ↻2" in now
    view.hear(SEED)
    view.hear(dataclasses.replace(SEED, to_state="DORMANT"))
    view.mesh(START)
    view.mesh(CRASH)
    view.hear(StatusProgress(state="training", message="rolled back from step 20 to 10"))
    view.hear(StatusProgress(state="comparing", message="training the control host"))
    view.hear(dataclasses.replace(STEP, arm="host", step=1))
    now = picture(view)
    assert "seeds: FOSSILIZED 1" in now
    assert "+1.00" in now
    assert "urza exited: killed by SIGKILL" in now
    assert "rolled back" in now
    assert "host" in now
    view.hear(dataclasses.replace(SEED, seed="seed-2", arm="uniform", to_state="TRAINING"))
    assert "seeds: TRAINING 1" in picture(view), "seeds of a control are not counted with the run's"
    view.hear(SummaryProgress(summary={}))
    assert "done (" in picture(view)
    view.stop()
    assert "EVALUATING -> FOSSILIZED" in out.getvalue(), "ends of seeds stay readable above the panel"
