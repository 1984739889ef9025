"""``train.py`` as people and scripts start it: every flag, every exit code, and never a stack trace."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.infrastructure.documented import differences, documented, fields
from tests.infrastructure.processes import ROOT, free_ports

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(240)]

#: A run of seconds: a narrow host, two decisions, no controls.
SHORT = ("training.epochs=4", "data.limit=256", "model.widths=[2, 3]", "training.device=cpu", "growth.decisions=1")


def command(*arguments: str, sets: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *arguments, *(part for one in sets for part in ("--set", one))]


class Ended:
    """How a command ended, and what it said. No command may show a stack trace."""

    def __init__(self, code: int, out: str, err: str) -> None:
        assert "Traceback" not in out + err, err
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which is one line of JSON."""
        assert self.out.count("\n") == 1, self.out
        return dict(json.loads(self.out))


def train(*arguments: str, sets: tuple[str, ...] = (), env: dict[str, str] | None = None) -> Ended:
    done = subprocess.run(
        command(*arguments, sets=sets), capture_output=True, text=True, timeout=150, env={**os.environ, **(env or {})}
    )
    return Ended(done.returncode, done.stdout, done.stderr)


class Running:
    """A command under way, whose standard error is read line by line."""

    def __init__(self, *arguments: str, sets: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            command(*arguments, sets=sets), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.said: list[str] = []

    def until(self, words: str) -> str:
        """The first line with ``words`` in it."""
        assert self.process.stderr is not None, "it is a pipe"
        for line in self.process.stderr:
            self.said.append(line)
            if words in line:
                return line
        raise AssertionError(f"it ended without {words!r}: {self.said}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> Ended:
        out, err = self.process.communicate(timeout=120)
        return Ended(self.process.returncode, out, "".join(self.said) + err)


@contextlib.contextmanager
def running(*arguments: str, sets: tuple[str, ...] = ()) -> Iterator[Running]:
    """A command that is gone, with all its children, when the block ends."""
    started = Running(*arguments, sets=sets)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        for pipe in (started.process.stdout, started.process.stderr):
            assert pipe is not None, "both are pipes"
            pipe.close()


# ---- what needs no mesh ------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_help_lists_the_exit_codes() -> None:
    done = train("--help")
    assert done.code == 0
    assert "130 and 143 interrupted" in done.out


@pytest.mark.fast
def test_wrong_usage_is_2() -> None:
    assert train("--quiet", "--verbose").code == 2
    assert train("--quick-start", "mnist").code == 2


@pytest.mark.fast
def test_config_errors_name_file_line_key_and_the_nearest_key(tmp_path: Path) -> None:
    config = tmp_path / "wrong.yaml"
    config.write_text("training:\n  epoch: 3\ndata:\n  batch_size: many\n", encoding="utf-8")
    done = train("--config", str(config))
    assert done.code == 2
    assert f"{config}:2" in done.err
    assert "training.epochs" in done.err
    assert f"{config}:4" in done.err
    assert not done.out


@pytest.mark.fast
def test_a_config_that_is_not_there_is_2(tmp_path: Path) -> None:
    done = train("--config", str(tmp_path / "none.yaml"))
    assert (done.code, "there is no such file" in done.err) == (2, True)


@pytest.mark.fast
def test_dry_run_shows_each_value_its_origin_and_the_plan(tmp_path: Path) -> None:
    config = tmp_path / "some.yaml"
    config.write_text("training:\n  epochs: 10\n", encoding="utf-8")
    done = train(
        "--config", str(config), "--dry-run", "--compare", "--set", "run.seed=7", env={"ESPER__DATA__FLIP": "true"}
    )
    assert done.code == 0
    assert f"epochs: 10  # {config}:2" in done.out
    assert "seed: 7  # --set" in done.out
    assert "flip: true  # env ESPER__DATA__FLIP" in done.out
    assert "compare with host, bigger" in done.out
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.fast
def test_dry_run_as_json_and_without_growth(tmp_path: Path) -> None:
    odd = tmp_path / "a: b # c"
    done = train("--quick-start", "digits", "--dry-run", "--json", "--no-growth", "--output", str(odd))
    told = done.json
    assert told["config"]["growth"]["enabled"] is False
    assert told["config"]["run"]["output_dir"] == str(odd)
    assert "      without growth" in told["plan"]
    addresses = tuple(
        f"services.{n}.address=127.0.0.1:1" for n in ("urza", "oona", "tamiyo", "kasmina", "tolaria", "tezzeret")
    )
    budget = "growth.budget={parameters: 3}"
    done = train("--dry-run", "--json", "--compare", "host", sets=(*addresses, budget))
    assert "plan: start no service on 127.0.0.1" in done.json["plan"]
    assert "at most 3 times the host's parameters" in done.out


@pytest.mark.fast
def test_outside_the_environment_it_says_so_in_one_line(tmp_path: Path) -> None:
    shadow = tmp_path / "pydantic.py"
    shadow.write_text("raise ModuleNotFoundError(\"No module named 'pydantic'\")\n", encoding="utf-8")
    done = train("--dry-run", env={"PYTHONPATH": str(tmp_path)})
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert ".venv/bin/python train.py" in done.err


@pytest.mark.fast
def test_an_interrupt_during_the_imports_is_no_stack_trace(tmp_path: Path) -> None:
    slow = tmp_path / "pydantic.py"
    slow.write_text("import sys, threading\nprint('here', file=sys.stderr, flush=True)\nthreading.Event().wait(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command("--dry-run"), stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None, "it is a pipe"
        assert process.stderr.readline() == "here\n"
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 143


@pytest.mark.fast
def test_there_is_nothing_to_resume(tmp_path: Path) -> None:
    done = train("--resume", "--output", str(tmp_path))
    assert (done.code, "no run to resume" in done.err) == (2, True)
    done = train("--resume", "unknown-run", "--output", str(tmp_path))
    assert (done.code, "no run folder" in done.err) == (2, True)
    assert done.err.count("\n") == 1


@pytest.mark.fast
def test_a_state_folder_that_cannot_be_made_is_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (("--output", str(tmp_path)), ("--check-services",)):
        done = train(*arguments, sets=(f"run.state_dir={tmp_path}/file",))
        assert (done.code, "Not a directory" in done.err) == (2, True)
        assert done.err.count("\n") == 1


@pytest.mark.fast
def test_a_damaged_signing_key_is_2(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "tezzeret.key").write_text("no key")
    done = train("--output", str(tmp_path / "runs"), sets=(f"run.state_dir={tmp_path}",))
    assert (done.code, "private key" in done.err, done.err.count("\n")) == (2, True, 1)


# ---- the mesh ----------------------------------------------------------------------------------------------------


def test_check_services_starts_all_six() -> None:
    done = train("--check-services", "--json")
    assert done.code == 0
    assert set(done.json["services"]) == {"urza", "tezzeret", "tamiyo", "oona", "kasmina", "tolaria"}
    assert done.err.count("SERVING") == 6


def test_a_service_elsewhere_that_is_unreachable_is_3(tmp_path: Path) -> None:
    names = ("urza", "oona", "tamiyo", "kasmina", "tolaria", "tezzeret")
    dead = tuple(f"services.{name}.address=127.0.0.1:{port}" for name, port in zip(names, free_ports(6), strict=True))
    sets = (*dead, "services.startup_timeout_seconds=1")
    done = train("--check-services", "--json", sets=sets)
    assert (done.code, done.json["status"], "127.0.0.1:" in done.err) == (3, "failed", True)
    assert train("--check-services", sets=sets).code == 3
    done = train("--json", "--output", str(tmp_path), sets=(*sets, *SHORT))
    assert done.code == 3
    assert done.json["status"] == "failed"
    assert set(done.json["accuracy"].values()) == {None}
    assert Path(done.json["report"]).exists()
    assert undocumented(done.json) == (set(), set()), "a line has the same fields, however a run ended"


def test_a_port_in_use_is_3_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = train("--services-only", "--output", str(tmp_path), sets=(f"services.urza.port={port}",))
    assert done.code == 3
    assert f"{port}" in done.err
    assert "urza could not start" in done.err


@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--json",), 0)])
def test_services_only_serves_until_it_is_interrupted(tmp_path: Path, flags: tuple[str, ...], code: int) -> None:
    with subprocess.Popen(
        command("--services-only", "--output", str(tmp_path), *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if flags:
            assert set(json.loads(line)["services"]) == {"urza", "tezzeret", "tamiyo", "oona", "kasmina", "tolaria"}
        else:
            assert "grpcurl -plaintext 127.0.0.1:" in line
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err


def test_services_only_can_be_interrupted_while_it_starts(tmp_path: Path) -> None:
    with running("--services-only", "--verbose", "--json", "--output", str(tmp_path)) as mesh:
        mesh.until("started")
        mesh.signal(signal.SIGINT)
        done = mesh.end()
    assert (done.code, done.out) == (0, "")


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """A run to its end, with controls."""
    output = tmp_path_factory.mktemp("whole")
    grows = ("growth.window=[0.2, 0.3]", "growth.wait_for_kernel=true", "growth.evaluation.min_epochs=1")
    # There is one decision, and it must be made however busy the machine is.
    sets = (*SHORT, *grows, "growth.decision_deadline_seconds=30")
    return train("--json", "--verbose", "--compare", "--output", str(output), sets=sets), output


def test_json_has_the_documented_fields(whole: tuple[Ended, Path]) -> None:
    done, output = whole
    assert done.code == 0, done.err
    told = done.json
    assert told["status"] == "succeeded"
    assert told["epochs"] == 4
    assert Path(told["run_dir"]).parent == output
    assert told["run_id"] == Path(told["run_dir"]).name
    assert told["startup_seconds"] > 0
    assert set(told["adaptations"]) == {"started", "fossilized", "culled"}
    assert told["adaptations"]["started"] == len(told["seeds"]) > 0
    states = {"DORMANT", "GERMINATED", "LOADING", "TRAINING", "GRAFTING", "STABILIZATION", "EVALUATING"}
    states |= {"FINE_TUNING", "FOSSILIZED", "CULLED", "CANCELLED", "ROLLED_BACK"}
    for seed in told["seeds"]:
        assert seed["slot"]
        assert seed["blueprint"]
        assert seed["state"] in states
        worth = seed["contribution"]
        assert worth is None or worth["low"] <= worth["points"] <= worth["high"]
    assert set(told["parameters"]) == {"host", "final"}
    assert told["flops"]["training"] > told["flops"]["growth"] > 0
    assert all(0 <= told["accuracy"][arm] <= 100 for arm in ("grown", "host", "bigger"))
    assert set(told["services"]) == {"urza", "tezzeret", "tamiyo", "oona", "kasmina", "tolaria"}
    assert all(service["restarts"] == 0 and ":" in service["address"] for service in told["services"].values())
    assert told["events"]["published"] > 0
    assert told["events"]["dropped"] == 0
    assert json.loads((Path(told["run_dir"]) / "summary.json").read_text())["run_id"] == told["run_id"]


def undocumented(told: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Fields of a run's line that the user guide does not name, and fields it names that are not there."""
    named = dict.fromkeys(("accuracy", "comparisons", "arms"), "<arm>")
    maps = {**named, "services": "<service>", "export.formats": "<format>"}
    return differences(documented("docs/user_guide.md", "field"), fields(told, maps))


def test_the_guide_documents_every_field_and_no_other(whole: tuple[Ended, Path]) -> None:
    told = whole[0].json
    assert undocumented(told) == (set(), set())
    assert undocumented({**told, "new": 1}) == ({"new"}, set())
    del told["rollbacks"], told["parameters"]["final"]
    assert undocumented(told) == (set(), {"rollbacks", "parameters.final"})


def test_the_story_is_told_on_the_way(whole: tuple[Ended, Path]) -> None:
    done, _ = whole
    assert "first step" in done.err
    assert "Tamiyo (" in done.err
    assert "[grown] epoch   4/4" in done.err
    assert "growth took" in done.err
    assert f"{done.json['verdict']['title']}.\n" in done.err
    assert "urza serving" in done.err


def test_the_report_shows_the_run(whole: tuple[Ended, Path]) -> None:
    report = Path(whole[0].json["report"]).read_text(encoding="utf-8")
    assert "After epoch 1" in report
    assert "bigger" in report
    assert "<script" not in report
    assert len(report) < 500_000


def test_a_resumed_run_keeps_its_configuration(whole: tuple[Ended, Path]) -> None:
    done = train("--resume", "--output", str(whole[1]), "--no-growth", sets=("training.epochs=9", "run.name=other"))
    assert done.code == 2
    assert "training.epochs is 4, not 9" in done.err
    assert "growth.enabled is true, not false" in done.err
    done = train("--resume", whole[0].json["run_id"], "--output", str(whole[1]), sets=("data.data_dir=elsewhere",))
    assert (done.code, "data.data_dir is null, not elsewhere" in done.err) == (2, True)


@pytest.mark.full
def test_interrupts_save_and_resume_goes_on_with_one_train_py_at_a_time(tmp_path: Path) -> None:
    sets = (*SHORT, "training.epochs=3000", "growth.enabled=false")
    with running("--json", "--output", str(tmp_path), sets=sets) as run:
        run.until("[grown] epoch")
        assert run.until("[grown] epoch")
        second = train("--resume", "--output", str(tmp_path))
        assert (second.code, "another train.py holds this run" in second.err) == (2, True)
        run.signal(signal.SIGINT)
        done = run.end()
    assert done.code == 130
    told = done.json
    assert told["status"] == "interrupted"
    assert "saving a checkpoint" in done.err
    assert f"--resume {told['run_dir']}" in done.err
    assert list(Path(told["run_dir"]).glob("checkpoints/*/manifest.json"))
    with running("--json", "--resume", told["run_dir"]) as run:
        before = int(run.until("step ").split("step ")[1].split()[0])
        assert before > 0, "it goes on where it was"
        run.until("[grown] epoch")
        run.signal(signal.SIGTERM)
        assert run.end().code == 143
    with running("--json", "--resume", told["run_id"], "--output", str(tmp_path)) as run:
        run.until("[grown] epoch")
        children = psutil.Process(run.process.pid).children(recursive=True)
        trainer = next(child for child in children if "services.tolaria.training_process" in child.cmdline())
        trainer.suspend()  # it cannot hear the first one
        run.signal(signal.SIGINT)
        run.until("saving a checkpoint")
        run.signal(signal.SIGINT)
        done = run.end()
    assert done.code == 130
    assert "stopping now" in done.err
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.full
def test_what_is_killed_comes_back_and_a_training_process_so_often_and_no_more(tmp_path: Path) -> None:
    sets = (*SHORT, "training.epochs=3000", "growth.enabled=false", "training.max_restarts=1")
    with running("--json", "--output", str(tmp_path), sets=sets) as run:
        run.until("[grown] epoch")
        services = psutil.Process(run.process.pid).children()
        next(child for child in services if "services.urza" in child.cmdline()).kill()
        run.until("urza restarting: restart 1")
        for _ in range(2):
            run.until("[grown] epoch")
            children = psutil.Process(run.process.pid).children()
            next(child for child in children if "services.tolaria.training_process" in child.cmdline()).kill()
        done = run.end()
    assert done.code == 1
    assert "resuming it from its last checkpoint" in done.err
    assert "ended by SIGKILL, and was resumed 1 times before" in done.err
    assert done.json["training_restarts"] == 1
    assert done.json["services"]["urza"]["restarts"] == 1
    assert "urza exited: killed by SIGKILL" in Path(done.json["report"]).read_text(encoding="utf-8")


def test_an_interrupt_before_the_first_checkpoint_says_so(tmp_path: Path) -> None:
    with running("--json", "--output", str(tmp_path), sets=SHORT) as run:
        run.until("loading torch")
        run.signal(signal.SIGINT)
        done = run.end()
    assert done.code == 130
    assert "no checkpoint yet" in done.err
    assert done.json["startup_seconds"] is None


def test_missing_data_files_are_1_with_the_way_out(tmp_path: Path) -> None:
    sets = ("data.name=cifar10", f"data.data_dir={tmp_path}/none")
    done = train("--quiet", "--output", str(tmp_path), sets=sets)
    assert done.code == 1
    assert "training failed" in done.err
    assert "none" in done.err


def test_a_training_process_without_a_word_is_1(tmp_path: Path) -> None:
    """Its configuration is taken from it before it can read it: it ends before it can say why."""
    with running("--json", "--verbose", "--output", str(tmp_path), sets=SHORT) as run:
        run.until("training started")
        folder = next(tmp_path.iterdir())
        (folder / "config.yaml").write_text("no: yes\n")
        done = run.end()
    assert done.code in (1, 3)
    assert done.json["status"] == "failed"
    assert done.json["reason"]


def test_quiet_prints_the_result_alone_and_a_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with running("--quiet", "--json", "--output", str(tmp_path), sets=(*SHORT, "growth.enabled=false")) as run:
        while not (folders := list(tmp_path.glob("*/config.yaml"))):
            assert run.process.poll() is None
        (folders[0].parent / "report.html").mkdir()
        (folders[0].parent / "summary.json").mkdir()
        done = run.end()
    assert done.code == 0
    assert done.json["report"] is None
    assert "no report: " in done.err
    assert "epoch" not in done.err


def test_the_live_view_on_a_terminal(tmp_path: Path) -> None:
    terminal, inner = pty.openpty()
    seen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is gone: all is read
            while part := os.read(terminal, 65536):
                seen.extend(part)

    reader = threading.Thread(target=read)
    process = subprocess.Popen(
        command("--output", str(tmp_path), sets=(*SHORT, "growth.window=[0.2, 0.3]")),
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"},
    )
    os.close(inner)
    reader.start()
    assert process.wait(timeout=150) == 0
    reader.join()
    os.close(terminal)
    text = seen.decode()
    assert "Traceback" not in text
    assert "urza" in text
    assert "epoch" in text
    assert "report:" in text


def test_make_run_is_the_readmes_first_command(tmp_path: Path) -> None:
    assert shutil.which("make"), "make is there"
    arguments = f"ARGS=--dry-run --output {tmp_path}"
    done = subprocess.run(["make", "-s", "run", arguments], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "plan: start urza" in done.stdout
