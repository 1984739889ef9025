"""Writes docs/api_reference.md from the comments of the contracts, the table of errors and the table of topics.

    python docs/generate_api_reference.py [--check]

``--check`` writes nothing and exits with 1 when the page is not what the sources give.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from google.protobuf import descriptor_pb2  # noqa: E402 - after the repository is on the path

from services.chassis.errors import Reason  # noqa: E402 - after the repository is on the path
from services.oona.topics import DEAD_LETTER_SUFFIX, PLATFORM_TOPICS  # noqa: E402 - after the repository is on the path

PAGE: Final = ROOT / "docs" / "api_reference.md"
_ORDER: Final = ("urza", "tezzeret", "tamiyo", "kasmina", "oona", "tolaria", "common", "events")
_Field = descriptor_pb2.FieldDescriptorProto
# Numbers of the fields in descriptor.proto, of which the paths of comments are made.
_MESSAGES, _ENUMS, _SERVICES, _PACKAGE, _NESTED, _MEMBERS = 4, 5, 6, 2, 3, 2
_HEAD: Final = """# API reference

Generated from the comments in `proto/` by `docs/generate_api_reference.py`; a test holds it equal to them.

Common to all services:

- `grpc.health.v1` (Check and Watch) and reflection.
- Resources are named by path: `blueprints/{b}/kernels/{k}`, `runs/{r}/seeds/{s}`.
- Lists are paginated (`page_size`, `page_token`, `next_page_token`); a token belongs to its filter.
- Mutations carry a `request_id` (or `command_id`): the same id gives the same answer.
- A watch sends a snapshot, a bookmark, then changes; a `resume_token` goes on after a message.
- A field without "Required." may be left out; an absent `optional` field means not measured or not set, never zero.
"""


class Comments:
    """The comments of one file by the path of what they stand above."""

    def __init__(self, file: descriptor_pb2.FileDescriptorProto) -> None:
        self._by_path = {
            tuple(location.path): " ".join(location.leading_comments.split())
            for location in file.source_code_info.location
        }

    def at(self, *path: int) -> str:
        """The comment on one line; empty where there is none."""
        return self._by_path.get(path, "")


def load() -> list[descriptor_pb2.FileDescriptorProto]:
    """Descriptors of all contracts with their comments, by the protoc of grpcio-tools.

    Raises:
        SystemExit: protoc refused a file; it has said why.
    """
    import grpc_tools
    from grpc_tools import protoc

    files = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto" / "esper").rglob("*.proto"))
    included = Path(grpc_tools.__path__[0]) / "_proto"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "image.binpb"
        arguments = [f"-I{ROOT / 'proto'}", f"-I{included}", "--include_source_info", f"--descriptor_set_out={out}"]
        if protoc.main(["protoc", *arguments, *files]) != 0:
            raise SystemExit(1)
        return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _type(field: _Field, maps: dict[str, descriptor_pb2.DescriptorProto]) -> str:
    if field.type_name in maps:
        key, value = maps[field.type_name].field
        return f"map of {_type(key, maps)} to {_type(value, maps)}"
    name = field.type_name.lstrip(".") if field.type_name else _Field.Type.Name(field.type)[5:].lower()
    name = f"`{name}`"
    if field.label == _Field.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def _message(
    message: descriptor_pb2.DescriptorProto, comments: Comments, path: Sequence[int], prefix: str
) -> Iterator[str]:
    maps = {f".{prefix}{message.name}.{n.name}": n for n in message.nested_type if n.options.map_entry}
    yield f"#### {prefix}{message.name}\n\n{_cell(comments.at(*path))}\n"
    if message.field:
        yield "| field | type | meaning |\n|---|---|---|"
        for index, field in enumerate(message.field):
            meaning = comments.at(*path, _MEMBERS, index)
            if field.HasField("oneof_index") and not field.proto3_optional:
                meaning = f"(one of `{message.oneof_decl[field.oneof_index].name}`) {meaning}"
            yield f"| `{field.name}` | {_type(field, maps)} | {_cell(meaning)} |"
        yield ""
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message(nested, comments, (*path, _NESTED, index), f"{prefix}{message.name}.")


def _enum(
    enum: descriptor_pb2.EnumDescriptorProto, comments: Comments, path: Sequence[int], package: str
) -> Iterator[str]:
    yield f"#### {package}{enum.name}\n\n{_cell(comments.at(*path))}\n"
    yield "| value | number | meaning |\n|---|---|---|"
    for index, value in enumerate(enum.value):
        yield f"| `{value.name}` | {value.number} | {_cell(comments.at(*path, _MEMBERS, index))} |"
    yield ""


def _service(
    service: descriptor_pb2.ServiceDescriptorProto, comments: Comments, path: Sequence[int], package: str
) -> Iterator[str]:
    yield f"### {package}{service.name}\n\n{_cell(comments.at(*path))}\n"
    yield "| rpc | request | answer | what it does |\n|---|---|---|---|"
    for index, method in enumerate(service.method):
        request = f"{'stream ' if method.client_streaming else ''}`{method.input_type.rpartition('.')[2]}`"
        answer = f"{'stream ' if method.server_streaming else ''}`{method.output_type.rpartition('.')[2]}`"
        yield f"| `{method.name}` | {request} | {answer} | {_cell(comments.at(*path, _MEMBERS, index))} |"
    yield ""


def _component(name: str, files: Sequence[descriptor_pb2.FileDescriptorProto]) -> Iterator[str]:
    package = f"{files[0].package}."
    yield f"## {name.capitalize()}\n"
    yield f"Package `{files[0].package}`.\n"
    told = [(file, Comments(file)) for file in files]
    for file, comments in told:
        for index, service in enumerate(file.service):
            yield from _service(service, comments, (_SERVICES, index), package)
    yield "### Messages\n"
    for file, comments in told:
        for index, message in enumerate(file.message_type):
            yield from _message(message, comments, (_MESSAGES, index), package)
        for index, enum in enumerate(file.enum_type):
            yield from _enum(enum, comments, (_ENUMS, index), package)


def _errors() -> Iterator[str]:
    yield "## Errors\n"
    yield (
        "Every error is a `google.rpc.Status` with one `ErrorInfo` of domain `esper`; programs match on its reason,\n"
        "the message is for people. `BadRequest`, `RetryInfo` and `ResourceInfo` are added where they help.\n"
    )
    yield "| reason | gRPC code | meaning | way out |\n|---|---|---|---|"
    for reason in Reason:
        yield f"| `{reason.value}` | {reason.code.name} | {_cell(reason.meaning)} | {_cell(reason.way_out)} |"
    yield ""


def _topics() -> Iterator[str]:
    yield "## Topics\n"
    yield f"A topic takes only these payloads; each has a dead-letter twin, its name with `{DEAD_LETTER_SUFFIX}`.\n"
    yield "| topic | payload types |\n|---|---|"
    for topic, types in PLATFORM_TOPICS.items():
        yield f"| `{topic}` | {', '.join(f'`{kind}`' for kind in types)} |"
    yield ""


def render() -> str:
    """The page."""
    by_component: dict[str, list[descriptor_pb2.FileDescriptorProto]] = {}
    for file in load():
        by_component.setdefault(file.package.split(".")[1], []).append(file)
    # A component that _ORDER does not know comes last: nothing is left out.
    names = sorted(by_component, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    parts = [_HEAD, "Contents: " + ", ".join(f"[{name.capitalize()}](#{name})" for name in names)]
    parts[-1] += ", [Errors](#errors), [Topics](#topics)\n"
    for name in names:
        parts += _component(name, by_component[name])
    parts += [*_errors(), *_topics()]
    return "\n".join(parts).rstrip() + "\n"


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done or equal, 1 with --check and another page than committed."""
    page = render()
    if "--check" not in arguments:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    print("docs/api_reference.md is not what the contracts say: python docs/generate_api_reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
