"""The configuration: layers, provenance, and every mistake named with its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.chassis.config.document import KeyPath, block, dotted, inline, read
from services.chassis.config.errors import ConfigError
from services.chassis.config.loader import LoadedConfig, dump, leaves, load_config, render_effective
from services.chassis.config.schema import EsperConfig, Section, is_loopback
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
    environ = {"ESPER__RUN__SEEDS": "1", "ESPER__RUN____SEED": "1"}
    found = problems(path=path, overrides=["novalue", "a..b=1", "run.seed={"], environ=environ)
    text = "\n".join(found)
    assert f"{path}:4: training.epochs: it is set twice, first at {path}:2" in text
    assert f"{path}:3: training.optimzer: there is no such key (did you mean training.optimizer?)" in text
    assert f"{path}:6: data.name: digit: input should be 'digits', 'cifar10'" in text
    assert f"{path}:7: data.validation_ratio: 0.9: input should be less than 0.5" in text
    assert f"{path}:8: epochs: there is no such key (did you mean training.epochs?)" in text
    assert f"{path}:9: xyzzy: there is no such key (known keys: run, data" in text
    assert "--set: novalue: it has not the form key=value" in text
    assert "--set: a..b=1: it has not the form" in text
    assert "--set: run.seed: it is no YAML: expected the node content, but found '<stream end>'" in text
    assert "env ESPER__RUN____SEED: it has not the form ESPER__SECTION__KEY" in text
    assert "env ESPER__RUN__SEEDS: run.seeds: there is no such key (did you mean run.seed?)" in text
    assert len(found) == 11


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "it is empty (configs/experiment.yaml shows every key)"),
        ("# nothing but words\n", "it is empty"),
        ("a: [", "it is no YAML"),
        ("a: 1\n---\nb: 2\n", "c.yaml:2: it is no YAML: but found another document"),
        ("%YAML 3.0\n---\na: 1\n", "it is no YAML"),
        ("run:\n  name: \x07\n", "c.yaml:2: it is no YAML: the character U+0007 is not allowed"),
        ("[" * 5000, "it is nested too deeply"),
        ("run: &run\n  seed: *run\n", "c.yaml:1: run.seed: it contains itself"),
        ("model:\n  widths: &w [1, *w]\n", "c.yaml:2: model.widths[1]: it contains itself"),
        ("run:\n  ? [a, b]\n  : 1\n", "c.yaml:2: run: a key is a map or a list (keys are words)"),
        ("run: {1: 2}", "run.1: there is no such key (known keys: name, seed"),
        ("- 1\n- 2\n", "it is no map of sections"),
        ("training: 3", "training: 3: this is a section: give it keys, or leave it out"),
        ("training:\n", "training: null: this is a section"),
        ("run: {seed: !!int ten}", "run.seed: ten is no int"),
        ("growth: {enabled: !!bool maybe}", "growth.enabled: maybe is no bool"),
        ("run: {name: !!timestamp 2024-01-01}", "run.name: the tag !!timestamp has no meaning here"),
        ("run: !!python/object:os.system x", "run: the tag !!python/object:os.system has no meaning here"),
        ("run: !!set {a}", "run: the tag !!set has no meaning here"),
        ("!!omap [a: 1]", "the tag !!omap has no meaning here"),
        ("run: {name: 1e3}", "run.name: 1000.0: input should be text, in quotes"),
        ("run: {name: ../up}", "run.name: ../up: string should match pattern"),
        ("run: {name: latest}", "latest is the link to the newest run"),
        ("run: {output_dir: [1]}", "run.output_dir: [1]: input should be a path (Run folders are made under here.)"),
        ("training: {epochs: true}", "training.epochs: true: input should be a valid integer"),
        ("training: {epochs: '3'}", "training.epochs: '3': input should be a valid integer"),
        ("training: {epochs: 3.0}", "training.epochs: 3.0: input should be a valid integer"),
        ("growth: {enabled: yes}", "growth.enabled: 'yes': input should be a valid boolean"),
        (
            "growth: {evaluation: {threshold: .nan}}",
            "evaluation.threshold: .nan: input should be a finite number",
        ),
        ("growth: {window: [0.1]}", "growth.window: [0.1]: a value is missing (Share of the schedule"),
        (
            "growth: {slots: [a, 2]}",
            "growth.slots[1]: 2: input should be text, in quotes where it looks like",
        ),
        (
            "model: {widths: [4, 0]}",
            "model.widths[1]: 0: input should be greater than or equal to 1 (Channels",
        ),
        ("compare: [host, host]", "compare: [host, host]: a control is named twice"),
        (
            "export:\n  formats: [onnx]",
            "export.formats: [onnx]: the other formats are made of the safetensors export: name safetensors, too",
        ),
        (
            "export:\n  formats: [safetensors, onnx, onnx]",
            "export.formats: [safetensors, onnx, onnx]: a format is named twice",
        ),
        ("optimizer: {name: sgd}", "optimizer: there is no such key (did you mean training.optimizer?)"),
        ("data: {Batch-Size: 3}", "data.Batch-Size: there is no such key (did you mean data.batch_size?)"),
        ("nowhere: {to: {go: 1}}", "nowhere: there is no such key (known keys: run, data"),
        ("services: {urza: {address: nohost}}", "services.urza.address: nohost: string should match pattern"),
        (
            "services: {oona: {kafka: {bootstrap_servers: []}}}",
            "bootstrap_servers: []: list should have at least 1",
        ),
        ("services: {oona: {kafka: {topic_prefix: 'a b'}}}", "topic_prefix: a b: string should match pattern"),
        ("growth: {budget: {flops: 2, parameters: 2}}", "growth.budget: set exactly one of flops, parameters, "),
        ("growth: {budget: {flops: null}}", "set exactly one"),
        ("growth: {window: [0.5, 0.2]}", "window: 0.5 to 0.2 is no part of the schedule"),
        (
            "growth: {blend_steps: 50, blend: {schedule: drift, max_steps: 50}}",
            "blend.max_steps: 50 steps are not enough for a ramp of 50; give more, or fewer blend_steps",
        ),
        ("data: {name: factory}", "name: factory needs the key factory"),
        ("model: {factory: 'a.b:c'}", "the key factory is set, but name is not factory"),
        ("model: {name: factory, factory: 'no path'}", "model.factory: no path: string should match"),
        ("services: {host: 0.0.0.0}", "0.0.0.0 is not loopback"),
        ("services: {urza: {s3: {bucket: 'No!'}}}", "services.urza.s3.bucket: No!: string should match"),
        ("services: {urza: {artifacts_dir: a, s3: {bucket: abc}}}", "kept in one place; set one of them"),
        (
            "services: {urza: {s3: {bucket: abc, endpoint_url: 'http://192.0.2.1:9000'}}}",
            "urza.s3.endpoint_url: 192.0.2.1 is not loopback; use https, or set insecure: true",
        ),
        (
            "services: {urza: {s3: {endpoint_url: 's3.example.org'}}}",
            "endpoint_url: s3.example.org: string should match",
        ),
        ("services: {tls: {certificate: a.pem}}", "certificate and key belong together"),
        ("services: {tls: {require_client_certificate: true}}", "needs ca"),
        ("services: {tls: {certificate: a.pem, key: a.key}}", "set ca to the PEM file of the authority"),
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


def test_a_file_without_values_is_all_defaults(write: Callable[..., Path]) -> None:
    assert load(write("\ufeff{}\n")).config == EsperConfig()
    assert load().config == EsperConfig()


def test_words_are_those_of_yaml_1_2(write: Callable[..., Path]) -> None:
    path = write(
        "telemetry: {traces: off}\nrun: {name: 2024-01-01, seed: 010}\ngrowth: {policy: 1_0, enabled: False}\n"
        "training: {optimizer: {learning_rate: 1e-3, clip_norm: ~}}\nservices: {urza: {address: '::1:5'}}\n"
    )
    config = load(path, overrides=["run.state_dir="], environ={"ESPER__DATA__DATA_DIR": "no"}).config
    assert (config.telemetry.traces, config.run.name, config.run.seed) == ("off", "2024-01-01", 10)
    assert (config.growth.policy, config.growth.enabled) == ("1_0", False)
    assert (config.training.optimizer.learning_rate, config.training.optimizer.clip_norm) == (0.001, None)
    assert (config.run.state_dir, config.data.data_dir) == (None, Path("no"))


def test_a_mistake_in_a_value_set_apart_is_found_where_it_was_set(write: Callable[..., Path]) -> None:
    path = write("growth:\n  budget:\n    flops: 2\n")
    (problem,) = problems(path=path, environ={"ESPER__GROWTH__BUDGET__PARAMETERS": "3"})
    assert problem.startswith(f"{path}:2: growth.budget: set exactly one of flops, parameters")
    assert problems(overrides=["run.seed.x=3"])[0].startswith("--set: run.seed: input should be a valid integer")
    assert problems(environ={"ESPER__TRAINING__OPTIMIZER": "&o {x: *o}"})[0].startswith(
        "env ESPER__TRAINING__OPTIMIZER: training.optimizer.x: it contains itself"
    )


def test_a_long_value_is_cut_in_the_message() -> None:
    (problem,) = problems(overrides=[f"run.seed={'long' * 100}"])
    assert "longl...: input should be a valid integer" in problem
    assert len(problem) < 300


def test_the_message_has_a_line_for_each_problem() -> None:
    with pytest.raises(ConfigError) as one:
        load(overrides=["x=1"])
    assert str(one.value).startswith("configuration: 1 problem\n  --set: x: there is no such key")
    with pytest.raises(ConfigError) as two:
        load(overrides=["x=1", "y=1"])
    assert str(two.value).count("\n") == 2


def test_every_key_says_what_it_means() -> None:
    def silent(section: Section, prefix: str = "") -> list[str]:
        found = []
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if isinstance(value, Section):
                found += silent(value, f"{prefix}{name}.")
            elif not field.description:
                found.append(prefix + name)
        return found

    assert silent(EsperConfig()) == []


def test_a_later_value_can_replace_what_was_no_map() -> None:
    loaded = load(overrides=["training=3", "training.epochs=4"])
    assert loaded.config.training.epochs == 4
    assert loaded.provenance["training.epochs"] == "--set"


def test_listeners_elsewhere_need_tls_or_consent() -> None:
    assert load(overrides=["services.host=0.0.0.0", "services.insecure=true"]).config.services.insecure
    tls = "services.tls={certificate: c, key: k, ca: a}"
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


def test_the_template_says_which_values_there_are() -> None:
    text = template()
    assert "  # Which data set. One of digits, cifar10, cifar100, factory.\n  name: digits\n" in text
    assert "bigger, uniform.\ncompare: []\n" in text


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@settings(deadline=None)
@example("line\nbreak")
@example({"\x85": "\u2028"})
@example(["1e3", "off", "12:30", "0o7", "~", "1_0", ".inf"])
@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_what_is_written_is_read_back_in_both_yamls(value: Any) -> None:
    # The 1.1 of other tools as well as ours: the run folder's config.yaml is read by both.
    text = inline(value)
    assert read(text, str).value == value
    assert not read(text, str).problems
    assert "\n" not in text
    assert yaml.safe_load(text) == value
    assert read(block(value), str).value == value


WORDS = st.text(st.sampled_from("0123456789eE+-._:noyfabxNATRUE~"), min_size=1, max_size=8)


@given(
    epochs=st.integers(1, 10**6),
    rate=st.floats(1e-9, 1e9),
    policy=WORDS | st.text(),
    widths=st.lists(st.integers(1, 512), min_size=1, max_size=5),
    window=st.tuples(st.floats(0, 0.5), st.floats(0.6, 1)),
    folder=WORDS,
)
@settings(deadline=None)
def test_what_is_dumped_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    epochs: int,
    rate: float,
    policy: str,
    widths: list[int],
    window: tuple[float, float],
    folder: str,
) -> None:
    values = {
        "run": {"output_dir": folder},
        "model": {"widths": widths},
        "training": {"epochs": epochs, "optimizer": {"learning_rate": rate}},
        "growth": {"policy": policy, "window": window},
    }
    config = EsperConfig.model_validate(values)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path).config == config
    loaded = LoadedConfig(config, dict.fromkeys(map(dotted, (key for key, _ in leaves(config))), "here"))
    path.write_text(render_effective(loaded), encoding="utf-8")
    assert load(path).config == config


@given(st.text() | st.text(st.sampled_from("abc:-?[]{},&*!|>'\"%@`#~ \n\t01.e+")))
@settings(deadline=None)
def test_no_text_makes_the_loader_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.yaml"
    path.write_text(text, encoding="utf-8")
    for arguments in ({"path": path}, {"overrides": [f"run={text}", text]}, {"environ": {f"ESPER__{text}": text}}):
        try:
            load(**arguments)
        except ConfigError as error:
            assert error.problems  # noqa: PT017 - either outcome is right, nothing but ConfigError may come out


@settings(deadline=None)
@given(st.sampled_from([path for path, _ in leaves(EsperConfig())]), st.data())
def test_a_misspelt_key_is_recognised(path: KeyPath, data: st.DataObject) -> None:
    key = str(path[-1])
    at = data.draw(st.integers(0, len(key) - 1))
    wrong = data.draw(st.sampled_from([key[:at] + key[at] + key[at:], key.upper(), key.replace("_", "-")]))
    siblings = {str(other[-1]) for other, _ in leaves(EsperConfig()) if other[:-1] == path[:-1]}
    if wrong not in siblings:
        meant = dotted(path)
        with pytest.raises(ConfigError, match=rf"did you mean {re.escape(meant)}\?"):
            load(overrides=[f"{dotted((*path[:-1], wrong))}=1"])
