"""Loading the configuration: defaults < profile < file < environment < ``--set``, with the origin of every value."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from services.chassis.config.document import KeyPath, block, dotted, inline, read, shortened
from services.chassis.config.errors import ConfigError, Problem
from services.chassis.config.schema import EsperConfig, Section

__all__ = ["LoadedConfig", "load_config", "leaves", "dump", "render_effective", "dotted", "inline"]

ENVIRONMENT_PREFIX: Final = "ESPER__"
DEFAULT: Final = "default"

# What pydantic says in terms of Python; the rest of its words fit.
_WORDS: Final[Mapping[str, str]] = {
    "model_type": "this is a section: give it keys, or leave it out",
    "dict_type": "this is a section: give it keys, or leave it out",
    "missing": "a value is missing",
    "path_type": "input should be a path",
    "string_type": "input should be text, in quotes where it looks like something else",
}


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration and where each of its values comes from.

    ``provenance`` maps the dotted path of every value to ``default``, ``file:line``, ``env NAME`` or ``--set``.
    """

    config: EsperConfig
    provenance: Mapping[str, str]


@dataclass
class _Layer:
    """Values of one or several sources, and the origin of each path in them."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def add(self, values: Mapping[str, Any], origins: Mapping[KeyPath, str], prefix: KeyPath = ()) -> None:
        """Lay ``values`` over these: maps are merged key by key, anything else is replaced with its origins."""
        into = self.values
        for part in prefix:
            into = into[str(part)]
        for key, value in values.items():
            path = (*prefix, key)
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                self.add(value, origins, path)
                continue
            into[key] = value
            self.origins = {known: place for known, place in self.origins.items() if known[: len(path)] != path}
            self.origins.update({known: place for known, place in origins.items() if known[: len(path)] == path})


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
    merged = _Layer()
    if profile is not None:
        folder = path.parent if path is not None else Path("configs")
        _add_file(merged, folder / "profiles" / f"{profile}.yaml", problems)
    if path is not None:
        _add_file(merged, path, problems)
    _add_environment(merged, environ, problems)
    _add_overrides(merged, overrides, problems)
    try:
        config = EsperConfig.model_validate(merged.values)
    except ValidationError as error:
        problems.extend(_problem(detail, merged) for detail in error.errors(include_url=False))
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return LoadedConfig(config, {dotted(key): merged.origins.get(key, DEFAULT) for key, _ in leaves(config)})


def leaves(section: Section, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """(path, value) of every value that is no section, in the order of the schema."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def dump(config: EsperConfig) -> str:
    """The configuration as YAML that loads back equal."""
    return block(config.model_dump(mode="json"))


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
                lines.append(f"{indent}{name}: {inline(values[name])}  # {loaded.provenance[dotted(key)]}")

    walk(loaded.config, ())
    return "\n".join(lines) + "\n"


def _add_file(layer: _Layer, path: Path, problems: list[Problem]) -> None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, sorted(other.name for other in path.parent.glob("*.yaml")), n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        problems.append(Problem(str(path), "", "there is no such file", hint))
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        problems.append(Problem(str(path), "", f"it cannot be read: {reason}", "a configuration is a YAML file"))
        return
    document = read(text, lambda line: f"{path}:{line}")
    problems.extend(document.problems)
    if isinstance(document.value, dict):
        layer.add(document.value, document.origins)
    elif not document.problems:
        reason = "it is empty" if document.value is None else "it is no map of sections"
        problems.append(Problem(f"{path}:1", "", reason, "configs/experiment.yaml shows every key"))


def _add_environment(layer: _Layer, environ: Mapping[str, str], problems: list[Problem]) -> None:
    for name, text in sorted(environ.items()):
        if name.startswith(ENVIRONMENT_PREFIX):
            path = tuple(name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
            if all(path):
                _add_value(layer, path, text, f"env {name}", problems)
            else:
                hint = "for example ESPER__TRAINING__EPOCHS=3"
                problems.append(Problem(f"env {name}", "", "it has not the form ESPER__SECTION__KEY", hint))


def _add_overrides(layer: _Layer, overrides: Sequence[str], problems: list[Problem]) -> None:
    for override in overrides:
        key, separator, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if separator and all(path):
            _add_value(layer, path, text, "--set", problems)
        else:
            hint = "for example training.epochs=3"
            problems.append(Problem("--set", override, "it has not the form key=value", hint))


def _add_value(layer: _Layer, path: tuple[str, ...], text: str, origin: str, problems: list[Problem]) -> None:
    document = read(text, lambda line: origin, path)
    if document.problems:
        problems.extend(document.problems)
        return
    value = document.value
    for part in reversed(path):
        value = {part: value}
    layer.add(value, document.origins)


def _problem(detail: ErrorDetails, given: _Layer) -> Problem:
    path, value = _known_part(detail["loc"], given.values)
    place = _place(path, given.origins)
    if detail["type"] == "extra_forbidden":
        return Problem(place, dotted(path), "there is no such key", _nearest(path))
    message = detail["msg"].removeprefix("Value error, ")
    reason = _WORDS.get(detail["type"], message[:1].lower() + message[1:])
    shown = "" if isinstance(value, dict) else f"{shortened(value)}: "
    return Problem(place, dotted(path), shown + reason, _about(path))


def _known_part(location: Sequence[str | int], values: Any) -> tuple[KeyPath, Any]:
    """The part of a location that was given, and the value there; what is missing from a list was not given."""
    path: list[str | int] = []
    for part in location:
        inside = part in values if isinstance(values, dict) else isinstance(values, list) and part in range(len(values))
        if not inside:
            break
        values = values[part]
        path.append(part)
    return tuple(path), values


def _place(path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """Where ``path`` was set: itself, the nearest key around it, or (a section built of single keys) one inside it."""
    around = (origins[path[:length]] for length in range(len(path), 0, -1) if path[:length] in origins)
    inside = (place for known, place in origins.items() if known[: len(path)] == path)
    return next(around, None) or next(inside, "configuration")


def _section_at(path: KeyPath) -> type[Section] | None:
    section: type[Section] = EsperConfig
    for part in path:
        fields = section.model_fields
        annotation = fields[str(part)].annotation if part in fields else None
        if not isinstance(annotation, type) or not issubclass(annotation, Section):
            return None
        section = annotation
    return section


def _every_key(section: type[Section], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    for name in section.model_fields:
        path = (*prefix, name)
        yield path
        if (inner := _section_at(path)) is not None:
            yield from _every_key(inner, path)


def _nearest(path: KeyPath) -> str:
    """The key that was probably meant: in the same section, else anywhere, the shallowest first."""
    section = _section_at(path[:-1])
    wrong = str(path[-1]).lower().replace("-", "_")
    siblings = list(section.model_fields) if section is not None else []
    if near := difflib.get_close_matches(wrong, siblings, n=1):
        return f"did you mean {dotted((*path[:-1], near[0]))}?"
    every = sorted(_every_key(EsperConfig), key=len)
    if near := difflib.get_close_matches(wrong, [str(key[-1]) for key in every], n=1, cutoff=0.8):
        return f"did you mean {dotted(next(key for key in every if key[-1] == near[0]))}?"
    return f"known keys: {', '.join(siblings)}"


def _about(path: KeyPath) -> str:
    """What the schema says of a key, as the way out."""
    names = path[:-1] if path and isinstance(path[-1], int) else path
    section = _section_at(names[:-1])
    known = section.model_fields.get(str(names[-1])) if section is not None and names else None
    return (known.description or "") if known is not None else ""
