"""The folder of a run: made, held, found, refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from services.chassis.config.errors import ConfigError
from services.chassis.config.loader import load_config
from services.chassis.config.schema import EsperConfig
from services.chassis.errors import EsperError, Reason
from services.tolaria.run_folder import DIAGNOSIS, FORMAT_VERSION, RunFolder


def config(output: Path, *overrides: str) -> EsperConfig:
    return load_config(None, overrides=[f"run.output_dir={output}", *overrides], environ={}).config


def reason(error: pytest.ExceptionInfo[EsperError]) -> Reason:
    return error.value.reason


def test_a_new_folder_holds_its_configuration(tmp_path: Path) -> None:
    wanted = config(tmp_path / "runs", "training.epochs=3")
    folder = RunFolder.create(wanted, stem="quick start")
    assert folder.run_id.startswith("quick-start-")
    assert (folder.path / "config.yaml").stat().st_mode & 0o777 == 0o600
    assert folder.config() == wanted
    assert json.loads((folder.path / "format.json").read_text()) == {"format_version": FORMAT_VERSION, "kind": "run"}
    assert all((folder.path / inner).is_dir() for inner in ("logs", "traces", "checkpoints"))
    folder.close()


def test_one_process_holds_a_run(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path, "run.name=mine"), stem="x")
    with pytest.raises(EsperError, match=r"another train\.py holds this run") as error:
        RunFolder.open(folder.path)
    assert reason(error) is Reason.RUN_LOCKED
    folder.close()
    RunFolder.open(folder.path).close()


def test_a_name_is_used_once(tmp_path: Path) -> None:
    RunFolder.create(config(tmp_path, "run.name=mine"), stem="x").close()
    with pytest.raises(EsperError, match="--resume mine") as error:
        RunFolder.create(config(tmp_path, "run.name=mine"), stem="x")
    assert reason(error) is Reason.RUN_FOLDER_INVALID


def test_a_place_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EsperError, match="Not a directory") as error:
        RunFolder.create(config(tmp_path / "file" / "runs"), stem="x")
    assert reason(error) is Reason.STORAGE_FAILED
    folder = RunFolder.create(config(tmp_path, "run.name=mine"), stem="x")
    folder.close()
    (folder.path / "logs").rmdir()
    (folder.path / "logs").write_text("")
    with pytest.raises(EsperError, match="File exists"):
        RunFolder.open(folder.path)


def test_runs_are_found_by_path_name_or_as_the_newest(tmp_path: Path) -> None:
    for number, name in enumerate(("older", "newer")):
        folder = RunFolder.create(config(tmp_path, f"run.name={name}"), stem="x")
        os.utime(folder.path / "format.json", (number, number))
        folder.close()
    for run, found in (("", "newer"), ("older", "older"), (str(tmp_path / "older"), "older")):
        folder = RunFolder.find(run, tmp_path)
        assert folder.run_id == found
        folder.close()
    with pytest.raises(EsperError, match="no run to resume"):
        RunFolder.find("", tmp_path / "elsewhere")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_what_is_no_run_folder(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "format.json").write_text(content)
    with pytest.raises(EsperError, match="no run folder") as error:
        RunFolder.open(tmp_path)
    assert reason(error) is Reason.RUN_FOLDER_INVALID


def test_a_diagnosis_is_not_resumed_and_never_the_newest_run(tmp_path: Path) -> None:
    RunFolder.create(config(tmp_path, "run.name=mine"), stem="x").close()
    diagnosis = RunFolder.create(config(tmp_path, "run.name=look"), stem="x", kind=DIAGNOSIS)
    diagnosis.close()
    os.utime(tmp_path / "mine" / "format.json", (1, 1))
    found = RunFolder.find("", tmp_path)
    assert found.run_id == "mine"
    found.close()
    with pytest.raises(EsperError, match="look: it is a diagnosis, which is not resumed") as error:
        RunFolder.find("look", tmp_path)
    assert reason(error) is Reason.RUN_FOLDER_INVALID


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "format.json").write_text('{"format_version": 99}')
    with pytest.raises(EsperError, match="format version 99"):
        RunFolder.open(tmp_path)


def test_a_configuration_that_somebody_broke(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path), stem="x")
    (folder.path / "config.yaml").write_text("no_such_key: 1\n")
    with pytest.raises(ConfigError, match="no_such_key"):
        folder.config()
    folder.close()
