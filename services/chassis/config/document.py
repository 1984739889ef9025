"""YAML with the place of every key: reads the core schema of YAML 1.2, writes what YAML 1.1 reads equally.

YAML 1.1, which PyYAML speaks by itself, turns ``off`` into a boolean, ``12:30`` into 750 and ``1e-3`` into text; here
``traces: off`` is the word and ``learning_rate: 1e-3`` the number. Anything beyond maps, lists and plain values (tags,
dates, objects) is a mistake with a place, and no text makes the reader raise.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import yaml

from services.chassis.config.errors import Problem

KeyPath: TypeAlias = tuple[str | int, ...]

_TAG: Final = "tag:yaml.org,2002:"
# What a mistake, which is noted, leaves behind: no value, so that nobody complains of it a second time.
_UNUSABLE: Final = object()
_NUMBER: Final = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_BREAKS: Final = re.compile("[\n\r\x85\u2028\u2029]")
_ANY_WIDTH: Final = 2**31
# https://yaml.org/spec/1.2.2/#1032-tag-resolution; whole numbers in decimal only.
_RESOLVERS: Final[tuple[tuple[str, re.Pattern[str], str], ...]] = (
    ("null", re.compile(r"(~|null|Null|NULL|)$"), "~nN\0"),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", re.compile(r"[-+]?[0-9]+$"), "-+0123456789"),
    ("float", _NUMBER, "-+.0123456789"),
)
_SCALARS: Final[dict[str, Callable[[str], Any]]] = {
    _TAG + "str": str,
    _TAG + "null": lambda text: None,
    _TAG + "bool": lambda text: {"true": True, "false": False}[text.lower()],
    _TAG + "int": int,
    # The words for infinity and for no number differ from Python's by their dot.
    _TAG + "float": lambda text: float(re.sub(r"\.([a-zA-Z])", r"\1", text)),
}


class _Reader(yaml.SafeLoader):
    """Composes nodes whose tags are those of YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the stubs of yaml say that it is no class variable


class _Writer(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


def _write_text(writer: _Writer, text: str) -> yaml.ScalarNode:
    # Line breaks outside double quotes are folded, some of them into others than they were.
    return writer.represent_scalar(_TAG + "str", text, style='"' if _BREAKS.search(text) else None)


_Writer.add_representer(str, _write_text)
for _kind, _pattern, _first in _RESOLVERS:
    # PyYAML looks empty text up under "", which a string of first characters cannot hold.
    _Reader.add_implicit_resolver(_TAG + _kind, _pattern, ["" if one == "\0" else one for one in _first])
_Writer.add_implicit_resolver(_TAG + "float", _NUMBER, list("-+.0123456789"))


@dataclass
class Document:
    """What a text says, where each of its keys and items is, and what is wrong with it."""

    value: Any = None
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read(text: str, place_of: Callable[[int], str], prefix: KeyPath = ()) -> Document:
    """The document in ``text``; mistakes are in its ``problems``, nothing is raised.

    Args:
        text: YAML; an empty one is ``null``.
        place_of: how a line (from 1) is named.
        prefix: path of the document itself in ``origins`` and ``problems``.
    """
    document = Document()
    try:
        node = yaml.compose(text, Loader=_Reader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"the character U+{ord(text[error.position]):04X} is not allowed"
        document.problems.append(Problem(place_of(line), dotted(prefix), f"it is no YAML: {character}"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        document.problems.append(Problem(place_of(line), dotted(prefix), f"it is no YAML: {error.problem}"))
    except RecursionError:
        document.problems.append(Problem(place_of(1), dotted(prefix), "it is nested too deeply"))
    else:
        value = None if node is None else _Builder(place_of, document).build(node, prefix)
        document.value = None if value is _UNUSABLE else value
        document.origins.setdefault(prefix, place_of(1))
    return document


class _Builder:
    """Makes plain values of nodes and notes their places."""

    def __init__(self, place_of: Callable[[int], str], document: Document) -> None:
        self._place_of = place_of
        self._document = document
        self._around: list[yaml.Node] = []

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """The value of ``node``."""
        self._document.origins.setdefault(path, self._place(node))
        if any(node is outer for outer in self._around):
            return self._wrong(node, path, "it contains itself")
        self._around.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self._map(node, path)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                items = [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
                return _UNUSABLE if _UNUSABLE in items else items
            return self._scalar(node, path)
        finally:
            self._around.pop()

    def _map(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._wrong(key_node, path, "a key is a map or a list", "keys are words")
                continue
            key = key_node.value
            inner = (*path, key)
            if key in values:
                first = self._document.origins[inner]
                self._wrong(key_node, inner, f"it is set twice, first at {first}", "keep one")
            self._document.origins[inner] = self._place(key_node)
            value = self.build(value_node, inner)
            if value is not _UNUSABLE:
                values[key] = value
        return values

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        make = _SCALARS.get(node.tag) if isinstance(node, yaml.ScalarNode) else None
        if make is None:
            tag = node.tag.replace(_TAG, "!!")
            return self._wrong(node, path, f"the tag {tag} has no meaning here", "write the plain value")
        try:
            return make(node.value)
        except (ValueError, KeyError):
            return self._wrong(node, path, f"{shortened(node.value)} is no {node.tag.removeprefix(_TAG)}")

    def _place(self, node: yaml.Node) -> str:
        return self._place_of(node.start_mark.line + 1)

    def _wrong(self, node: yaml.Node, path: KeyPath, reason: str, suggestion: str = "") -> object:
        self._document.problems.append(Problem(self._place(node), dotted(path), reason, suggestion))
        return _UNUSABLE


def dotted(path: KeyPath) -> str:
    """``("a", "b", 0)`` as ``a.b[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def block(value: Any) -> str:
    """A plain value in YAML, on as many lines as it takes, in the order given."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True)


def inline(value: Any) -> str:
    """A plain value in YAML, on one line."""
    text = yaml.dump(
        value, Dumper=_Writer, default_flow_style=True, sort_keys=False, width=_ANY_WIDTH, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def shortened(value: Any, limit: int = 60) -> str:
    """A value in YAML, cut to what a message can bear."""
    text = inline(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
