"""Loading the configuration: defaults < profile < file < environment < ``--set``, with the origin of every value."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from services.chassis.config.errors import ConfigError, Problem
from services.chassis.config.schema import EsperConfig, Section

ENVIRONMENT_PREFIX: Final = "ESPER__"
DEFAULT: Final = "default"
_UNUSABLE: Final = object()
KeyPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where each of its values comes from.

    ``provenance`` maps the dotted path of every value to ``default``, ``file:line``, ``env NAME`` or ``--set``.
    """

    config: EsperConfig
    provenance: Mapping[str, str]


@dataclass(frozen=True)
class _Layer:
    """Values of one source and the origin of each path in it."""

    values: dict[str, Any]
    origins: dict[KeyPath, str]


def load_config(
    path: Path | None, *, profile: str | None = None, overrides: Sequence[str] = (), environ: Mapping[str, str]
) -> LoadedConfig:
    """The effective configuration.

    Args:
        path: YAML file; ``None`` for the defaults alone.
        profile: name of ``profiles/<name>.yaml`` beside the file; its values lie below those of the file.
        overrides: ``a.b=value`` each, the value in YAML.
        environ: ``ESPER__A__B=value`` sets ``a.b``; other variables are ignored.

    Raises:
        ConfigError: with every problem found, not the first alone.
    """
    problems: list[Problem] = []
    layers: list[_Layer] = []
    if profile is not None:
        folder = path.parent if path is not None else Path("configs")
        layers.append(_read_file(folder / "profiles" / f"{profile}.yaml", problems))
    if path is not None:
        layers.append(_read_file(path, problems))
    layers.append(_read_environment(environ, problems))
    layers.append(_read_overrides(overrides, problems))
    merged, origins = _merge(layers)
    try:
        config = EsperConfig.model_validate(merged)
    except ValidationError as error:
        problems.extend(_problem(detail, merged, origins) for detail in error.errors(include_url=False))
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    provenance = {dotted(key): _origin(key, origins) for key, _ in leaves(config)}
    return LoadedConfig(config, provenance)


