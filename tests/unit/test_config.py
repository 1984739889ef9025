"""The configuration: layers, provenance, and every mistake named with its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from services.chassis.config.errors import ConfigError
from services.chassis.config.loader import LoadedConfig, dump, leaves, load_config, render_effective
from services.chassis.config.schema import EsperConfig, is_loopback
from services.chassis.config.template import template

ROOT = Path(__file__).resolve().parents[2]


def load(
    path: Path | None = None,
    *,
    profile: str | None = None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> LoadedConfig:
    return load_config(path, profile=profile, overrides=overrides, environ=environ or {})


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write_file(text: str, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def problems(**arguments: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(**arguments)
    return [str(problem) for problem in caught.value.problems]


def test_layers_win_in_order_and_every_value_knows_its_origin(write: Callable[..., Path], tmp_path: Path) -> None:
    write("training: {epochs: 1, threads: 2}\nrun: {seed: 1}\ndata:\n  batch_size: 5\n", "profiles/small.yaml")
    path = write("training:\n  epochs: 2\n  precision: bfloat16\ncompare: [host]\n")
    loaded = load(
        path,
        profile="small",
        overrides=["training.epochs=4", "growth.budget={parameters: 4}"],
        environ={"ESPER__TRAINING__EPOCHS": "3", "ESPER__RUN__SEED": "9", "HOME": "ignored"},
    )
    config, origin = loaded.config, loaded.provenance
    assert (config.training.epochs, config.training.threads, config.run.seed, config.data.batch_size) == (4, 2, 9, 5)
    assert config.growth.budget.parameters == 4
    assert config.growth.budget.flops is None
    assert origin["training.epochs"] == "--set"
    assert origin["run.seed"] == "env ESPER__RUN__SEED"
    assert origin["training.precision"] == f"{path}:3"
    assert origin["compare"] == f"{path}:4"
    assert origin["data.batch_size"] == f"{tmp_path / 'profiles' / 'small.yaml'}:4"
    assert origin["growth.budget.parameters"] == "--set"
    assert origin["data.name"] == "default"
    assert f"precision: bfloat16  # {path}:3" in render_effective(loaded)


def test_a_list_replaces_a_list_with_its_origins(write: Callable[..., Path]) -> None:
    write("model: {widths: [1, 2, 3]}", "profiles/p.yaml")
    path = write("\nmodel:\n  widths:\n    - 4\n    - 0.5\n")
    with pytest.raises(ConfigError) as caught:
        load(path, profile="p")
    (problem,) = caught.value.problems
    assert (problem.place, problem.key) == (f"{path}:5", "model.widths[1]")


def test_all_mistakes_are_named_at_once_with_file_line_and_the_key_that_was_meant(write: Callable[..., Path]) -> None:
    path = write(
        "training:\n  epochs: ten\n  optimzer: {}\n  epochs: 4\ndata:\n  name: digit\n  validation_ratio: 0.9\n"
        "epochs: 4\nxyzzy: 1\n"
    )
    found = problems(path=path, overrides=["novalue", "a..b=1", "run.seed={"], environ={"ESPER__RUN__SEEDS": "1"})
    text = "\n".join(found)
    assert f"{path}:4: training.epochs: it is set twice, first at {path}:2" in text
    assert f"{path}:3: training.optimzer: there is no such key (did you mean training.optimizer?)" in text
    assert f"{path}:6: data.name: 'digit': input should be 'digits', 'cifar10'" in text
    assert f"{path}:7: data.validation_ratio: 0.9: input should be less than 0.5" in text
    assert f"{path}:8: epochs: there is no such key (did you mean training.epochs?)" in text
    assert f"{path}:9: xyzzy: there is no such key (known keys: run, data" in text
    assert "--set: novalue: it has not the form key=value" in text
    assert "--set: a..b=1: it has not the form" in text
    assert "--set: run.seed: '{' is no YAML value" in text
    assert "env ESPER__RUN__SEEDS: run.seeds: there is no such key (did you mean run.seed?)" in text
    assert len(found) == 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "it is no YAML"),
        ("- 1\n- 2\n", "it is no map of sections"),
        ("training: 3", "training: 3: input should be a valid dictionary"),
        ("training: !!int ten", "it is no YAML value"),
        ("growth: {budget: {flops: 2, parameters: 2}}", "growth.budget: set exactly one of flops and parameters"),
        ("growth: {budget: {flops: null}}", "set exactly one"),
        ("growth: {window: [0.5, 0.2]}", "window: 0.5 to 0.2 is no part of the schedule"),
        ("data: {name: factory}", "name: factory needs the key factory"),
        ("model: {factory: 'a.b:c'}", "the key factory is set, but name is not factory"),
        ("model: {name: factory, factory: 'no path'}", "model.factory: 'no path': string should match"),
        ("services: {host: 0.0.0.0}", "0.0.0.0 is not loopback"),
        ("services: {tls: {certificate: a.pem}}", "certificate and key belong together"),
        ("services: {tls: {require_client_certificate: true}}", "needs ca"),
        ("telemetry: {traces: otlp}", "needs otlp_endpoint"),
        ("services: {urza: {port: 70000}}", "services.urza.port: 70000: input should be less than or equal to 65535"),
    ],
)
def test_each_kind_of_mistake_has_its_message(write: Callable[..., Path], text: str, expected: str) -> None:
    path = write(text)
    (problem,) = problems(path=path)
    assert expected in problem
    assert problem.startswith(str(path))


def test_files_that_cannot_be_used_say_why(write: Callable[..., Path], tmp_path: Path) -> None:
    write("{}", "quick.yaml")
    assert problems(path=tmp_path / "qick.yaml") == [
        f"{tmp_path / 'qick.yaml'}: there is no such file (did you mean {tmp_path / 'quick.yaml'}?)"
    ]
    assert "check the path" in problems(path=tmp_path / "zzz" / "a.yaml")[0]
    assert "it cannot be read: Is a directory" in problems(path=tmp_path)[0]
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xff}")
    assert "it is not UTF-8 text" in problems(path=tmp_path / "latin.yaml")[0]
    assert "there is no such file" in problems(profile="nobody")[0]


def test_an_empty_file_is_all_defaults(write: Callable[..., Path]) -> None:
    assert load(write("# nothing\n")).config == EsperConfig()


def test_a_later_value_can_replace_what_was_no_map() -> None:
    loaded = load(overrides=["training=3", "training.epochs=4"])
    assert loaded.config.training.epochs == 4
    assert loaded.provenance["training.epochs"] == "--set"


def test_listeners_elsewhere_need_tls_or_consent() -> None:
    assert load(overrides=["services.host=0.0.0.0", "services.insecure=true"]).config.services.insecure
    tls = "services.tls={certificate: c, key: k}"
    assert load(overrides=["services.host=10.0.0.1", tls]).config.services.host == "10.0.0.1"
    assert [is_loopback(host) for host in ("localhost", "::1", "127.1.2.3", "example.org", "10.0.0.1")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_the_committed_template_is_the_schema_and_loads_to_the_defaults() -> None:
    path = ROOT / "configs" / "experiment.yaml"
    assert path.read_text(encoding="utf-8") == template()
    assert load(path).config == EsperConfig()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    load(path)


@given(
    epochs=st.integers(1, 10**6),
    rate=st.floats(1e-6, 10),
    name=st.none() | st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20),
    widths=st.lists(st.integers(1, 512), min_size=1, max_size=5),
)
def test_what_is_dumped_loads_back_equal(epochs: int, rate: float, name: str | None, widths: list[int]) -> None:
    values = {
        "run": {"name": name},
        "model": {"widths": widths},
        "training": {"epochs": epochs, "optimizer": {"learning_rate": rate}},
    }
    config = EsperConfig.model_validate(values)
    assert EsperConfig.model_validate(yaml.safe_load(dump(config))) == config


@given(st.sampled_from([path for path, _ in leaves(EsperConfig())]), st.integers(0, 100))
def test_a_misspelt_key_is_recognised(path: tuple[str, ...], where: int) -> None:
    key = path[-1]
    cut = where % len(key)
    wrong = key[:cut] + key[cut] * 2 + key[cut + 1 :]
    with pytest.raises(ConfigError, match=r"did you mean|known keys"):
        load(overrides=[f"{'.'.join((*path[:-1], wrong))}=1"])