def leaves(section: Section, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """(path, value) of every value that is no section, in the order of the schema."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def dotted(path: KeyPath) -> str:
    """``("a", "b", 0)`` as ``a.b[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def dump(config: EsperConfig) -> str:
    """The configuration as YAML that loads back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def render_effective(loaded: LoadedConfig) -> str:
    """The configuration as YAML with the origin of every value beside it."""
    lines: list[str] = []

    def walk(section: Section, prefix: KeyPath) -> None:
        values = section.model_dump(mode="json")
        for name in type(section).model_fields:
            indent, key = "  " * len(prefix), (*prefix, name)
            child = getattr(section, name)
            if isinstance(child, Section):
                lines.append(f"{indent}{name}:")
                walk(child, key)
            else:
                origin = loaded.provenance[dotted(key)]
                lines.append(f"{indent}{name}: {inline(values[name])}  # {origin}")

    walk(loaded.config, ())
    return "\n".join(lines) + "\n"


def inline(value: Any) -> str:
    """A plain value in YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _read_file(path: Path, problems: list[Problem]) -> _Layer:
    """The values of a YAML file; what is wrong with it goes to ``problems``."""
    empty = _Layer({}, {})
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, sorted(other.name for other in path.parent.glob("*.yaml")), n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        problems.append(Problem(str(path), "", "there is no such file", hint))
        return empty
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        problems.append(Problem(str(path), "", f"it cannot be read: {reason}"))
        return empty
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problems.append(Problem(f"{path}:{line}", "", f"it is no YAML: {error.problem}"))
        return empty
    if node is None:
        return empty
    if not isinstance(node, yaml.MappingNode):
        problems.append(Problem(f"{path}:1", "", "it is no map of sections", "see configs/experiment.yaml"))
        return empty
    origins: dict[KeyPath, str] = {}
    values = _construct(node, (), path, origins, problems)
    return _Layer(values, origins)


def _construct(node: yaml.Node, path: KeyPath, file: Path, origins: dict[KeyPath, str], problems: list[Problem]) -> Any:
    """The plain value of a node; the line of every key goes to ``origins``, duplicate keys to ``problems``."""
    place = f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            inner = (*path, key)
            here = f"{file}:{key_node.start_mark.line + 1}"
            if key in values:
                problems.append(Problem(here, dotted(inner), f"it is set twice, first at {origins[inner]}", "keep one"))
            origins[inner] = here
            value = _construct(value_node, inner, file, origins, problems)
            if value is not _UNUSABLE:
                values[key] = value
        return values
    origins.setdefault(path, place)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[(*path, index)] = f"{file}:{item.start_mark.line + 1}"
        return [_construct(item, (*path, index), file, origins, problems) for index, item in enumerate(node.value)]
    try:
        return _scalar(node)
    except (yaml.YAMLError, ValueError) as error:
        problems.append(Problem(place, dotted(path), f"it is no YAML value: {error}"))
        return _UNUSABLE


def _scalar(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def _read_environment(environ: Mapping[str, str], problems: list[Problem]) -> _Layer:
    layer = _Layer({}, {})
    for name, text in sorted(environ.items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            path = tuple(part.lower() for part in name.removeprefix(ENVIRONMENT_PREFIX).split("__"))
            _set(layer, path, text, f"env {name}", problems)
    return layer


def _read_overrides(overrides: Sequence[str], problems: list[Problem]) -> _Layer:
    layer = _Layer({}, {})
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            problems.append(
                Problem("--set", override, "it has not the form key=value", "for example training.epochs=3")
            )
        else:
            _set(layer, tuple(key.split(".")), text, "--set", problems)
    return layer


def _set(layer: _Layer, path: tuple[str, ...], text: str, origin: str, problems: list[Problem]) -> None:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        problems.append(Problem(origin, dotted(path), f"{text!r} is no YAML value", "quote it"))
        return
    values = layer.values
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            inner = values[part] = {}
        values = inner
    values[path[-1]] = value
    layer.origins.update({(*path, *inner): origin for inner in _paths(value)})


def _paths(value: Any) -> Iterator[KeyPath]:
    """The path of a value and of every key inside it."""
    yield ()
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from ((key, *path) for path in _paths(inner))


def _merge(layers: Sequence[_Layer]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Maps are merged key by key, anything else is replaced; origins follow their values."""
    merged: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}

    def put(into: dict[str, Any], values: Mapping[str, Any], layer: _Layer, prefix: KeyPath) -> None:
        for key, value in values.items():
            path = (*prefix, key)
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                put(into[key], value, layer, path)
                continue
            for stale in [known for known in origins if known[: len(path)] == path]:
                del origins[stale]
            origins.update({known: place for known, place in layer.origins.items() if known[: len(path)] == path})
            into[key] = value

    for layer in layers:
        put(merged, layer.values, layer, ())
        for path, place in layer.origins.items():
            origins.setdefault(path, place)
    return merged, origins


def _origin(path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """Where the value at ``path`` was set: itself, or the nearest key around it."""
    for length in range(len(path), 0, -1):
        if path[:length] in origins and (length == len(path) or not _is_section(path[:length])):
            return origins[path[:length]]
    return DEFAULT


def _problem(detail: ErrorDetails, values: Mapping[str, Any], origins: Mapping[KeyPath, str]) -> Problem:
    path = _known_part(detail["loc"], values)
    place = next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), "configuration")
    if detail["type"] == "extra_forbidden":
        return Problem(place, dotted(path), "there is no such key", _nearest(path))
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = "" if isinstance(detail["input"], Mapping | Section) else f"{detail['input']!r}: "
    return Problem(place, dotted(path), f"{given}{message}", _about(path))


def _known_part(location: Sequence[str | int], values: Any) -> KeyPath:
    """The location without what pydantic puts in for unions and the like: only keys that were given."""
    path: list[str | int] = []
    for part in location:
        if isinstance(values, Mapping) and part in values:
            values = values[str(part)]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _section_at(path: KeyPath) -> type[Section] | None:
    section: type[Section] = EsperConfig
    for part in path:
        field = section.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, Section):
            return None
        section = field.annotation
    return section


def _is_section(path: KeyPath) -> bool:
    return _section_at(path) is not None


def _nearest(path: KeyPath) -> str:
    """The key that was probably meant: in the same section, else anywhere."""
    section, wrong = _section_at(path[:-1]), str(path[-1])
    siblings = list(section.model_fields) if section is not None else []
    if near := difflib.get_close_matches(wrong, siblings, n=1):
        return f"did you mean {dotted((*path[:-1], near[0]))}?"
    every = {dotted(key): str(key[-1]) for key, _ in leaves(EsperConfig())}
    close = difflib.get_close_matches(wrong, every.values(), n=1, cutoff=0.8)
    if close:
        return f"did you mean {next(key for key, last in every.items() if last == close[0])}?"
    return f"known keys: {', '.join(siblings)}"


def _about(path: KeyPath) -> str:
    """What the schema says of a key, as the way out."""
    section = _section_at(path[:-1]) if path else None
    field = section.model_fields.get(str(path[-1])) if section is not None else None
    return (field.description or "") if field is not None else ""
